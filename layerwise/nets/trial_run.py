"""What a module does that matters when a batch is sliced, found out by running two samples through it.

The samples are of opposite sign, so that what happens to positive or to negative values alone does happen."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import nn
from torch.utils._pytree import tree_leaves

from layerwise.nets.batch_effects import BatchEffects, changes_itself, path_and_class, ties_samples

FAR = (1.0,)
NEAR = (1e-4, 3e-5, 1e-5)
"""How far one sample is moved, to see whether the other one's outputs move. Near, where random numbers are drawn: RReLU
draws for negative values only, so a sample whose signs change moves what others draw; all of the moves must agree."""

ROUNDING = 1e-3
"""Of the largest output: slices of another size are added up in another order."""

Forward = Callable[[torch.Tensor], torch.Tensor]


def tried(module: nn.Module, forward: Forward, shape: tuple[int, ...], name: str) -> BatchEffects:
    """What a module does with samples of this shape (L, *frame), on the CPU.

    forward: (B, L, *frame) to outputs with a row per sample, through the module; name: what the module is called where no
    part of it can be. Leaves the CPU's generator elsewhere, and the module changed.
    """
    generator = torch.Generator().manual_seed(0)
    sample, noise = torch.randn(2, *shape, generator=generator)
    batch = torch.stack([sample, -sample])
    before = _State(module)
    trial = _Trial(forward, torch.get_rng_state())
    outputs, end = trial.run(batch)
    draws = not torch.equal(trial.start, end)
    changed = before.changed()
    if changed:
        return BatchEffects(draws, changes_itself(module, changed))
    if not _near(trial.run(batch)[0], outputs):
        return BatchEffects(draws, f"{name} gives other outputs at every forward pass")
    others = [torch.stack([sample, far * noise - sample]) for far in (NEAR if draws else FAR)]
    if all(_moves_the_first(*trial.run(other), outputs, end) for other in others):
        return BatchEffects(draws, ties_samples(_first_to_mix(module, trial, batch, others[0]) or name))
    # Each slice draws its own, so there is nothing to compare where anything is drawn.
    if not draws and not _sliceable(trial, batch, outputs):
        return BatchEffects(draws, ties_samples(name))
    return BatchEffects(draws, None)


@dataclass(frozen=True, slots=True)
class _Trial:
    """Forward passes that begin with the same random numbers."""

    forward: Forward
    start: torch.Tensor
    """State of the generator."""

    def run(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """The outputs, and the state of the generator after them."""
        torch.set_rng_state(self.start)
        return self.forward(x.clone()), torch.get_rng_state()


class _State:
    """Values of the buffers of a module, and versions of its parameters."""

    def __init__(self, module: nn.Module) -> None:
        self._module = module
        self._buffers = {name: buffer.clone() for name, buffer in module.named_buffers()}
        self._versions = {name: parameter._version for name, parameter in module.named_parameters()}

    def changed(self) -> str | None:
        """Path of the first buffer or parameter that is not as it was."""
        buffers = (name for name, now in self._module.named_buffers() if not _same(now, self._buffers.get(name)))
        parameters = (name for name, now in self._module.named_parameters() if now._version != self._versions.get(name))
        return next(buffers, None) or next(parameters, None)


def _moves_the_first(moved: torch.Tensor, moved_end: torch.Tensor, outputs: torch.Tensor, end: torch.Tensor) -> bool:
    """Whether another second sample has changed the outputs of the first one, though as much was drawn."""
    return torch.equal(moved_end, end) and not _same(moved[0], outputs[0])


def _sliceable(trial: _Trial, batch: torch.Tensor, outputs: torch.Tensor) -> bool:
    """Whether samples that go through alone come out as in their batch."""
    try:
        alone = [trial.run(sample[None])[0] for sample in batch]
    except (RuntimeError, ValueError):
        return False  # made for several samples, as batch normalisation is
    return _near(torch.cat(alone), outputs)


def _first_to_mix(module: nn.Module, trial: _Trial, batch: torch.Tensor, other: torch.Tensor) -> str | None:
    """Path and class of the first part whose outputs for the first sample differ though its inputs do not."""
    trails = [_trail(module, trial, x) for x in (batch, other)]
    for (path, entering, leaving), (other_path, other_entering, other_leaving) in zip(*trails, strict=False):
        if path == other_path and _all_same(entering, other_entering) and not _all_same(leaving, other_leaving):
            return path_and_class(path, module.get_submodule(path))
    return None


Step = tuple[str, list[torch.Tensor], list[torch.Tensor]]
"""Path of a part, and of what entered and left it the first half: the first of two samples."""


def _trail(module: nn.Module, trial: _Trial, x: torch.Tensor) -> list[Step]:
    """The parts of a module in the order in which they came to an end."""
    trail: list[Step] = []
    hooks = [
        part.register_forward_hook(
            lambda _, entering, leaving, path=path: trail.append((path, _first_half(entering), _first_half(leaving)))
        )
        for path, part in module.named_modules()
    ]
    trial.run(x)
    for hook in hooks:
        hook.remove()
    return trail


def _first_half(values: object) -> list[torch.Tensor]:
    tensors = (value for value in tree_leaves(values) if isinstance(value, torch.Tensor) and value.dim())
    return [tensor[: len(tensor) // 2].clone() for tensor in tensors]


def _all_same(some: list[torch.Tensor], others: list[torch.Tensor]) -> bool:
    return len(some) == len(others) and all(map(_same, some, others))


def _same(one: torch.Tensor, other: torch.Tensor | None) -> bool:
    """To the bit, but for the bits of NaN."""
    if other is None or one.shape != other.shape or one.dtype != other.dtype:
        return False
    return torch.equal(one, other) or bool(((one == other) | (one.isnan() & other.isnan())).all())


def _near(one: torch.Tensor, other: torch.Tensor) -> bool:
    if one.shape != other.shape:
        return False
    largest = float(other.nan_to_num(0, 0, 0).abs().max())
    return torch.allclose(one, other, rtol=ROUNDING, atol=ROUNDING * largest, equal_nan=True)
