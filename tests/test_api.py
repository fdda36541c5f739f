"""The Python API: own networks on own data, the same words as the command line, the same bits after a stop."""

import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file
from torch import nn

import layerwise
from layerwise.errors import ConfigError, Interrupted, RunError
from layerwise.stop import StopFlag

RNG = np.random.default_rng(0)
KINDS = ("low", "high")
STREAMS = [
    ((np.sin(np.arange(96)[:, None] * (0.2 + 0.4 * (n % 2))) + 0.2 * RNG.standard_normal((96, 2))), KINDS[n % 2])
    for n in range(24)
]


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(2, 8), nn.ReLU(), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 6))


SMALL = {"data.window": 24, "objective.steps": 2, "objective.negatives": 4, "cache.block": "4kB"}
Run = Callable[..., layerwise.RunResult]


@pytest.fixture
def run(tmp_path: Path) -> Run:
    """run(model, data, **others): a small run of steps in the test's own folder, without progress."""

    def run(model: Any = None, data: Any = STREAMS, out: str = "run", **others: Any) -> layerwise.RunResult:
        places = {"out": str(tmp_path / out), "cache_dir": str(tmp_path / "cache" / out)}
        asked = {"frames": "steps", "max_epochs": 2, "batch_size": 8, "options": SMALL, "notify": lambda event: None}
        return layerwise.run(network() if model is None else model, data, **{**places, **asked, **others})

    return run


def bits(result: layerwise.RunResult) -> dict[str, bytes]:
    return {name: value.tobytes() for name, value in load_file(result.paths.out / "encoder.safetensors").items()}


def test_an_own_network_on_own_data_is_trained_probed_and_loaded(run: Run) -> None:
    model = network()
    result = run(model, stages=2)
    assert [stage.status for stage in result.state.stages] == ["done", "done"]
    found = layerwise.probe(result.paths.out, "label", network=model, data=STREAMS)
    assert [stage.stage for stage in found.stages] == [1, 2]
    encoder = layerwise.load(result.paths.out, network=model)
    waves = torch.tensor(STREAMS[3][0], dtype=torch.float32)
    assert encoder(waves[None]).shape == (1, 96, 6)
    padded = torch.cat([waves[:50], torch.zeros(46, 2)])
    together = encoder(torch.stack([waves, padded]), lengths=[96, 50])
    assert torch.allclose(together[1, :50], encoder(waves[None, :50])[0], atol=1e-6)
    assert not together[1, 50:].any()


class OwnSet:
    """A DataSet of a user's own, of samples of 20 frames, with no field that may be left out."""

    takes, identity, columns, views, level = "arrays", "own", 1, 1, 1.0
    test, skipped, frame_label_names, frame_shape = None, (), (), (2,)
    ids = tuple(f"sample-{number}" for number in range(16))
    lengths = np.full(16, 20)
    labels = {"kind": np.array(["a", "b"] * 8)}  # noqa: RUF012

    def read(self, sample: int, start: int, stop: int, view: int = 0) -> torch.Tensor:
        return torch.randn(20, 2, generator=torch.Generator().manual_seed(sample))[start:stop] / self.level


@pytest.mark.parametrize("labels", [None, ""])
def test_a_data_set_of_a_users_own_needs_no_notes(run: Run, labels: str | None) -> None:
    model, data = network(), OwnSet()
    result = run(model, data, stages=1)
    assert layerwise.probe(result.paths.out, "kind", network=model, data=data, labels=labels).label == "kind"


class OwnWords(OwnSet):
    """Whole numbers, which it divides by its level."""

    frame_shape = (1,)

    def __init__(self) -> None:
        self.level = 2.0

    def read(self, sample: int, start: int, stop: int, view: int = 0) -> torch.Tensor:
        numbers = torch.Generator().manual_seed(sample)
        return torch.randint(1, 9, (20, 1), generator=numbers)[start:stop] / self.level


