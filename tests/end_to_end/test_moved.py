"""Run folders that are copied, moved, renamed, linked or made up: each deletes and believes its own files alone."""

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from records_edited import edited

from layerwise.config import Config
from layerwise.encoder.load import load
from layerwise.engines.run import RunResult, run
from layerwise.errors import CacheError, RunError
from layerwise.evaluate.probe import probe
from layerwise.events import Event, Message, StageStarted
from layerwise.files import exclusive
from layerwise.report.records import gather_run
from layerwise.run_store import RunState, RunStore, open_run
from layerwise.training.cache_retention import remove_caches

Tiny = Callable[..., Config]
Finished = Callable[[Config], RunResult]


@pytest.fixture
def config(tiny_speech: Tiny, few_digits: Path, tmp_path: Path, finished: Finished) -> Config:
    """Of a finished run in project/runs/one with its caches in project/cache/one."""
    project = tmp_path / "project"
    config = tiny_speech(f"fsdd:{few_digits}", **_places(project, "one"))
    finished(config)
    return config


def _places(project: Path, name: str) -> dict[str, str]:
    return {"out": str(project / "runs" / name), "cache.dir": str(project / "cache")}


def _moved(config: Config, project: Path, name: str) -> Config:
    """The same options for a run in another place."""
    places = _places(project, name)
    cache = config.cache.model_copy(update={"dir": places["cache.dir"]})
    return config.model_copy(update={"out": places["out"], "cache": cache})


