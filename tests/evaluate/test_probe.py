"""The probe tells what can be told, and nothing else."""

import tracemalloc
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from sklearn.linear_model import LogisticRegression

from layerwise.config import Config, resolve
from layerwise.data.open import open_data
from layerwise.data.source import DataSet
from layerwise.errors import Interrupted
from layerwise.evaluate import classifiers as linear
from layerwise.evaluate import classifiers as nearest
from layerwise.evaluate import examples as examples_file
from layerwise.evaluate.classifiers import fit_and_test
from layerwise.evaluate.examples import Examples, FeatureRows, Parts
from layerwise.evaluate.features import SampleSummary, features_under_budget
from layerwise.evaluate.targets import (
    FRAMES_PER_SAMPLE,
    ProbeTargets,
    ProbeTask,
    choose_frames,
    probe_targets,
    probe_task,
)
from layerwise.memory.meter import Meter
from layerwise.nets import build_network, shortest_sample
from layerwise.stop import StopFlag
from layerwise.training.forward import OutputFormat, random_stages
from layerwise.training.spec import StageSpec, stage_specs


@pytest.fixture
def ask(tmp_path: Path) -> Callable[..., float]:
    """The error of a classifier; half of the rows train, a quarter is held out."""

    def ask(features: np.ndarray, classes: np.ndarray, classifier: str = "linear") -> float:
        return fit_and_test(stored(features, tmp_path), targets_of(classes), classifier)[0]

    return ask


def stored(features: np.ndarray, folder: Path) -> FeatureRows:
    file = FeatureRows(folder)
    for rows in np.array_split(features, 7):
        file.append(rows)
    return file