def test_a_network_of_ids_reads_whole_numbers_and_leaves_the_level_of_the_users_object(run: Run) -> None:
    data, embedding = OwnWords(), nn.Sequential(nn.Embedding(9, 8), nn.Flatten(), nn.Linear(8, 4))
    result = run(embedding, data, stages=1, options=SMALL | {"data.window": 12})
    assert data.level == 2.0
    assert layerwise.load(result.paths.out, network=embedding).entry.level == 1


def weights(model: nn.Module) -> dict[str, bytes]:
    return {name: value.numpy().tobytes() for name, value in model.state_dict().items()}


def test_a_model_has_the_trained_weights_after_a_run_and_after_one_that_finds_nothing_to_do(run: Run) -> None:
    model, before = network(), weights(network())
    result = run(model)
    trained = {
        name: value.numpy().tobytes() for name, value in layerwise.state_dict(result.paths.out, network=model).items()
    }
    assert weights(model) == trained
    assert all(trained[name] != before[name] for name in before)
    epochs: list[object] = []
    for again in (model, network(), other_weights()):
        run(again, on_epoch=epochs.append)
        assert weights(again) == trained
    assert not epochs
    assert bits(run(model, from_stage=1)) == bits(result)  # from the first weights, which the model has no more


def other_weights() -> nn.Module:
    """The network as an unseeded start would make it."""
    model = network()
    torch.manual_seed(99)
    for part in model:
        if isinstance(part, nn.Linear):
            part.reset_parameters()
    return model


def test_a_stop_leaves_the_model_and_a_network_of_other_weights_goes_on_with_those_of_the_run(run: Run) -> None:
    undisturbed, model, stop = run(out="whole"), network(), StopFlag()
    with pytest.raises(Interrupted):
        run(model, stop=stop, on_stage=lambda done: setattr(stop, "reason", "the test"))
    assert weights(model) == weights(network())
    said: list[object] = []
    assert bits(run(other_weights(), notify=said.append)) == bits(undisturbed)
    assert any("goes on from its own" in str(event) for event in said)