def everything(folder: Path) -> dict[str, bytes]:
    """Every file below the folder."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def trained_stages_of(config: Config, **how: bool) -> list[int]:
    events: list[Event] = []
    run(config, notify=events.append, **how)
    return [event.stage for event in events if isinstance(event, StageStarted)]


def test_what_is_done_to_the_copy_of_a_project_leaves_the_original_as_it_was(config: Config, tmp_path: Path) -> None:
    project, copy = tmp_path / "project", tmp_path / "copy"
    before = everything(project)
    shutil.copytree(project, copy)
    assert remove_caches(copy / "runs" / "one", None) > 0
    assert not list((copy / "cache" / "one").glob("stage-*"))
    assert trained_stages_of(_moved(config, copy, "one")) == []
    assert RunState.load(copy / "runs" / "one" / "run.json").run_id != json.loads(before["runs/one/run.json"])["run_id"]
    run(_moved(config, copy, "one"), overwrite=True)
    assert everything(project) == before
    assert (copy / "cache/one/stage-4.h5").read_bytes() == before["cache/one/stage-4.h5"]


def test_a_copied_run_folder_has_no_part_in_the_caches_of_the_original(config: Config, tmp_path: Path) -> None:
    project = tmp_path / "project"
    shutil.copytree(project / "runs" / "one", project / "runs" / "two")
    before = {name: content for name, content in everything(project).items() if "two" not in name}
    with exclusive(project / "cache" / "one" / "lock", RunError("held"), 0):  # as while the original trains
        with pytest.raises(CacheError, match="cache/one holds caches and does not say that they are those of"):
            remove_caches(project / "runs" / "two", None)
        assert trained_stages_of(_moved(config, project, "two")) == []
        run(_moved(config, project, "two"), overwrite=True)
    after = everything(project)
    assert {name: content for name, content in after.items() if "two" not in name} == before
    assert after["cache/two/stage-4.h5"] == after["cache/one/stage-4.h5"]


def test_a_run_that_was_copied_with_its_caches_uses_the_copies(config: Config, tmp_path: Path) -> None:
    project = tmp_path / "project"
    before = everything(project)
    for folder in ("runs", "cache"):
        shutil.copytree(project / folder / "one", project / folder / "two")
    written = (project / "cache/two/stage-1.h5").stat().st_mtime_ns
    assert trained_stages_of(_moved(config, project, "two")) == []
    assert (project / "cache/two/stage-1.h5").stat().st_mtime_ns == written
    assert {name: content for name, content in everything(project).items() if "two" not in name} == before


def test_a_copy_leaves_the_caches_of_an_original_that_cannot_be_read(config: Config, tmp_path: Path) -> None:
    project = tmp_path / "project"
    shutil.copytree(project / "runs" / "one", project / "runs" / "two")
    (project / "runs" / "one" / "run.json").write_text("{")
    before = everything(project / "cache")
    with pytest.raises(CacheError, match="does not say that they are those of"):
        remove_caches(project / "runs" / "two", None)
    assert everything(project / "cache") == before


def test_copies_of_a_run_that_is_gone_are_each_a_run_of_its_own(config: Config, tmp_path: Path) -> None:
    runs = tmp_path / "project" / "runs"
    for name in ("two", "three"):
        shutil.copytree(runs / "one", runs / name)
    shutil.rmtree(runs / "one")
    for name in ("two", "three"):
        run(_moved(config, tmp_path / "project", name))
    ids = {name: RunState.load(runs / name / "run.json").run_id for name in ("two", "three")}
    assert ids["two"] != ids["three"]


def test_a_copy_of_hard_links_trains_beside_the_original(config: Config, tmp_path: Path) -> None:
    """As `cp -al` makes it."""
    project = tmp_path / "project"
    before = everything(project)
    for folder in ("runs", "cache"):
        shutil.copytree(project / folder / "one", project / folder / "two", copy_function=os.link)
    run(_moved(config, project, "two"), overwrite=True)
    with exclusive(project / "runs" / "two" / "lock", RunError("held"), 0):
        run(config)
    after = everything(project)
    assert all(after[name] == before[name] for name in before if name.endswith((".safetensors", ".h5")))


@pytest.mark.parametrize(("project", "name"), [("elsewhere", "one"), ("project", "renamed")])
def test_a_run_that_was_moved_or_renamed_finds_its_caches(
    config: Config, tmp_path: Path, project: str, name: str
) -> None:
    if project != "project":
        (tmp_path / "project").rename(tmp_path / project)
    (tmp_path / project / "runs" / "one").rename(tmp_path / project / "runs" / name)
    moved = _moved(config, tmp_path / project, name)
    store, state = open_run(Path(moved.out))
    assert store.caches == tmp_path / project / "cache" / "one"
    assert trained_stages_of(moved) == []
    assert open_run(Path(moved.out))[1].run_id == state.run_id
    assert remove_caches(Path(moved.out), None) > 0


def test_a_run_that_names_a_foreign_folder_as_its_own_deletes_nothing_there(config: Config, tmp_path: Path) -> None:
    foreign = tmp_path / "foreign"
    for name in ("stage-1.h5", "note"):
        (foreign / name).parent.mkdir(parents=True, exist_ok=True)
        (foreign / name).write_text("precious")
    store = RunStore.of(config.out, config.cache.dir)
    state = store.load_state()
    state.caches = os.path.relpath(foreign, store.out)
    store.save_state(state)
    before = everything(foreign)
    with pytest.raises(CacheError, match="foreign holds caches and does not say that they are those of"):
        remove_caches(store.out, None)
    run(config, overwrite=True)
    assert everything(foreign) == before


@pytest.mark.parametrize("name", ["stages", "stages/2", "rounds", "rounds/1", "probes", "plots"])
def test_nothing_is_written_or_deleted_behind_a_link(config: Config, tmp_path: Path, name: str) -> None:
    foreign, link = tmp_path / "foreign", Path(config.out) / name
    for each in ("weights.safetensors", "digit.json", "1/run.json", "run.json"):
        (foreign / each).parent.mkdir(parents=True, exist_ok=True)
        (foreign / each).write_text("precious")
    before = everything(foreign)
    shutil.rmtree(link, ignore_errors=True)
    link.parent.mkdir(exist_ok=True)
    link.symlink_to(foreign)
    for refused in (lambda: run(config), lambda: run(config, overwrite=True), lambda: probe(config.out, "digit")):
        with pytest.raises(RunError, match=f"{name} is a link"):
            refused()
    assert everything(foreign) == before


def test_a_users_notes_in_the_folders_of_a_run_survive_an_overwrite(config: Config) -> None:
    out = Path(config.out)
    notes = [out / place / "note.txt" for place in (".", "stages", "stages/1", "rounds/1", "rounds", "probes", "plots")]
    for note in notes:
        note.parent.mkdir(parents=True, exist_ok=True)
        note.write_text("mine")
    run(config, overwrite=True)
    assert [note.read_text() for note in notes] == ["mine"] * len(notes)


@pytest.fixture
def other(config: Config, tmp_path: Path, finished: Finished) -> Path:
    """The folder of a run with another seed, in project/runs/other."""
    training = config.training.model_copy(update={"seed": 7})
    seeded = config.model_copy(update={"training": training})
    return finished(_moved(seeded, tmp_path / "project", "other")).paths.out


def test_weights_of_another_run_are_refused_wherever_they_are_read(config: Config, other: Path) -> None:
    out = Path(config.out)
    shutil.copy(other / "stages/2/weights.safetensors", out / "stages/2/weights.safetensors")
    remove_caches(out, None)
    for use in (lambda: probe(out, "digit"), lambda: run(config)):
        with pytest.raises(RunError, match=r"stages/2/weights.safetensors does not hold the weights that this run"):
            use()


def test_a_cache_of_another_run_is_refused_and_no_probe_reads_it(config: Config, other: Path) -> None:
    own, foreign = (RunStore.of(out, config.cache.dir).cache(4) for out in (config.out, other))
    expected = probe(config.out, "digit")
    shutil.copy(foreign, own)
    told: list[object] = []
    assert probe(config.out, "digit", notify=told.append) == expected
    (warning,) = (each.text for each in told if isinstance(each, Message))
    assert "stage-4.h5 was not made by this run" in warning
    with pytest.raises(CacheError, match=r"stage-4\.h5 was not made by this run"):
        run(config)


def test_a_cache_of_which_nothing_was_recorded_is_not_believed(config: Config) -> None:
    with edited(Path(config.out) / "run.json") as state:
        state["stages"][3]["fingerprint"] = None
    with pytest.raises(CacheError, match=r"stage-4\.h5 was not made by this run"):
        run(config)


def test_an_encoder_of_another_run_is_refused(config: Config, other: Path) -> None:
    shutil.copy(other / "encoder.safetensors", Path(config.out) / "encoder.safetensors")
    with pytest.raises(RunError, match="is not the encoder that its run has written"):
        load(config.out)


def test_a_probe_of_another_run_is_not_reported(config: Config, other: Path) -> None:
    probe(other, "digit")
    (Path(config.out) / "probes").mkdir(exist_ok=True)
    shutil.copy(other / "probes/digit.json", Path(config.out) / "probes/digit.json")
    with pytest.raises(RunError, match=r"probes/digit.json tells of other weights than this run's"):
        gather_run(Path(config.out))


def test_a_flipped_letter_in_run_json_is_named(config: Config) -> None:
    path = Path(config.out) / "run.json"
    text = path.read_text()
    fingerprint = json.loads(text)["stages"][1]["fingerprint"]
    path.write_text(text.replace(fingerprint, fingerprint[::-1]))
    with pytest.raises(RunError, match=r"run.json is damaged: it does not hold what was written"):
        run(config)


@pytest.mark.parametrize(
    ("key", "value"),
    [("cut", [10**9]), ("run_id", "../../x"), ("budget_bytes", -1), ("device", 3), ("mood", 1), ("stages", [])],
)
def test_a_run_json_of_impossible_values_is_named(config: Config, key: str, value: object) -> None:
    with edited(Path(config.out) / "run.json") as tree:
        tree[key] = value
    with pytest.raises(RunError, match=r"run.json is damaged"):
        open_run(Path(config.out))


def test_a_stage_is_not_trained_above_the_weights_of_another_run(config: Config, other: Path) -> None:
    shutil.copy(other / "stages/2/weights.safetensors", Path(config.out) / "stages/2/weights.safetensors")
    events: list[Event] = []
    with pytest.raises(RunError, match=r"stages/2/weights.safetensors does not hold the weights that this run"):
        run(config, from_stage=4, notify=events.append)
    assert [event for event in events if isinstance(event, StageStarted)] == []
