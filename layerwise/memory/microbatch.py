"""The loss and the gradients of a whole batch, with a slice of it on the device at a time, exactly.

A contrastive loss ties all samples of a batch together, so gradients of slices do not add up to the gradient of the
batch. Three steps make them (Gao et al. 2021, arXiv 2101.06983): the representations of all slices, without a graph; the
loss on them, and its gradients; the forward pass of each slice once more, through which these gradients run back. The
second forward pass repeats the first to the bit, its random numbers included.

Of the representations only the rows that the loss scores are kept. Where even those are too many for the device they wait
on the host, and the loss is worked out for a part of the targets at a time: the losses of the parts add up. Between the three
steps nothing of the module need be on the device.

Several ranks share the samples of a batch: each encodes its own and runs them back, and between the two all of them see
all representations and the whole loss. The gradients of the module are then to be added up over the ranks.
"""

import contextlib
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch

from layerwise.memory.host import HostMemory
from layerwise.memory.meter import in_host_memory, uncounted
from layerwise.memory.ranks import ALONE, Ranks


class Part(Protocol):
    """What is scored at once."""

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

    def added_to(self, other: "Total | None") -> "Total":
        """The score of two parts together."""
        return self if other is None else Total(other.loss + self.loss, other.accuracy + self.accuracy)


Loss = Callable[[tuple[torch.Tensor, ...], Part], Total]
"""The score of one part at all its representations, or one of several scores that add up to it."""


@dataclass(frozen=True, slots=True)
class SlicedBatch:
    """A batch that is encoded slice by slice."""

    encode: Encode
    samples: int
    frames: int
    """Output frames of each sample, padding included."""
    micro_batch: int
    """Samples of a slice."""
    device: torch.device
    host: HostMemory | None = None
    """Where the representations wait, and their gradients; None: on the device."""
    ranks: Ranks = ALONE
    """Who shares the samples."""

    @property
    def slices(self) -> list[slice]:
        """Of this rank's samples."""
        own = self.ranks.share(self.samples)
        return [slice(s, min(s + self.micro_batch, own.stop)) for s in range(own.start, own.stop, self.micro_batch)]


@dataclass(frozen=True, slots=True)
class Representations:
    """What was encoded of a batch, at some of its rows."""

    rows: np.ndarray
    """int64 [R], sorted."""
    encoded: tuple[torch.Tensor, ...]
    """Of the rows of all ranks' samples, on the device or on the host."""
    graph: tuple[torch.Tensor, ...] | None
    """Of this rank's samples with their graph, where all of these were encoded at once."""


@dataclass(slots=True)
class Pending:
    """Gradients that have come as far as the representations."""

    rows: np.ndarray
    """int64 [R], sorted."""
    score: Total
    gradients: list[torch.Tensor]
    """Of the representations at these rows, on the device or on the host."""
    graph: tuple[torch.Tensor, ...] | None
    on_host: bool

    def move_to(self, host: HostMemory) -> None:
        """Leaves room on the device; each slice takes its part of the gradients back."""
        if not self.on_host:
            self.gradients = [host.keep(gradient) for gradient in self.gradients]
        self.on_host = True


def encode(batch: SlicedBatch, rows: np.ndarray, with_graph: bool) -> Representations:
    """The representations of a batch at some rows. with_graph: keep what the backward pass needs, where one slice is all and
    they stay on the device."""
    slices = batch.slices
    keeps = with_graph and len(slices) == 1 and batch.host is None
    with torch.set_grad_enabled(keeps):
        own = _encoded(batch, rows, slices)
    gathered = _gathered(batch, rows, own)
    return Representations(rows, gathered, own if keeps else None)


def score(batch: SlicedBatch, representations: Representations, losses: Iterable[Loss], parts: Sequence[Part]) -> Total:
    """The score of a batch, without gradients."""
    score = None
    with torch.no_grad():
        for loss in losses:
            for part in parts:
                score = loss(_of_part(batch, representations, part)[1], part).added_to(score)
            del loss
    assert score is not None
    return score


