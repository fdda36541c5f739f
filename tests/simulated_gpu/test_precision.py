"""Which floats a GPU computes in, whether it does so to the same bits, and what a run says of it."""

from pathlib import Path

import pytest
import torch
from gpu_cases import CASES, SPEECH, Case, Task, run_case
from simulated_gpu import GPU, SimulatedGPU
from torch_cuda import installed

from layerwise.events import Event, Message, StepDone

SHORT = Case(SPEECH | {"training.precision": "bfloat16"})


@pytest.mark.parametrize("recompute", [False, True])
def test_recurrent_layers_compute_in_float32_under_bfloat16(gpu: SimulatedGPU, recompute: bool) -> None:
    made = Task.of(SHORT, 3, **{"memory.recompute": "always" if recompute else "never"})
    made.steps(made.plans[0], GPU)
    assert gpu.recurrent_in == {torch.float32}


def test_under_float16_they_compute_in_it_for_gradients_are_scaled_then(gpu: SimulatedGPU) -> None:
    made = Task.of(SHORT, 3, **{"training.precision": "float16"})
    made.steps(made.plans[0], GPU)
    assert gpu.recurrent_in == {torch.float16}


@pytest.mark.parametrize(
    ("capability", "said"), [((8, 6), "round their inputs to TF32"), ((8, 6), "is exact"), ((7, 5), "")]
)
def test_a_run_says_how_exact_float32_is(tmp_path: Path, capability: tuple[int, int], said: str) -> None:
    deterministic, lines = said == "is exact", []

    def note(event: Event) -> None:
        if isinstance(event, Message):
            lines.append(event.text)
        if isinstance(event, StepDone):
            assert torch.are_deterministic_algorithms_enabled() == deterministic

    with installed(SimulatedGPU(capability=capability)):
        run_case(CASES["patches"], "cuda", tmp_path, note, **{"training.deterministic": deterministic})
    about = [line for line in lines if "float32" in line]
    assert len(about) == bool(said)
    assert all(said in line for line in about)


@pytest.mark.parametrize("place", ["device", "host"])
def test_weights_of_convolutions_lie_as_their_input_does_and_stay_so(gpu: SimulatedGPU, place: str) -> None:
    """Where one of the two is in another order, cuDNN copies the weight at each call, and its gradient."""
    made = Task.of(Case(SPEECH), 1, **{"memory.optimizer": place})
    trainer = made.trainer(made.plans[0], GPU)
    (layer,) = trainer.module.layers.values()

    def in_order(tensor: torch.Tensor) -> bool:
        return tensor.unsqueeze(2).is_contiguous(memory_format=torch.channels_last)

    with trainer.module_on_device():
        assert layer.weight.is_cuda
        assert in_order(layer.weight)
    with trainer.offloaded():
        pass
    assert in_order(layer.weight)
