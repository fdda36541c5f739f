"""The loss and the gradients of a whole batch, with a slice of it on the device at a time, exactly.

A contrastive loss ties all samples of a batch together, so gradients of slices do not add up to the gradient of the
batch. Three steps make them (Gao et al. 2021, arXiv 2101.06983): the representations of all slices, without a graph; the
loss on them, and its gradients; the forward pass of each slice once more, through which these gradients run back. The
second forward pass repeats the first to the bit, its random numbers included.

Of the representations only the rows that the loss scores are kept. Where even those are too many, the batch is gone
through in several passes, each of which scores a part of the targets: their losses add up.

Several ranks share the samples of a batch: each encodes its own and runs them back, and between the two all of them see
all representations and the whole loss. The gradients of the module are then to be added up over the ranks.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch

from layerwise.memory.meter import uncounted
from layerwise.memory.ranks import ALONE, Ranks


class Part(Protocol):
    """What one pass scores."""

    @property
    def rows(self) -> np.ndarray:
        """int64 [R], sorted: frames of the batch, numbered b * L + t."""
        ...


Encode = Callable[[slice, np.ndarray], tuple[torch.Tensor, ...]]
"""Representations (R, ...) of some samples of the batch, at rows that are numbered from the first frame of these samples;
one or more tensors. The same call gives the same bits, with or without gradients."""


@dataclass(frozen=True, slots=True)
class Total:
    """The score of a part or of a batch; scalars on the device."""

    loss: torch.Tensor
    accuracy: torch.Tensor


Loss = Callable[[tuple[torch.Tensor, ...], Part], Total]
"""The score of one part at all its representations."""


@dataclass(slots=True)
class Pending:
    """A part whose loss is known, and whose gradients have come as far as the representations."""

    part: Part
    score: Total
    gradients: list[torch.Tensor]
    """Of the representations at the part's rows."""
    encoded: tuple[torch.Tensor, ...] | None
    """The representations of this rank's samples with their graph, where all of these were encoded at once."""
    on_host: bool = False
    """Whether the gradients wait in host memory."""

    def move_to_host(self) -> None:
        """Leaves room on the device; each slice takes its part of the gradients back."""
        with uncounted():
            self.gradients = [gradient.to("cpu", copy=True) for gradient in self.gradients]
        self.on_host = True

    def gradients_at(self, rows: slice, device: torch.device) -> list[torch.Tensor]:
        """Of some of the part's rows, on the device."""
        if not self.on_host:
            return [gradient[rows] for gradient in self.gradients]
        with uncounted():
            parts = [gradient[rows] for gradient in self.gradients]
        return [part.to(device, copy=True) for part in parts]


@dataclass(frozen=True, slots=True)
class SlicedBatch:
    """A batch that is encoded slice by slice."""

    encode: Encode
    samples: int
    frames: int
    """Output frames of each sample, padding included."""
    ranks: Ranks = ALONE
    """Who shares the samples."""


def score(batch: SlicedBatch, loss: Loss, parts: Sequence[Part], micro_batch: int) -> Total:
    """The score of a batch, without gradients."""
    slices = _slices(batch, micro_batch)
    with torch.no_grad():
        return total([loss(_gathered(batch, part.rows, _encoded(batch, part.rows, slices)), part) for part in parts])


def loss_gradients(batch: SlicedBatch, loss: Loss, part: Part, micro_batch: int, scale: float = 1.0) -> Pending:
    """The loss of a part, the gradients of the loss's own parameters in their `.grad`, and those of the representations.

    scale: what the gradients of the representations are multiplied by, to keep short floats from losing small ones.
    """
    slices = _slices(batch, micro_batch)
    with torch.set_grad_enabled(len(slices) == 1):
        encoded = _encoded(batch, part.rows, slices)
    # In float32 at least: short floats would lose small gradients before they are scaled.
    leaves = tuple(
        tensor.detach().to(torch.promote_types(tensor.dtype, torch.float32)).requires_grad_()
        for tensor in _gathered(batch, part.rows, encoded)
    )
    if len(slices) != 1 and batch.ranks.count > 1:
        encoded = ()  # the whole takes its place
    scored = loss(leaves, part)
    scored.loss.backward()
    gradients = [torch.zeros_like(leaf) if leaf.grad is None else leaf.grad.mul_(scale) for leaf in leaves]
    found = Total(scored.loss.detach(), scored.accuracy)
    return Pending(part, found, gradients, encoded if len(slices) == 1 else None)


