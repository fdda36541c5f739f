"""The outputs of a stage on a GPU that does three things at once: while a piece is computed, the outputs of the one before
go to the host, and the next piece comes to the device.
"""

from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import replace

import numpy as np
import torch

from layerwise.cache.dtypes import STORED, as_array, largest
from layerwise.data.batches import Batch, Group
from layerwise.memory.copy_stream import Arriving, CopyStream, Leaving
from layerwise.training.context import RunContext
from layerwise.training.forward import InferenceStage, forward_pieces
from layerwise.training.loader import Loader


def overlapped_rows(
    stage: InferenceStage, loader: Loader, groups: Sequence[Group], context: RunContext
) -> Iterator[np.ndarray]:
    """What `forward_all` gives of a stage, as `as_array` gives it, rendering by rendering; one piece later.

    The arrays lie in pinned memory that is used again: whoever wants to keep them copies them. Raises TrainingError where the
    dtype of the cache cannot hold an output.
    """
    dtype = stage.output_format.dtype
    assert dtype is not None
    as_computed = replace(stage, output_format=replace(stage.output_format, dtype=None))
    up, down = CopyStream(context.device), CopyStream(context.device)

    def take(
        number: int, renderings: Sequence[int], outputs: torch.Tensor, lengths: np.ndarray
    ) -> tuple[Leaving, np.ndarray]:
        # The largest of all says whether all can be held, and is read where nobody waits for it.
        return down.take(contiguous(outputs, STORED[dtype].tensor), largest(outputs)), lengths

    def rows_of(leaving: Leaving, lengths: np.ndarray) -> Iterator[np.ndarray]:
        stored, most = leaving.left()
        stage.refuse_unstorable(most)
        for frames, length in zip(stored, lengths.tolist(), strict=True):
            yield as_array(frames[:length])

    def sent(pieces: Iterator[Batch]) -> Iterator[Batch]:
        return _sent(pieces, up)

    on_their_way: deque[tuple[Leaving, np.ndarray]] = deque()
    try:
        for _, piece, _ in forward_pieces([as_computed], loader, groups, take, context, sent):
            on_their_way.append(piece)
            if len(on_their_way) > 1:
                yield from rows_of(*on_their_way.popleft())
        while on_their_way:
            yield from rows_of(*on_their_way.popleft())
    finally:
        for leaving, _ in on_their_way:
            leaving.left()


def contiguous(outputs: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """A copy in one piece: of anything else torch would make one on the stream that copies, beside the plan."""
    return torch.empty(outputs.shape, dtype=dtype, device=outputs.device).copy_(outputs)


def _sent(pieces: Iterator[Batch], copies: CopyStream) -> Iterator[Batch]:
    """Each piece, on the device, when the next one has been sent for."""
    coming: deque[tuple[Batch, Arriving]] = deque()

    def first() -> Batch:
        piece, arriving = coming.popleft()
        return replace(piece, frames=arriving.arrived())

    try:
        for piece in pieces:
            coming.append((piece, copies.bring(piece.frames)))
            if len(coming) > 1:
                yield first()
        while coming:
            yield first()
    finally:
        while coming:
            first()
