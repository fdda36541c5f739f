"""The comparison of methods on a few real recordings."""

import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest

from layerwise.config import Config, resolve, with_options
from layerwise.errors import ConfigError, DataError, Interrupted, RunError
from layerwise.evaluate.compare import compare
from layerwise.evaluate.probe import probe
from layerwise.evaluate.results import EQUALLY_LONG, UNTRAINED, Comparison, load_comparison
from layerwise.events import Event, StepDone
from layerwise.run_store import RunState
from layerwise.stop import StopFlag

Tiny = Callable[..., Config]


OPTIONS = {"training.max_epochs": 1, "cache.keep": "needed"}


@pytest.fixture
def config(tiny_speech: Tiny, few_digits: Path) -> Config:
    return tiny_speech(f"fsdd:{few_digits}", **OPTIONS)


@dataclass(frozen=True)
class Compared:
    """A comparison and where it lies."""

    config: Config
    found: Comparison


@pytest.fixture(scope="module")
def undisturbed(
    few_digits: Path, tiny_options: dict[str, dict[str, object]], tmp_path_factory: pytest.TempPathFactory
) -> Compared:
    """All methods with seed 0; to be read, not changed."""
    folder = tmp_path_factory.mktemp("undisturbed")
    places = {"data.source": f"fsdd:{few_digits}", "out": str(folder / "run"), "cache.dir": str(folder / "cache")}
    config = resolve(overrides={**tiny_options["convolutions"], **places, **OPTIONS})
    return Compared(config, compare(config, "digit", seeds=[0]))


def test_every_method_is_trained_alike_and_probed_after_each_module(undisturbed: Compared) -> None:
    config, found = undisturbed.config, undisturbed.found
    assert [method.method for method in found.methods] == list(EQUALLY_LONG)
    out = Path(config.out)
    for method in found.methods:
        assert method.seeds == [0]
        assert [stage.stage for stage in method.stages] == [1, 2, 3, 4]
        assert all(0 <= stage.error_mean <= 1 for stage in method.stages)
        if method.method == UNTRAINED:
            continue
        assert method.peak_bytes > 0
        assert method.seconds > 0
        for seed in method.seeds:
            state = RunState.load(out / "runs" / method.method / f"seed-{seed}" / "run.json")
            assert {record.epochs for record in state.stages} == {1}
            assert len(state.stages) == (4 if method.method in ("greedy-infomax", "greedy-supervised") else 1)
    assert not list(Path(config.cache.dir).rglob("stage-*"))  # probed and freed
    assert {method.method for method in found.methods if method.disk_bytes} == {"greedy-infomax", "greedy-supervised"}


def test_the_errors_are_those_of_a_probe_of_the_run(config: Config) -> None:
    found = compare(config, "digit", seeds=[3], methods=["greedy-infomax", UNTRAINED])
    stages = probe(Path(config.out) / "runs" / "greedy-infomax" / "seed-3", "digit").stages
    greedy, untrained = found.outcomes
    assert greedy.errors == tuple(stage.error for stage in stages)
    assert untrained.errors == tuple(stage.untrained_error for stage in stages)


def test_the_file_keeps_the_contract(config: Config) -> None:
    found = compare(config, "digit", seeds=[0, 1], methods=["cpc"])
    tree = json.loads((Path(config.out) / "compare.json").read_text())
    assert (tree["label"], tree["epochs"], tree["finished"]) == ("digit", 1, True)
    (method,) = tree["methods"]
    assert method["seeds"] == [0, 1]
    assert method.keys() == {"method", "seeds", "peak_bytes", "disk_bytes", "seconds", "stages"}
    assert method["stages"][0].keys() == {"stage", "error_mean", "error_std"}
    first = [outcome.errors[0] for outcome in found.outcomes]
    assert method["stages"][0]["error_mean"] == pytest.approx(sum(first) / 2)
    assert method["stages"][0]["error_std"] == pytest.approx(abs(first[0] - first[1]) / 2**0.5)
    assert load_comparison(Path(config.out)) == found


def test_a_comparison_that_was_stopped_goes_on_and_does_nothing_twice(config: Config, undisturbed: Compared) -> None:
    methods = ["greedy-infomax", "cpc", UNTRAINED]
    stop, seen = StopFlag(), 0

    def stop_in_the_second_run(event: Event) -> None:
        nonlocal seen
        seen += isinstance(event, StepDone)
        if seen == 5:  # four stages of one step are the first run
            stop.reason = "the test"

    with pytest.raises(Interrupted):
        compare(config, "digit", seeds=[0], methods=methods, stop=stop, notify=stop_in_the_second_run)
    assert not load_comparison(Path(config.out)).finished
    told: list[str] = []
    found = compare(config, "digit", seeds=[0], methods=methods, tell=told.append)
    assert told == [f"{method}, seed 0" for method in methods if method != "greedy-infomax"]
    expected = {outcome.method: outcome.errors for outcome in undisturbed.found.outcomes}
    assert {outcome.method: outcome.errors for outcome in found.outcomes} == {name: expected[name] for name in methods}