def run_back(pending: Pending, batch: SlicedBatch, micro_batch: int) -> None:
    """Runs the gradients of a part back through the module, into the `.grad` of its parameters."""
    encoded, pending.encoded = pending.encoded, None
    if encoded is not None:
        _backward(encoded, pending.gradients_at(_own_rows(batch, pending.part.rows), encoded[0].device))
        return
    rows = pending.part.rows
    for samples in _slices(batch, micro_batch):
        here = _rows_of(rows, samples, batch.frames)
        if here.start < here.stop:
            encoded = batch.encode(samples, _within(rows, samples, batch.frames))
            _backward(encoded, pending.gradients_at(here, encoded[0].device))
            del encoded


def total(scores: Sequence[Total]) -> Total:
    """The sum over parts."""
    first, *others = scores
    loss, accuracy = first.loss, first.accuracy
    for other in others:
        loss, accuracy = loss + other.loss, accuracy + other.accuracy
    return Total(loss, accuracy)


def _slices(batch: SlicedBatch, micro_batch: int) -> list[slice]:
    """Of this rank's samples."""
    own = batch.ranks.share(batch.samples)
    return [slice(start, min(start + micro_batch, own.stop)) for start in range(own.start, own.stop, micro_batch)]


def _encoded(batch: SlicedBatch, rows: np.ndarray, slices: list[slice]) -> tuple[torch.Tensor, ...]:
    """The representations at those of `rows` that are this rank's, of all its slices."""
    if len(slices) == 1:
        return batch.encode(slices[0], _within(rows, slices[0], batch.frames))
    if not slices:
        return batch.encode(slice(0, 1), rows[:0])  # nothing, in the right shapes
    own = _own_rows(batch, rows)
    whole: tuple[torch.Tensor, ...] = ()
    for samples in slices:
        here = _rows_of(rows, samples, batch.frames)
        encoded = batch.encode(samples, _within(rows, samples, batch.frames))
        # Filled slice by slice: joining them in the end would hold all of them twice.
        whole = whole or tuple(tensor.new_empty(own.stop - own.start, *tensor.shape[1:]) for tensor in encoded)
        for into, tensor in zip(whole, encoded, strict=True):
            into[here.start - own.start : here.stop - own.start] = tensor
        del encoded
    return whole


def _own_rows(batch: SlicedBatch, rows: np.ndarray) -> slice:
    """Where the rows of this rank's samples stand among all rows."""
    if batch.ranks.count == 1:
        return slice(0, len(rows))
    return _rows_of(rows, batch.ranks.share(batch.samples), batch.frames)


def _gathered(batch: SlicedBatch, rows: np.ndarray, own: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
    """The representations at all rows, from those of each rank's samples."""
    ranks = batch.ranks
    if ranks.count == 1:
        return own
    places = [_rows_of(rows, ranks.share(batch.samples, rank), batch.frames) for rank in range(ranks.count)]
    return tuple(ranks.gather_rows(tensor, places) for tensor in own)


def _backward(encoded: tuple[torch.Tensor, ...], gradients: list[torch.Tensor]) -> None:
    # The inputs of a stage may be targets themselves; nothing below them is trained.
    trained = [number for number, tensor in enumerate(encoded) if tensor.requires_grad]
    torch.autograd.backward(
        [encoded[number] for number in trained],
        [gradients[number].to(encoded[number].dtype) for number in trained],
    )


def _rows_of(rows: np.ndarray, samples: slice, frames: int) -> slice:
    """Where the rows of some samples stand among all rows."""
    start, stop = np.searchsorted(rows, [samples.start * frames, samples.stop * frames])
    return slice(int(start), int(stop))


def _within(rows: np.ndarray, samples: slice, frames: int) -> np.ndarray:
    """The rows of some samples, numbered from the first frame of these."""
    return rows[_rows_of(rows, samples, frames)] - samples.start * frames
