"""TensorBoard: event files beside each stage's metrics, so that the stages lie in one chart, each a line of its own.

Retraining a stage deletes them with the rest of its folder.
"""

from collections.abc import Mapping

from torch.utils.tensorboard import SummaryWriter

from layerwise.config import Config
from layerwise.run_store import RunStore


class TensorBoard:
    """Writes stages/S/tensorboard/."""

    def __init__(self, store: RunStore, run_id: str, config: Config) -> None:
        self._store = store
        self._writers: dict[int, SummaryWriter] = {}

    def log(self, stage: int, step: int, values: Mapping[str, float]) -> None:
        if stage not in self._writers:
            self._writers[stage] = SummaryWriter(str(self._store.stage(stage) / "tensorboard"))
        for name, value in values.items():
            self._writers[stage].add_scalar(name, value, step)
        self._writers[stage].flush()  # an epoch that is told here once is not told again after a kill

    def close(self, done: bool) -> None:
        for writer in self._writers.values():
            writer.close()


open_tracker = TensorBoard
