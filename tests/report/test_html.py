"""The report as a file: what it holds, that it needs nothing else, and what it does with unfinished and hostile input."""

import re
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
from matplotlib.axes import Axes
from PIL import Image
from records_edited import edited
from small_report import HOSTILE, METHODS, add_confusion, outcome

from layerwise.errors import RunError
from layerwise.records import write_record
from layerwise.report.drawing import PALETTE, PERCENT, styled
from layerwise.report.figures import draw_probe
from layerwise.report.html import write_report
from layerwise.report.tables import no_better
from layerwise.run_store import ProbeResult, RunState, open_run
from layerwise.run_store.state import Baseline, StageError


def titles(page: str) -> list[str]:
    return re.findall(r"<figure>\s*<h[23]>(.*?)</h[23]>", page)


def test_a_report_of_a_run_shows_everything(run_report: Path) -> None:
    page = run_report.read_text()
    assert titles(page) == [
        "Error: digit",
        "Error: speaker",
        "Device memory",
        "Loss",
        "Confusion: digit",
        "Confusion: speaker",
        "Activation caches",
    ]
    assert page.count("reached max epochs (2)") == 4
    assert "of a budget of 5 MB" in page
    assert "in all of a budget of 20 MB" in page
    assert "kernels = [" in page  # the configuration
    assert "<dt>torch</dt>" in page
    assert "not finished" not in page
    for name in ("losses", "memory", "errors-digit", "errors-speaker", "confusion-digit", "caches"):
        assert (run_report.parent / "plots" / f"{name}.svg").read_text().startswith("<?xml")
        with Image.open(run_report.parent / "plots" / f"{name}.png") as picture:
            assert min(picture.size) > 300


def test_a_report_needs_nothing_from_anywhere(run_report: Path) -> None:
    page = run_report.read_text()
    assert "default-src 'none'" in page
    assert not re.search(r"<(script|link[^>]+stylesheet|img|iframe|object)", page)
    assert set(re.findall(r'(?:src|href)="([^#"]+)', page)) == {"data:,"}


def test_the_same_run_gives_the_same_report(run_directory: Path) -> None:
    def files() -> dict[str, bytes]:
        report = write_report(run_directory)
        return {path.name: path.read_bytes() for path in (report, *(run_directory / "plots").iterdir())}

    assert files() == files()


def test_ids_are_used_once(comparison_report: Path) -> None:
    page = comparison_report.read_text()
    ids = re.findall(r'\bid="([^"]+)"', page)
    assert len(ids) == len(set(ids))
    assert set(re.findall(r'href="#([^"]+)"|url\(#([^)]+)\)', page)) != set()
    assert {one or other for one, other in re.findall(r'href="#([^"]+)"|url\(#([^)]+)\)', page)} <= set(ids)


def test_a_report_of_a_comparison_shows_every_method(comparison_report: Path) -> None:
    folder, page = comparison_report.parent, comparison_report.read_text()
    assert titles(page)[:2] == ["Error per module: digit", "Cost"]
    for method in METHODS:
        assert f"<td>{method}</td>" in page
    assert "40.0 ± 1.0" in page
    assert page.count("<strong>") == 2  # the methods that have a run
    assert "not finished" not in page
    assert (folder / "plots" / "errors.svg").exists()
    assert (folder / "runs" / "greedy-infomax" / "seed-0" / "plots" / "memory.png").exists()


def test_one_seed_has_no_spread(comparison_directory: Callable[..., Path]) -> None:
    page = write_report(comparison_directory(cut=[4], outcomes=[outcome("cpc", 3, [0.4])])).read_text()
    assert "1 method on the same" in page
    assert '<td class="n">40.0</td>' in page


def test_seeds_that_not_every_method_has_are_not_claimed(comparison_directory: Callable[..., Path]) -> None:
    both = [outcome(name, seed, [0.4]) for name, seeds in (("cpc", (0, 1, 2)), ("untrained", (0,))) for seed in seeds]
    page = write_report(comparison_directory(cut=[4], outcomes=both)).read_text()
    assert "line: mean of 1 to 3 seeds" in page