def loss_gradients(
    batch: SlicedBatch,
    representations: Representations,
    losses: Iterable[Loss],
    parts: Sequence[Part],
    scale: float = 1.0,
) -> Pending:
    """The loss of a batch, the gradients of the loss's own parameters in their `.grad`, and those of the representations.

    losses: they add up; each is let go of before the next is asked for. scale: what the gradients of the representations are
    multiplied by, to keep short floats from losing small ones.
    """
    score = None
    gradients = [] if batch.host is None else _zeros_on_host(representations.encoded)
    for loss in losses:
        for part in parts:
            at, encoded = _of_part(batch, representations, part)
            scored, of_part = _gradients_of_part(loss, part, encoded, scale)
            del encoded
            score = scored.added_to(score)
            if batch.host is None:
                gradients = of_part
            else:
                for whole, gradient in zip(gradients, map(batch.host.keep, of_part), strict=True):
                    with uncounted():
                        whole.index_add_(0, at, gradient)
            del of_part
        del loss
    assert score is not None
    return Pending(representations.rows, score, gradients, representations.graph, batch.host is not None)


def _gradients_of_part(
    loss: Loss, part: Part, encoded: tuple[torch.Tensor, ...], scale: float
) -> tuple[Total, list[torch.Tensor]]:
    # In float32 at least: short floats would lose small gradients before they are scaled.
    leaves = [_at_least_float32(tensor.detach()).requires_grad_() for tensor in encoded]
    scored = loss(tuple(leaves), part)
    scored.loss.backward()
    gradients = [torch.zeros_like(leaf) if leaf.grad is None else leaf.grad for leaf in leaves]
    if scale != 1:
        for gradient in gradients:
            gradient.mul_(scale)
    return Total(scored.loss.detach(), scored.accuracy), gradients


def run_back(pending: Pending, batch: SlicedBatch, host: HostMemory) -> None:
    """Runs the gradients of the representations back through the module, into the `.grad` of its parameters."""
    graph, pending.graph = pending.graph, None
    if graph is not None:
        _backward(graph, _gradients_at(pending, _own_rows(batch, pending.rows), batch, host))
        return
    rows = pending.rows
    for samples in batch.slices:
        here = _rows_of(rows, samples, batch.frames)
        if here.start < here.stop:
            encoded = batch.encode(samples, _within(rows, samples, batch.frames))
            _backward(encoded, _gradients_at(pending, here, batch, host))
            del encoded


def all_rows(parts: Sequence[Part]) -> np.ndarray:
    """The rows of all parts, each once."""
    return parts[0].rows if len(parts) == 1 else np.unique(np.concatenate([part.rows for part in parts]))


def _of_part(
    batch: SlicedBatch, representations: Representations, part: Part
) -> tuple[torch.Tensor, tuple[torch.Tensor, ...]]:
    """Where the rows of a part stand among all, int64 on the host; and its representations, on the device."""
    with in_host_memory():
        at = torch.as_tensor(np.searchsorted(representations.rows, part.rows))
    if batch.host is None:
        return at, representations.encoded
    # Short floats are widened one by one: none stays beside its copy.
    return at, tuple(_at_least_float32(batch.host.bring(t, batch.device, at)) for t in representations.encoded)


def _at_least_float32(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


def _zeros_on_host(encoded: tuple[torch.Tensor, ...]) -> list[torch.Tensor]:
    with uncounted():
        return [torch.zeros_like(t, dtype=torch.promote_types(t.dtype, torch.float32)) for t in encoded]


def _gradients_at(pending: Pending, rows: slice, batch: SlicedBatch, host: HostMemory) -> list[torch.Tensor]:
    """Of some of the rows, on the device."""
    if not pending.on_host:
        return [gradient[rows] for gradient in pending.gradients]
    return [host.bring(gradient, batch.device, rows) for gradient in pending.gradients]


def _encoded(batch: SlicedBatch, rows: np.ndarray, slices: list[slice]) -> tuple[torch.Tensor, ...]:
    """The representations at those of `rows` that are this rank's, of all its slices."""
    if len(slices) == 1 and batch.host is None:
        return batch.encode(slices[0], _within(rows, slices[0], batch.frames))
    own = _own_rows(batch, rows)
    whole: tuple[torch.Tensor, ...] = ()
    for samples in slices or [slice(0, 0)]:  # a rank that has none gives no rows, in the right shapes
        here = _rows_of(rows, samples, batch.frames)
        encoded = batch.encode(samples if slices else slice(0, 1), _within(rows, samples, batch.frames))
        if batch.host is not None:
            encoded = tuple(map(batch.host.keep, encoded))
        with contextlib.nullcontext() if batch.host is None else uncounted():
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
    with contextlib.nullcontext() if batch.host is None else uncounted():
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