def test_only_one_stage_at_a_time_is_held_to_the_budget(config: Config) -> None:
    config = with_options(config, {"net.context": 0, "training.stages": 3, "memory.gpu_mem": "2MB"})
    greedy, together = compare(config, "digit", seeds=[0], methods=["greedy-infomax", "cpc"]).methods
    assert greedy.peak_bytes <= 2_000_000
    assert together.peak_bytes > greedy.peak_bytes


def test_every_method_has_the_cut_that_the_budget_gave_greedy_infomax(config: Config) -> None:
    wide = {"net.width": 32, "net.context": 0, "training.stages": "fewest", "memory.gpu_mem": 200_000}
    config = with_options(config, wide)
    first = compare(config, "digit", seeds=[0], methods=["greedy-infomax"])
    assert 1 < len(first.cut) < 4  # neither the whole network nor its natural cut
    found = compare(config, "digit", seeds=[0], methods=[method for method in EQUALLY_LONG if method != UNTRAINED])
    assert found.cut == first.cut
    for method in ("greedy-infomax", "greedy-supervised"):
        state = RunState.load(Path(config.out) / "runs" / method / "seed-0" / "run.json")
        assert state.cut == first.cut
    assert {len(method.stages) for method in found.methods} == {len(first.cut)}


def test_what_cannot_be_compared_is_refused_before_anything_is_trained(config: Config) -> None:
    with pytest.raises(ConfigError, match=r"'gim' .*greedy-infomax"):
        compare(config, "digit", methods=["gim"])
    with pytest.raises(DataError, match="mood"):
        compare(config, "mood")
    assert not Path(config.out).exists()


def test_other_options_do_not_mix_with_those_of_before(config: Config) -> None:
    compare(config, "digit", seeds=[0], methods=[UNTRAINED])
    for key, before, now in [("training.max_epochs", 1, 3), ("memory.gpu_mem", "not given", 5_000_000)]:
        with pytest.raises(ConfigError, match=rf"{key}.* was {before} when .* and is {now} now"):
            compare(with_options(config, {key: now}), "digit", seeds=[0])
    compare(with_options(config, {"training.log": "tensorboard"}), "digit", seeds=[0], methods=[UNTRAINED])
    with pytest.raises(ConfigError, match="'digit', not 'speaker'"):
        compare(config, "speaker", seeds=[0])


def test_two_comparisons_of_one_name_do_not_meet(config: Config, tmp_path: Path) -> None:
    """Their caches lie under the name of the folder, each until its run has been probed."""
    outcomes = []
    for seed, parent in enumerate(("a", "b")):
        own = with_options(config, {"out": str(tmp_path / parent / "same")})
        outcomes += compare(own, "digit", seeds=[seed], methods=["greedy-infomax"]).outcomes
    assert [outcome.seed for outcome in outcomes] == [0, 1]
    assert not list(Path(config.cache.dir).rglob("stage-*"))


def test_a_kill_at_the_first_save_leaves_nothing_in_the_way(config: Config) -> None:
    out = Path(config.out)
    out.mkdir(parents=True)
    for name in ("lock", "config.toml", "compare.json.tmp"):
        (out / name).write_text("")
    assert compare(config, "digit", seeds=[0], methods=[UNTRAINED]).finished


def test_a_folder_of_something_else_is_left_alone(config: Config) -> None:
    Path(config.out).mkdir(parents=True)
    (Path(config.out) / "thesis.tex").write_text("the only copy")
    with pytest.raises(RunError, match=r"something else \(thesis.tex\)"):
        compare(config, "digit", seeds=[0], methods=[UNTRAINED])
    assert sorted(path.name for path in Path(config.out).iterdir()) == ["lock", "thesis.tex"]


def test_what_is_known_needs_no_run_directories(config: Config, undisturbed: Compared) -> None:
    shutil.copytree(undisturbed.config.out, config.out, ignore=shutil.ignore_patterns("runs"))
    assert compare(config, "digit", seeds=[0]).outcomes == undisturbed.found.outcomes


def test_methods_of_different_seeds_are_not_yet_a_comparison(config: Config) -> None:
    assert compare(config, "digit", seeds=[0], methods=[UNTRAINED]).finished
    assert not compare(config, "digit", seeds=[0, 1], methods=["cpc"]).finished
    assert compare(config, "digit", seeds=[1], methods=[UNTRAINED]).finished


def test_other_data_do_not_mix_with_those_of_before(tiny_speech: Tiny, few_digits: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(few_digits, tmp_path / "digits")
    config = tiny_speech(f"fsdd:{copy}", **{"training.max_epochs": 1})
    compare(config, "digit", seeds=[0], methods=[UNTRAINED])
    (copy / "1_lucas_5.wav").unlink()
    with pytest.raises(RunError, match=r"not the one that .* was begun on"):
        compare(config, "digit", seeds=[1], methods=[UNTRAINED])


@pytest.mark.usefixtures("small_demo")
def test_a_label_of_frames_is_not_for_supervised_methods(tiny_speech: Tiny) -> None:
    config = tiny_speech("demo", **{"data.sample_rate": 16000, "data.window": 3200})
    with pytest.raises(ConfigError, match=r"--label phone .* greedy-supervised and supervised"):
        compare(config, "phone", seeds=[0])
    assert not Path(config.out).exists()
    (untrained,) = compare(config, "phone", seeds=[0], methods=[UNTRAINED]).methods
    assert len(untrained.stages) == 4