def test_a_kill_between_the_first_weights_and_run_json_leaves_a_folder_in_which_a_run_begins(
    run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With those that are given then; what the killed start has left of its own is gone."""
    undisturbed = run(out="whole")
    with monkeypatch.context() as patch:
        patch.setattr(layerwise.run_store.RunStore, "save_state", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            run(other_weights())
    out = undisturbed.paths.out.with_name("run")
    assert (out / "first_weights.safetensors").exists()
    assert not (out / "run.json").exists()
    (out / "first_weights.safetensors.tmp").write_text("half")
    again = run()
    assert bits(again) == bits(undisturbed)
    assert not list(out.glob("*.tmp"))


def test_first_weights_that_were_lost_or_spoilt_are_written_again_from_the_network(run: Run) -> None:
    kept, other = run().paths.first_weights, run(other_weights(), out="other").paths.first_weights
    before = kept.read_bytes()
    for spoilt in (None, other.read_bytes()):
        kept.unlink()
        if spoilt is not None:
            kept.write_bytes(spoilt)
        run()
        assert kept.read_bytes() == before
    shutil.copy(other, kept)
    with pytest.raises(RunError, match="does not hold the weights that its run was begun with"):
        run(other_weights())


def test_a_network_that_was_cut_hands_the_weights_to_its_model_and_starts_anew_from_them(run: Run) -> None:
    model = network()
    stages = layerwise.cut(model, torch.zeros(8, 2), stages=2)
    first = run(stages)
    assert weights(model) != weights(network())
    loaded = network()
    loaded.load_state_dict(layerwise.state_dict(first.paths.out, network=model))
    second = run(stages, out="second")
    third = run(layerwise.cut(loaded, torch.zeros(8, 2), stages=2), out="third")
    assert bits(third) == bits(second)


def test_a_network_of_ones_own_begins_with_what_another_run_has_learnt(run: Run) -> None:
    model, fresh = network(), other_weights()
    old = run(model, out="old")
    run(fresh, data=STREAMS[:16], warm_start=str(old.paths.out), lr=1e-12)
    for name, value in fresh.state_dict().items():
        torch.testing.assert_close(value, model.state_dict()[name], rtol=0, atol=1e-6)


def test_a_probe_takes_a_fresh_network_and_the_trained_one(run: Run) -> None:
    model = network()
    out = run(model, stages=2).paths.out
    trained = layerwise.cut(model, torch.zeros(8, 2))
    probed = [network(), model, trained, other_weights()]
    first, *others = [layerwise.probe(out, "label", network=each, data=STREAMS).stages for each in probed]
    assert others == [first] * 3
    with pytest.raises(RunError, match="not the one that"):
        layerwise.probe(out, "label", network=nn.Sequential(nn.Linear(2, 8), nn.Linear(8, 6)), data=STREAMS)


def test_the_untrained_column_of_a_warm_started_run_of_ones_own_network_is_the_same_whatever_weights_it_is_given_with(
    run: Run,
) -> None:
    old, model = run(out="old"), other_weights()
    out = run(model, warm_start=str(old.paths.out)).paths.out
    probed = [other_weights(), model, network()]
    first, *others = [layerwise.probe(out, "label", network=each, data=STREAMS).stages for each in probed]
    assert others == [first] * 2
    of_old = layerwise.probe(old.paths.out, "label", network=network(), data=STREAMS).stages
    assert [each.untrained_error for each in first] == [each.error for each in of_old]


def test_a_network_with_other_weights_loads_what_was_trained(run: Run) -> None:
    result = run()
    waves = torch.randn(1, 40, 2)
    torch.manual_seed(99)
    other = nn.Sequential(nn.Linear(2, 8), nn.ReLU(), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 6))
    expected = layerwise.load(result.paths.out, network=network())(waves)
    assert torch.equal(layerwise.load(result.paths.out, network=other)(waves), expected)
    with pytest.raises(ConfigError, match="not the one that"):
        layerwise.load(result.paths.out, network=nn.Sequential(nn.Linear(2, 8), nn.Linear(8, 6)))


def test_cut_makes_as_many_stages_as_asked_and_the_run_keeps_them(run: Run) -> None:
    stages = layerwise.cut(network(), torch.zeros(8, 2), stages=2)
    assert len(stages.natural_cut) == 2
    result = run(stages, gpu_mem="1GB")
    assert [len(result.state.stages), sum(result.state.cut)] == [2, 3]
    with pytest.raises(ConfigError, match="at most 3 stages"):
        layerwise.cut(network(), torch.zeros(8, 2), stages=9)


def sgd(parameters: Any) -> torch.optim.Optimizer:
    return torch.optim.SGD(parameters, lr=0.1, momentum=0.9, weight_decay=1e-4)


def halved(optimizer: torch.optim.Optimizer) -> torch.optim.lr_scheduler.LRScheduler:
    return torch.optim.lr_scheduler.StepLR(optimizer, 1, gamma=0.5)


OWN = {"optimizer": sgd, "schedule": halved, "max_epochs": 4, "stages": 2}


@pytest.mark.parametrize("where", ["device", "host"])
def test_an_own_optimizer_that_was_stopped_ends_with_the_bits_of_one_that_was_not(run: Run, where: str) -> None:
    options = SMALL | {"memory.optimizer": where, "training.checkpoint_seconds": 0}
    undisturbed = run(out="whole", **OWN, options=options)
    stop, steps = StopFlag(), iter(range(100))

    def stop_in_the_third_epoch(event: layerwise.Event) -> None:
        if type(event).__name__ == "StepDone" and next(steps) == 5:
            stop.reason = "the test"

    with pytest.raises(Interrupted):
        run(out="stopped", **OWN, options=options, stop=stop, notify=stop_in_the_third_epoch)
    assert bits(run(out="stopped", **OWN, options=options)) == bits(undisturbed)
    assert bits(run(out="adam", max_epochs=4, stages=2, options=options)) != bits(undisturbed)


def test_an_own_schedule_goes_on_where_more_epochs_are_asked_for(run: Run) -> None:
    own = OWN | {"stages": 1}
    run(out="further", **own | {"max_epochs": 2})
    assert bits(run(out="further", **own)) == bits(run(out="at-once", **own))


class Counting(torch.optim.SGD):
    """Counts in its group and in a plain number, as some optimizers from elsewhere do."""

    def step(self, closure: None = None) -> None:
        for group in self.param_groups:
            group["count"] = group.get("count", 0) + 1
            for parameter in group["params"]:
                self.state[parameter]["seen"] = self.state[parameter].get("seen", 0.0) + 0.1
            group["lr"] *= 0.9
        super().step()


def test_what_an_optimizer_counts_for_itself_survives_a_stop(run: Run) -> None:
    own = {"optimizer": lambda parameters: Counting(parameters, lr=0.1), "max_epochs": 3, "stages": 1}
    undisturbed, stop = run(out="whole", **own), StopFlag()
    with pytest.raises(Interrupted):
        run(out="stopped", **own, stop=stop, on_epoch=lambda done: setattr(stop, "reason", "the test"))
    assert bits(run(out="stopped", **own)) == bits(undisturbed)


def test_all_stages_at_once_take_the_optimizer_too(run: Run) -> None:
    at_once = {"stages": 2, "options": SMALL | {"training.schedule": "simultaneous"}}
    assert bits(run(out="sgd", optimizer=sgd, **at_once)) != bits(run(out="adam", **at_once))


def test_groups_of_an_optimizer_tell_it_from_others(run: Run) -> None:
    def decaying(decay: float) -> Any:
        return lambda parameters: torch.optim.SGD([{"params": parameters, "weight_decay": decay}], lr=0.1)

    run(optimizer=decaying(0.0), stages=1)
    with pytest.raises(RunError, match="The optimizer or its schedule is not the one"):
        run(optimizer=decaying(0.5), stages=1)


def test_another_optimizer_is_not_mixed_in(run: Run) -> None:
    stop = StopFlag()
    with pytest.raises(Interrupted):
        run(**OWN, stop=stop, on_stage=lambda done: setattr(stop, "reason", "the test"))
    for other in (
        {"optimizer": sgd},
        {"schedule": lambda optimizer: halved(optimizer), "optimizer": torch.optim.Adam},
        {},
    ):
        with pytest.raises(RunError, match="The optimizer or its schedule is not the one"):
            run(**{**OWN, "optimizer": None, "schedule": None, **other})


def test_the_memory_of_an_own_optimizer_is_planned(run: Run) -> None:
    wide = nn.Sequential(nn.Linear(2, 400), nn.ReLU(), nn.Linear(400, 400))
    lean, heavy = (
        run(wide, out=name, optimizer=lambda parameters, kind=kind: kind(parameters, lr=1e-3), stages=1, max_epochs=2)
        for name, kind in (("sgd", torch.optim.SGD), ("adam", torch.optim.AdamW))
    )
    trained = 4 * sum(parameter.numel() for parameter in wide.parameters())
    more = heavy.state.stages[0].train_peak_bytes - lean.state.stages[0].train_peak_bytes
    assert more >= 1.9 * trained
    with pytest.raises(layerwise.LayerwiseError, match="is too small: stage 1 needs"):
        budget = f"{lean.state.stages[0].train_peak_bytes // 1000 + 50}kB"
        options = SMALL | {"memory.optimizer": "device", "memory.micro_batch": 8, "memory.recompute": "never"}
        run(wide, out="small", optimizer=torch.optim.AdamW, stages=1, gpu_mem=budget, options=options)


def test_callbacks_are_told_of_epochs_and_stages(run: Run) -> None:
    epochs, stages = [], []
    run(
        stages=2,
        on_epoch=lambda done: epochs.append((done.stage, done.epoch)),
        on_stage=lambda done: stages.append(done.stage),
    )
    assert epochs == [(1, 1), (1, 2), (2, 1), (2, 2)]
    assert stages == [1, 2]


def test_a_plan_says_what_a_run_then_takes(run: Run) -> None:
    asked = {"frames": "steps", "batch_size": 8, "stages": 2, "options": SMALL}
    forecast = layerwise.plan(network(), STREAMS, **asked)
    result = run(stages=2)
    predicted = [stage.train_peak_bytes for stage in forecast.stages]
    measured = [stage.train_peak_bytes for stage in result.state.stages]
    assert predicted == pytest.approx(measured, rel=0.05)


def test_a_few_whole_samples_hold_two_out(run: Run) -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4))
    result = run(model, [torch.randn(4) for _ in range(8)], frames="whole", batch_size=4, stages=1)
    assert result.state.stages[0].best_loss > 0.1


def test_whole_samples_are_trained_with_renderings_of_each(run: Run) -> None:
    volumes = [torch.randn(1, 6, 8, 8) + n % 2 for n in range(20)]
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv3d(1, 4, 3, stride=2), nn.BatchNorm3d(4), nn.ReLU(), nn.Conv3d(4, 6, 2))
    result = run(model, volumes, frames="whole")
    assert result.config.objective.name == "ntxent"
    assert layerwise.load(result.paths.out, network=model)(torch.stack(volumes[:2])).shape == (2, 1, 6)


def test_objects_cannot_go_to_other_processes(run: Run) -> None:
    for given in ({}, {"model": "speech", "stages": 1}):
        with pytest.raises(ConfigError, match=r"given as an object, which other processes cannot know"):
            run(**given, devices="cpu,cpu")


@pytest.mark.parametrize(
    ("asked", "complaint"),
    [
        ({"gpu_memory": "4GB"}, r"no option gpu_memory; .*Did you mean gpu_mem"),
        ({"objective": "ntxent", "views": 2, "batch_size": 7}, "multiple of 2"),
        ({"objective": "ntxent"}, "compares 2 views"),
        ({"frames": "whole", "objective": "infonce"}, "frames whole makes one of each sample"),
        ({"schedule": halved}, "give optimizer= too"),
        ({"model": nn.Linear}, "The network is the class Linear"),
        ({"optimizer": lambda parameters: "sgd"}, "they give str and NoneType"),
        ({"optimizer": lambda parameters: 1 / 0}, "cannot be used"),
        ({"optimizer": torch.optim.LBFGS}, "steps by gradients alone"),
        ({"optimizer": sgd, "schedule": torch.optim.lr_scheduler.ReduceLROnPlateau}, "needs no metric"),
    ],
)
def test_a_request_that_cannot_be_met_is_refused_and_leaves_nothing(
    run: Run, tmp_path: Path, asked: dict[str, Any], complaint: str
) -> None:
    with pytest.raises(ConfigError, match=complaint):
        run(**asked)
    assert not (tmp_path / "run").exists()


def test_ctrl_c_is_an_exception_and_never_the_end_of_the_process(tmp_path: Path) -> None:
    script = """
import signal, numpy as np, torch, layerwise
def interrupt(done): signal.raise_signal(signal.SIGINT)
data, options = [np.random.default_rng(n).normal(size=(40, 2)) for n in range(12)], {"data.window": 20, "objective.steps": 2}
try:
    layerwise.run(torch.nn.Linear(2, 4), data, frames="steps", max_epochs=3, out="run", on_epoch=interrupt, options=options)
except layerwise.LayerwiseError as error:
    print(type(error).__name__, "and on")
"""
    done = subprocess.run([sys.executable, "-c", script], cwd=tmp_path, capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "Interrupted and on"
