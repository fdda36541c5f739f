"""What a record says of memory is what the device had at its fullest."""

from pathlib import Path

from gpu_cases import CASES, run_case
from simulated_gpu import SimulatedGPU

from layerwise.events import Event, StageDone, StageStarted


def test_parameters_and_optimizer_take_as_much_as_on_a_cpu(gpu: SimulatedGPU, tmp_path: Path) -> None:
    """Weights of a recurrent layer lie side by side in one storage there."""
    of_host, of_device = (
        [record.train_peak_by_kind for record in run_case(CASES["speech"], device, tmp_path / device).state.stages]
        for device in ("cpu", "cuda")
    )
    for kind in ("parameters", "optimizer"):
        assert [held[kind] for held in of_device] == [held[kind] for held in of_host]


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
