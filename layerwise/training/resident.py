"""An input that stays on the device: the cache of the stage below, where there is room for it beside the stage.

Batches and pieces then hold the numbers of rows in place of the rows, and are gathered on the device: the same bits, and hardly
anything that comes from the host.
"""

import numpy as np
import torch

from layerwise.cache import ActivationCache
from layerwise.cache.dtypes import STORED
from layerwise.config import Config
from layerwise.errors import BudgetError
from layerwise.memory.device import release, why_out_of_memory
from layerwise.stop import StopFlag
from layerwise.training.cache_plan import CachePlan
from layerwise.training.spec import StageSpec


def rows_of_input(config: Config, spec: StageSpec, cache_plan: CachePlan) -> int:
    """Rows that the input of a stage would have on the device, one of zeros among them; 0 where it cannot stay there.

    It can where it is a cache whose rows are trained on as they lie there.
    """
    options = config.training
    changed = config.cache.dtype == "int8" or options.input_noise or options.frame_dropout
    if cache_plan.input_kind(spec.stage) != "cache" or changed or spec.parts:
        return 0
    return 1 + spec.views * int(spec.lengths.sum())


class RowNumbers:
    """Reads of a cache the numbers that its rows have in `resident_rows`, int64 [n, 1]; 0 stands for padding."""

    def __init__(self, cache: ActivationCache) -> None:
        self.lengths, self.columns, self.views = cache.lengths, cache.columns, cache.views
        self._firsts = 1 + cache.layout.offsets

    def read(self, sample: int, start: int, stop: int, view: int = 0) -> torch.Tensor:
        """Of frames start to stop of one sample."""
        first = self._firsts[sample * self.views + view]
        return torch.from_numpy(np.arange(first + start, first + stop).reshape(-1, 1))


def resident_rows(cache: ActivationCache, config: Config, device: torch.device, stop: StopFlag) -> torch.Tensor | None:
    """[1 + rows of the cache, *frame shape] on the device, in the dtype of the cache; the first row is zero.

    None where the device has no room for it, or the cache is of another dtype than was planned. Raises Interrupted.
    """
    if cache.layout.dtype != config.cache.dtype:
        return None
    firsts = (1 + cache.layout.offsets).tolist()
    try:
        rows = torch.empty(firsts[-1], *cache.frame_shape, dtype=STORED[cache.layout.dtype].tensor, device=device)
    except (BudgetError, RuntimeError) as error:
        why_out_of_memory(error)
        rows = None
    if rows is None:
        release(device)
        return None
    rows[:1] = 0
    for sample, length in enumerate(cache.lengths.tolist()):
        stop.raise_if_set("before the input of the stage was on the device")
        for view in range(cache.views):
            first = firsts[sample * cache.views + view]
            rows[first : first + length] = cache.read(sample, 0, length, view)
    return rows