def targets_of(classes: np.ndarray) -> ProbeTargets:
    count = len(classes)
    names = tuple(f"class {number}" for number in range(int(classes.max()) + 1))
    return ProbeTargets(names, classes, Parts.of(count // 2, count // 4, count - count // 2 - count // 4))


def blobs(count: int, channels: int = 12, spread: float = 2.5) -> tuple[np.ndarray, np.ndarray]:
    """Five overlapping classes, in channels that depend on each other."""
    rng = np.random.default_rng(0)
    classes = rng.integers(0, 5, count)
    centres, mixing = rng.standard_normal((5, channels)), rng.standard_normal((channels, channels))
    return ((centres[classes] + spread * rng.standard_normal((count, channels))) @ mixing).astype(np.float32), classes


def test_separable_classes_are_told_apart_at_any_scale(ask: Callable[..., float]) -> None:
    rng = np.random.default_rng(0)
    classes = rng.integers(0, 3, 400)
    features = np.eye(3)[classes] + 0.05 * rng.standard_normal((400, 3))
    features = (features * [1e-4, 1, 1e4] + [5, -1e3, 7]).astype(np.float32)
    assert ask(features, classes) == 0


def test_noise_is_not_told_apart(ask: Callable[..., float]) -> None:
    rng = np.random.default_rng(0)
    classes = rng.integers(0, 4, 4000)
    features = rng.standard_normal((4000, 8)).astype(np.float32)
    assert ask(features, classes) == pytest.approx(0.75, abs=0.05)


def test_dead_channels_do_no_harm(ask: Callable[..., float]) -> None:
    rng = np.random.default_rng(0)
    classes = rng.integers(0, 2, 200)
    features = np.stack([classes + 0.01 * rng.standard_normal(200), np.zeros(200), np.full(200, 3.0)], 1)
    assert ask(features.astype(np.float32), classes) == 0


def test_many_useless_channels_are_held_down_by_the_penalty(ask: Callable[..., float]) -> None:
    rng = np.random.default_rng(0)
    classes = rng.integers(0, 2, 400)
    features = rng.standard_normal((400, 150)).astype(np.float32)
    features[:, 0] += 4 * classes
    assert ask(features, classes) < 0.15


@pytest.mark.parametrize("classifier", ["linear", "knn"])
def test_what_overlaps_is_told_apart_as_well_as_it_can_be(ask: Callable[..., float], classifier: str) -> None:
    features, classes = blobs(4000, spread=0.3)
    assert ask(features, classes, classifier) < 0.01
    features, classes = blobs(4000)
    assert 0.2 < ask(features, classes, classifier) < 0.6


def test_channels_that_say_nearly_the_same_do_no_harm(ask: Callable[..., float]) -> None:
    rng = np.random.default_rng(0)
    classes = np.arange(900) % 2
    signal = rng.standard_normal((900, 1)) + 1e-3 * (2 * classes[:, None] - 1) * rng.uniform(size=(1, 512))
    assert ask(signal.astype(np.float32), classes) < 0.1


def test_neighbours_tell_what_no_line_can(ask: Callable[..., float]) -> None:
    rng = np.random.default_rng(0)
    features = rng.standard_normal((3000, 2)).astype(np.float32)
    classes = (features[:, 0] * features[:, 1] > 0).astype(np.int64)
    assert ask(features, classes) > 0.4
    assert ask(features, classes, "knn") < 0.05


@pytest.mark.parametrize("block", [linear.BLOCK, 5])
def test_scikit_learn_is_of_the_same_opinion(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, block: int) -> None:
    monkeypatch.setattr(linear, "BLOCK", block)
    features, classes = blobs(6000)
    examples = Examples(stored(features, tmp_path), classes, targets_of(classes).parts)
    ours = linear.linear_predictions(examples)
    x = torch.cat([x for x, _ in examples.pieces(range(6000))]).numpy()
    train, test = slice(0, 4500), slice(4500, 6000)
    theirs = LogisticRegression(C=1 / (2 * 4500 * 1e-4), max_iter=1000).fit(x[train], classes[train]).predict(x[test])
    assert (ours != classes[test]).mean() == pytest.approx((theirs != classes[test]).mean(), abs=0.01)
    assert (ours == theirs).mean() > 0.97


def test_scikit_learn_is_of_the_same_opinion_on_spoken_digits(fsdd: Path, tmp_path: Path) -> None:
    config = resolve(overrides={"data.source": f"fsdd:{fsdd}", "net.width": 16, "net.context": 16})
    data = open_data(config.data, shortest_sample(config))
    network = build_network(config.net, data.frame_shape)
    plans = stage_specs(config, data, network, network.natural_ranges)[:2]
    task = probe_task("digit", data, config)
    stages = random_stages(plans, [OutputFormat.of(config)] * 2, 0)
    (_, features), _ = features_under_budget(config, task, stages, tmp_path, StopFlag())
    right = probe_targets(task, plans[1])
    examples = Examples(features, right.classes, right.parts)
    ours = linear.linear_predictions(examples)
    x = torch.cat([x for x, _ in examples.pieces(range(features.rows))]).numpy()
    fitted, test = right.parts.fitted, right.parts.test
    known, wanted = right.classes[: fitted.stop], right.classes[test.start :]
    errors = [
        (
            LogisticRegression(C=1 / (2 * len(fitted) * penalty), max_iter=2000)
            .fit(x[: fitted.stop], known)
            .predict(x[test.start :])
            != wanted
        ).mean()
        for penalty in linear.PENALTIES
    ]
    assert min(abs((ours != wanted).mean() - error) for error in errors) <= 0.01
    assert (ours != wanted).mean() < 0.75  # chance is 0.9: the labels belong to the features
    assert (ours != wanted).mean() <= min(errors) + 0.03  # the penalty is well chosen, too


def test_where_few_rows_are_held_out_each_known_row_is_held_out_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(examples_file, "PIECE_BYTES", 4 * 12 * 7)
    features, classes = blobs(90)
    examples = Examples(stored(features, tmp_path), classes, Parts.of(50, 11, 29))
    x, y = (torch.cat(pieces) for pieces in zip(*examples.pieces(examples.parts.fitted), strict=True))
    trials = linear._trials(examples.parts)
    held_out = torch.zeros(61, dtype=torch.int64)
    for trial in trials:
        for rows in (trial.fitted, trial.held_out):
            found = [torch.cat(pieces) for pieces in zip(*examples.pieces(rows), strict=True)]
            numbers = torch.cat([row == x for row in found[0].split(1)]).view(-1, 61, 12).all(2).nonzero()[:, 1]
            assert len(numbers) == len(rows)
            assert found[1].equal(y[numbers])
            held_out[numbers] += 1 if rows is trial.held_out else 100
    assert held_out.tolist() == [301] * 61
    assert len(linear._trials(Parts.of(900, linear.FEWEST_HELD_OUT, 30))) == 1


@pytest.mark.parametrize("classifier", ["linear", "knn"])
def test_pieces_of_the_features_give_what_all_at_once_gives(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, classifier: str
) -> None:
    features, classes = blobs(2000)
    whole, of_whole = fit_and_test(stored(features, tmp_path), targets_of(classes), classifier)
    monkeypatch.setattr(examples_file, "PIECE_BYTES", 4 * 12 * 300)
    monkeypatch.setattr(examples_file, "KEPT_BYTES", 0)
    monkeypatch.setattr(nearest, "QUERY_ROWS", 70)
    pieces, of_pieces = fit_and_test(stored(features, tmp_path), targets_of(classes), classifier)
    assert pieces == pytest.approx(whole, abs=0.004)
    assert np.abs(np.array(of_pieces.counts) - np.array(of_whole.counts)).sum() <= 4


@pytest.mark.parametrize("classifier", ["linear", "knn"])
def test_many_times_the_rows_take_no_more_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, classifier: str
) -> None:
    monkeypatch.setattr(examples_file, "PIECE_BYTES", 2**18)
    monkeypatch.setattr(examples_file, "KEPT_BYTES", 2**18)
    monkeypatch.setattr(linear, "ITERATIONS", 3)

    def taken(count: int) -> int:
        """Bytes of arrays and of tensors at their highest points, beside the classes."""
        features, classes = blobs(count, channels=64)
        file = stored(features, tmp_path)
        targets = targets_of(classes)
        del features
        tracemalloc.start()
        with Meter(torch.device("cpu")) as meter:
            fit_and_test(file, targets, classifier)
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        return peak + meter.peak - 16 * count  # the classes are an array, and a tensor that shares it

    taken(400)  # the first fit of a process imports the optimizer
    assert taken(20_000) < 1.2 * taken(4000)


@pytest.mark.parametrize("classifier", ["linear", "knn"])
def test_a_probe_can_be_stopped_while_it_fits(classifier: str, tmp_path: Path) -> None:
    features, classes = blobs(400)
    asked, stop = 0, StopFlag()

    def poll() -> None:
        nonlocal asked
        asked += 1
        if asked == 4:  # two pieces for the statistics, then the classifier's own
            stop.reason = "the test"
        stop.raise_if_set("in the probe")

    with pytest.raises(Interrupted, match="in the probe"):
        fit_and_test(stored(features, tmp_path), targets_of(classes), classifier, poll)
    assert asked == 4


def test_a_confusion_matrix_counts_what_was_taken_for_what(tmp_path: Path) -> None:
    features, classes = blobs(4000)
    error, confusion = fit_and_test(stored(features, tmp_path), targets_of(classes), "linear")
    counts = np.array(confusion.counts)
    assert counts.sum(1).tolist() == np.bincount(classes[3000:]).tolist()
    assert 1 - np.trace(counts) / 1000 == pytest.approx(error)
    assert confusion.classes[0] == "class 0"


def test_a_matrix_that_nobody_could_read_is_left_out(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    classes = np.concatenate([np.arange(200)] * 8)
    _, confusion = fit_and_test(
        stored(rng.standard_normal((1600, 4)).astype(np.float32), tmp_path), targets_of(classes), "knn"
    )
    assert confusion is None


@pytest.fixture
def task_on(
    planned_stages: Callable[..., tuple[Config, list[StageSpec]]], noise_data: Callable[[Config], DataSet]
) -> Callable[..., ProbeTask]:
    """task_on("speech" or "vision", grid, per_frame=False, whole=False): on samples of noise."""

    def task_on(kind: str, grid: int, per_frame: bool = False, whole: bool = False) -> ProbeTask:
        data = noise_data(planned_stages(kind)[0])
        return ProbeTask("label", data, per_frame, np.arange(1), np.zeros(1, dtype=np.uint8), grid, whole)

    return task_on


@pytest.mark.parametrize("grid", [1, 2, 4])
def test_a_summary_pools_as_torch_does_and_does_not_depend_on_the_pieces(
    task_on: Callable[..., ProbeTask], grid: int
) -> None:
    task = task_on("vision", grid)
    columns = task.data.columns
    frames = torch.randn(columns**2, 3, 2, 2)  # of which a patch counts as one vector
    means = frames.mean((2, 3)).unflatten(0, (-1, columns)).permute(2, 0, 1)
    for pieces in ([len(frames)], [1, 6, 0, 5, len(frames) - 12]):
        summary = SampleSummary(task, 0, len(frames))
        for piece in frames.split(pieces):
            summary.add(piece)
        pooled = F.adaptive_avg_pool2d(means, grid).flatten(1).T
        assert np.allclose(summary.features(), pooled.reshape(1, -1), atol=1e-6)


def test_a_sample_of_one_frame_is_pooled_over_its_positions(task_on: Callable[..., ProbeTask]) -> None:
    for positions, pool in (
        ((5,), F.adaptive_avg_pool1d),
        ((7, 5), F.adaptive_avg_pool2d),
        ((4, 5, 3), F.adaptive_avg_pool3d),
    ):
        frame = torch.randn(1, 6, *positions)
        summary = SampleSummary(task_on("speech", 2, whole=True), 0, 1)
        summary.add(frame)
        assert np.allclose(summary.features(), pool(frame, 2).flatten(2).mT.reshape(1, -1), atol=1e-6)


@pytest.mark.parametrize("length", [1, 3, 9])
def test_a_sequence_has_as_many_cells_as_others_however_short_it_is(
    task_on: Callable[..., ProbeTask], length: int
) -> None:
    frames = torch.randn(length, 3)
    summary = SampleSummary(task_on("speech", 4), 0, length)
    for piece in frames.split(2):
        summary.add(piece)
    assert np.allclose(summary.features(), F.adaptive_avg_pool1d(frames.T, 4).T.reshape(1, -1), atol=1e-6)


def test_a_probe_of_frames_keeps_the_chosen_ones(task_on: Callable[..., ProbeTask]) -> None:
    frames = torch.arange(600, dtype=torch.float32).reshape(200, 3)
    summary = SampleSummary(task_on("speech", 1, per_frame=True), 4, 200)
    for piece in frames.split([1, 60, 0, 50, 89]):
        summary.add(piece)
    assert np.array_equal(summary.features(), frames[choose_frames(4, 200, True)].numpy())


def test_chosen_frames_are_the_same_for_every_encoder_and_bounded() -> None:
    assert np.array_equal(choose_frames(3, 100, True), choose_frames(3, 100, True))
    assert len(choose_frames(3, 10_000, True)) == FRAMES_PER_SAMPLE
    assert choose_frames(3, 5, True).tolist() == [0, 1, 2, 3, 4]
    assert len(choose_frames(3, 100, False)) == 0
