"""What a record says of memory is what the device had at its fullest."""

from pathlib import Path

from gpu_cases import CASES, run_case
from simulated_gpu import SimulatedGPU

from layerwise.events import Event, StageDone, StageStarted


def test_the_drivers_figure_is_that_of_the_fullest_moment(gpu: SimulatedGPU, tmp_path: Path) -> None:
    seen = []

    def watch(event: Event) -> None:
        if isinstance(event, StageStarted):
            gpu.allocator.most_reserved = 0
        if isinstance(event, StageDone):
            seen.append(gpu.allocator.most_reserved)

    records = run_case(CASES["speech"], "cuda", tmp_path, watch).state.stages
    assert [record.allocator_bytes for record in records] == seen
    assert [record.driver_bytes for record in records] == [gpu.context + reserved for reserved in seen]