def test_the_error_of_nearest_neighbours_is_called_theirs(run_directory: Path) -> None:
    with edited(run_directory / "probes" / "digit.json") as probe:
        probe["classifier"] = "knn"
    page = write_report(run_directory).read_text()
    assert "Error of a knn probe" in page
    assert "Error of a linear probe" in page  # the speakers'


def test_a_cache_that_was_deleted_by_hand_is_not_drawn(run_directory: Path) -> None:
    open_run(run_directory)[0].cache(2).unlink()
    assert "Stages without a cache now: 2." in write_report(run_directory).read_text()


def test_an_unfinished_comparison_says_so(comparison_directory: Callable[..., Path]) -> None:
    folder = comparison_directory(finished=False, cut=[4], outcomes=[outcome("cpc", 0, [0.4])])
    page = write_report(folder).read_text()
    assert "This comparison is not finished" in page
    assert "<td>cpc</td>" in page
    with edited(folder / "compare.json") as tree:
        tree["outcomes"] = []
    page = write_report(folder).read_text()
    assert "This comparison is not finished" in page
    assert titles(page) == []


def test_an_unfinished_run_says_how_far_it_is(run_directory: Path) -> None:
    state = RunState.load(run_directory / "run.json")
    state.record(3).status, state.record(4).status = "training", "pending"
    state.save(run_directory / "run.json")
    with (run_directory / "stages" / "3" / "memory.jsonl").open("a") as file:
        file.write('{"seconds": 1')  # torn by a kill
    assert "not finished: 2 of 4 stages are done, and it is stopped" in write_report(run_directory).read_text()


def test_records_that_are_there_no_more_are_named(run_directory: Path) -> None:
    assert "Missing" not in write_report(run_directory).read_text()
    missing = run_directory / "stages" / "1" / "metrics.jsonl"
    missing.unlink()
    assert f"Missing, and so not drawn: {missing}." in write_report(run_directory).read_text()


def test_a_run_that_has_hardly_begun_has_a_report(run_directory: Path) -> None:
    for path in [run_directory / "config.toml", run_directory / "machine.json", *run_directory.glob("probes/*")]:
        path.unlink()
    for path in run_directory.glob("stages/*/*.jsonl"):
        path.unlink()
    with edited(run_directory / "run.json") as state:
        state["stages"] = [{"stage": stage["stage"]} for stage in state["stages"]]
    page = write_report(run_directory).read_text()
    assert titles(page) == []
    assert "0 of 4 stages are done" in page
    assert "Unknown: the run did not record it." in page
    assert "No probe has been run yet" in page


def test_what_comes_from_files_is_escaped(run_directory: Path) -> None:
    with edited(run_directory / "run.json") as state:
        state["config"]["out"] = HOSTILE
    write_record(run_directory / "machine.json", {"cpu": HOSTILE, "memory_bytes": HOSTILE, "gpu": None})
    (run_directory / "probes" / "digit.json").rename(run_directory / "probes" / "<b>$.json")
    page = write_report(run_directory).read_text()
    assert "<script" not in page
    assert "<b>" not in page
    assert page.count("&lt;script&gt;") == 5  # the option, twice in the machine, and the class on both axes


def test_an_error_of_zero_is_drawn_at_zero() -> None:
    axes = drawn_errors((0.5, 0.0), (0.02, 0.1))
    assert axes.get_ylim()[0] == 0
    assert axes.lines[0].get_ydata()[1] == 0
    ticks = [tick for tick in axes.get_yticks() if tick <= axes.get_ylim()[1]]
    assert [PERCENT(tick) for tick in ticks] == ["0 %", "2 %", "5 %", "10 %", "20 %", "50 %"]


def test_the_axis_of_a_single_module_names_it_alone() -> None:
    axes = drawn_errors((0.5,), (0.8,))
    low, high = axes.get_xlim()
    assert [tick for tick in axes.get_xticks() if low <= tick <= high] == [1]


