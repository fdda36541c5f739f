"""Whole runs with the other objectives and with all modules at once."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file

import layerwise
from layerwise.config import Config
from layerwise.encoder.export import export
from layerwise.engines.plan import plan
from layerwise.engines.run import run
from layerwise.errors import ConfigError, DataError, Interrupted
from layerwise.events import EpochDone, Event, StepDone
from layerwise.stop import StopFlag

Tiny = Callable[..., Config]

SUPERVISED = {"objective.name": "supervised", "objective.label": "digit"}
SIMULTANEOUS = {"training.schedule": "simultaneous"}


def bits(path: Path) -> dict[str, bytes]:
    return {name: value.tobytes() for name, value in load_file(path).items()}


def losses(config: Config) -> list[float]:
    """Training loss of each epoch of the first stage."""
    events: list[Event] = []
    run(config, notify=events.append)
    return [event.loss for event in events if isinstance(event, EpochDone) and event.stage == 1]


@pytest.mark.parametrize(
    "options",
    [SUPERVISED, {"objective.name": "hinge"}, SIMULTANEOUS, SUPERVISED | SIMULTANEOUS, {"training.input_noise": 0.2}],
)
def test_a_run_learns_and_resumes_to_the_same_bits(
    tiny_speech: Tiny, digits: Path, tmp_path: Path, options: dict[str, str]
) -> None:
    source = f"fsdd:{digits}"
    undisturbed = tiny_speech(source, out=str(tmp_path / "undisturbed"), **options)
    first, *_, last = losses(undisturbed)
    assert last < first

    config, seen, stop = tiny_speech(source, **options), 0, StopFlag()

    def stop_in_the_second_epoch(event: Event) -> None:
        nonlocal seen
        seen += isinstance(event, StepDone)
        if seen == 7:
            stop.reason = "the test"

    with pytest.raises(Interrupted, match="stage 1, epoch 2"):
        run(config, stop=stop, notify=stop_in_the_second_epoch)
    run(config)

    ours, theirs = (Path(each.out) / "encoder.safetensors" for each in (config, undisturbed))
    assert bits(ours) == bits(theirs)


def test_simultaneous_modules_are_isolated(tiny_speech: Tiny, digits: Path, tmp_path: Path) -> None:
    """What is above a module does not act on it: with the upper ones, or without them, it becomes the same."""
    source = f"fsdd:{digits}"
    whole = run(tiny_speech(source, **SIMULTANEOUS))
    shorter = {"net.kernels": (10, 8), "net.strides": (5, 4), "net.paddings": (2, 2), "net.context": 0}
    below = run(tiny_speech(source, out=str(tmp_path / "below"), **SIMULTANEOUS, **shorter))
    all_weights, lower = load_file(whole.paths.encoder), load_file(below.paths.encoder)
    # Which epoch's weights are kept depends on the loss of all modules, so the test must see both keep the last one.
    for result in (whole, below):
        history = [float(line.split('"held_out_loss": ')[1].split(",")[0]) for line in metrics(result.paths.metrics(1))]
        assert history[-1] == min(history)
    assert lower
    for name, value in lower.items():
        np.testing.assert_array_equal(value, all_weights[name], name)


def metrics(path: Path) -> list[str]:
    return path.read_text().splitlines()


def test_simultaneous_training_refuses_a_budget_and_a_plan(tiny_speech: Tiny, digits: Path) -> None:
    with pytest.raises(ConfigError, match=r"--gpu-mem .* simultaneous"):
        run(tiny_speech(f"fsdd:{digits}", **SIMULTANEOUS, **{"memory.gpu_mem": "1GB"}))
    with pytest.raises(ConfigError, match="simultaneous"):
        plan(tiny_speech(f"fsdd:{digits}", **SIMULTANEOUS))


def test_the_peak_of_all_at_once_holds_the_modules_below(tiny_speech: Tiny, digits: Path, tmp_path: Path) -> None:
    """Two schedules of one network: together it is on the device whole, whichever module is the largest."""
    for width in ({"net.width": 4, "net.context": 64}, {"net.width": 32, "net.context": 4}):
        options = {"training.max_epochs": 1, **width}
        one, all_of_them = (
            run(
                tiny_speech(f"fsdd:{digits}", out=str(tmp_path / f"{schedule}-{width['net.width']}"), **options, **more)
            )
            for schedule, more in (("sequential", {}), ("simultaneous", SIMULTANEOUS))
        )
        (together,) = (record.peak_bytes for record in all_of_them.state.stages)
        assert together > max(record.peak_bytes for record in one.state.stages)


@pytest.mark.parametrize("option", ["training.input_noise", "training.frame_dropout"])
def test_simultaneous_training_has_no_frozen_inputs_to_disturb(tiny_speech: Tiny, digits: Path, option: str) -> None:
    with pytest.raises(ConfigError, match=f"{option.split('.')[1]}.*simultaneous|simultaneous.*{option.split('.')[1]}"):
        tiny_speech(f"fsdd:{digits}", **SIMULTANEOUS, **{option: 0.1})


def test_an_encoder_that_was_trained_all_at_once_has_its_stages(
    tiny_speech: Tiny, digits: Path, tmp_path: Path
) -> None:
    result = run(tiny_speech(f"fsdd:{digits}", **SIMULTANEOUS))
    encoder = layerwise.load(result.paths.out)
    waveforms = torch.randn(2, 1600)
    stages = encoder.stages(waveforms)
    assert len(stages) == 4
    assert torch.equal(stages[-1], encoder(waveforms))
    for number, expected in enumerate(stages, start=1):
        assert torch.equal(layerwise.load(result.paths.out, stage=number)(waveforms), expected)
    card = (export(result.paths.out, tmp_path / "mine").folder / "README.md").read_text()
    assert "in 4 gradient-isolated stages, all at once" in card
    assert card.count(f"| {result.state.stages[0].best_loss:.4f} |") == 4


def test_a_supervised_run_needs_a_label_that_the_data_have(tiny_speech: Tiny, digits: Path) -> None:
    with pytest.raises(ConfigError, match="--label"):
        run(tiny_speech(f"fsdd:{digits}", **{"objective.name": "supervised"}))
    with pytest.raises(DataError, match=r"--label nobody: .*digit"):
        run(tiny_speech(f"fsdd:{digits}", **{"objective.name": "supervised", "objective.label": "nobody"}))
