"""What the rehearsals of a stage read: tensors without values, as its input lies in the data or in a cache."""

import torch

from layerwise.cache.dtypes import STORED
from layerwise.config import Config
from layerwise.memory.meter import REHEARSED_ON
from layerwise.training.spec import StageSpec


def stored_input(config: Config, spec: StageSpec, samples: int, frames: int, resident: int = 0) -> torch.Tensor:
    """Meta tensor (samples, frames, *frame shape) in the dtype in which the input of the stage is read.

    resident: rows of it on the device; int64 (samples, frames, 1) then, which are their numbers.
    """
    if resident:
        return torch.zeros(samples, frames, 1, dtype=torch.int64, device="meta")
    return torch.zeros(samples, frames, *spec.frame_shape, dtype=_input_dtype(config, spec), device="meta")


def _input_dtype(config: Config, spec: StageSpec) -> torch.dtype:
    return torch.float32 if spec.stage == 1 else STORED[config.cache.dtype].tensor


def resident_rows(config: Config, spec: StageSpec, resident: int) -> torch.Tensor | None:
    """As many rows of the input, on the device."""
    if not resident:
        return None
    return torch.empty(resident, *spec.frame_shape, dtype=_input_dtype(config, spec), device=REHEARSED_ON)