def drawn_errors(trained: Sequence[float], untrained: Sequence[float]) -> Axes:
    with styled():
        return draw_probe(probed(trained, untrained)).figure.axes[0]


def probed(trained: Sequence[float], untrained: Sequence[float], baseline: float | None = None) -> ProbeResult:
    pairs = enumerate(zip(trained, untrained, strict=True), start=1)
    stages = [StageError(stage, *errors, train=9, test=9, confusion=None, weights="0" * 64) for stage, errors in pairs]
    others = None if baseline is None else Baseline("mel bands", baseline, "0" * 64)
    return ProbeResult("digit", stages, 0, "linear", baseline=others)


@pytest.mark.parametrize(
    ("result", "said"),
    [
        (probed((0.5, 0.2), (0.5, 0.3)), None),
        (probed((0.5, 0.2), (0.5, 0.3), 0.25), None),
        (probed((0.1, 0.2), (0.5, 0.3), 0.2), "Module 2 tells digit no better than mel bands."),
        (
            probed((0.2, 0.4), (0.3, 0.3), 0.2),
            "Module 2 tells digit no better than the same network with random weights and than mel bands.",
        ),
    ],
)
def test_features_that_are_not_worth_their_training_are_called_so(result: ProbeResult, said: str | None) -> None:
    assert no_better(result) == said


def test_the_results_stand_above_everything_else(run_report: Path) -> None:
    page = run_report.read_text()
    for name in ("error, digit", "error, speaker", "device peak", "time", "caches"):
        assert 0 < page.index(f"<dt>{name}</dt>") < page.index("<h2>")


def test_of_many_classes_the_most_confused_are_shown(run_directory: Path) -> None:
    add_confusion(run_directory / "probes" / "digit.json", [f"class {number}" for number in range(200)])
    page = write_report(run_directory).read_text()
    assert "The 30 classes with the most errors of 200." in page
    assert "class 199" in page
    assert "class 42<" not in page


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("probes/digit.json", '{"label": "digit", "stages": []}'),
        ("probes/digit.json", "[]"),
        ("stages/1/metrics.jsonl", '{"epoch": 1}\n'),
        ("stages/1/memory.jsonl", '{"seconds": "long"}\n'),
        ("machine.json", "[]"),
        ("compare.json", "{}"),
        ("compare.json", '{"label": "digit", "epochs": 2, "data_identity": "", "cut": [1], "outcomes": ["cpc"]}'),
        ("run.json", "{"),
    ],
)
def test_a_damaged_file_is_named(run_directory: Path, name: str, content: str) -> None:
    (run_directory / name).write_text(content)
    with pytest.raises(RunError, match=f"{name} is damaged"):
        write_report(run_directory)


def test_a_folder_that_is_neither_is_named(tmp_path: Path) -> None:
    with pytest.raises(RunError, match=r"is neither a run directory \(it holds no run.json\) nor a comparison"):
        write_report(tmp_path)
    with pytest.raises(RunError, match="There is no run directory"):
        write_report(tmp_path / "missing")


def luminance(color: str) -> float:
    parts = [int(color[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    linear = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def contrast(one: str, other: str) -> float:
    darker, lighter = sorted((luminance(one), luminance(other)))
    return (lighter + 0.05) / (darker + 0.05)


def test_lines_stand_out_in_light_and_dark(run_report: Path) -> None:
    page = run_report.read_text()
    light, dark = re.findall(r":root \{(.*?)\}", page, flags=re.DOTALL)
    for theme in (light, dark):
        colors = dict(re.findall(r"--(\w+): (#\w{6});", theme))
        assert all(contrast(colors[f"c{number}"], colors["raised"]) >= 3 for number in range(len(PALETTE)))
        assert all(contrast(colors[name], colors["raised"]) >= 4.5 for name in ("ink", "quiet"))
    assert [color for name, color in re.findall(r"--(c\d): (#\w{6});", light)] == list(PALETTE)
