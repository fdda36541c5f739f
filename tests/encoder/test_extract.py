"""`layerwise.extract`: a file gives the features that the run cached for it; what cannot be read is skipped and named."""

import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
import soundfile
import torch

import layerwise
from layerwise.cache import ActivationCache
from layerwise.data.source import SampleSet
from layerwise.encoder import extract as extracting
from layerwise.engines.run import RunResult
from layerwise.errors import BudgetError, CacheError, DataError, Interrupted
from layerwise.events import Message, Progress
from layerwise.stop import StopFlag


def features_of(path: Path) -> dict[str, np.ndarray]:
    """Name of a sample to its rows."""
    if path.suffix == ".h5":
        with h5py.File(path) as file:
            rows, offsets = file["features"][:], file["offsets"][:]
            ids = [name.decode() for name in file["ids"]]
    else:
        index = np.load(path.with_suffix(".index.npz"))
        rows, offsets, ids = np.load(path), index["offsets"], index["ids"].tolist()
    assert offsets[-1] == len(rows)
    return {name: rows[start:stop] for name, start, stop in zip(ids, offsets, offsets[1:], strict=False)}


def cached_features(result: RunResult, stage: int) -> dict[str, np.ndarray]:
    with ActivationCache(result.paths.cache(stage)) as cache:
        lengths = cache.lengths.tolist()
        return {name: cache.read(n, 0, lengths[n]).float().numpy() for n, name in enumerate(cache.ids)}


def left_in(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


@pytest.mark.parametrize("ending", ["h5", "npy"])
def test_a_folder_gives_what_the_run_cached(speech_run: RunResult, digits: Path, tmp_path: Path, ending: str) -> None:
    path = tmp_path / f"features.{ending}"
    extracted = layerwise.extract(speech_run.paths.out, digits, path)
    assert (extracted.stage, extracted.samples, extracted.skipped) == (4, 48, ())
    found, cached = features_of(path), cached_features(speech_run, 4)
    assert list(found) == list(cached)
    assert extracted.rows == sum(map(len, cached.values()))
    for name in cached:
        assert found[name].dtype == np.float32
        np.testing.assert_allclose(found[name], cached[name], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "int8"])
def test_rounding_between_the_stages_is_that_of_the_run(
    run_tiny: Callable[..., RunResult], digits: Path, tmp_path: Path, dtype: str
) -> None:
    result = run_tiny("speech", f"fsdd:{digits}", **{"cache.dtype": dtype})
    layerwise.extract(result.paths.out, f"fsdd:{digits}", tmp_path / "features.h5")
    found, cached = features_of(tmp_path / "features.h5"), cached_features(result, 4)
    step = {"float16": 2**-10, "bfloat16": 2**-7, "int8": 2**-4}[dtype]
    same = np.concatenate([(found[name] == cached[name]).ravel() for name in cached])
    for name in cached:
        assert found[name].dtype == (np.float16 if dtype == "float16" else np.float32)
        np.testing.assert_allclose(found[name], cached[name], rtol=0, atol=step * np.abs(cached[name]).max())
    if dtype == "float16":  # where a value lies between two steps, another summation order may round it the other way
        assert same.mean() > 0.99


def test_recurrent_layers_compute_as_in_the_run_under_bfloat16(
    run_tiny: Callable[..., RunResult], digits: Path, tmp_path: Path
) -> None:
    options = {"training.precision": "bfloat16", "cache.dtype": "float32"}
    result = run_tiny("speech", f"fsdd:{digits}", **options)
    layerwise.extract(result.paths.out, f"fsdd:{digits}", tmp_path / "features.h5")
    found, cached = features_of(tmp_path / "features.h5"), cached_features(result, 4)
    differences = [np.abs(found[name] - cached[name]).max() / np.abs(cached[name]).max() for name in cached]
    assert np.median(differences) < 1e-5


def test_pictures_give_what_the_run_cached(vision_run: RunResult, pictures: Path, tmp_path: Path) -> None:
    layerwise.extract(vision_run.paths.out, f"images:{pictures}", tmp_path / "features.h5")
    found, cached = features_of(tmp_path / "features.h5"), cached_features(vision_run, 3)
    assert list(found) == list(cached)
    for name in cached:
        assert found[name].shape == (49, 64, 2, 2)
        np.testing.assert_allclose(found[name], cached[name], rtol=1e-5, atol=1e-5)
    with h5py.File(tmp_path / "features.h5") as file:
        assert set(file["labels/class"]) == {b"cat", b"ship"}


def test_a_lower_stage_and_means(speech_run: RunResult, digits: Path, tmp_path: Path) -> None:
    source = f"fsdd:{digits}"
    layerwise.extract(speech_run.paths.out, source, tmp_path / "second.h5", stage=2)
    extracted = layerwise.extract(speech_run.paths.out, source, tmp_path / "means.npy", stage=2, mean=True)
    assert (extracted.stage, extracted.rows) == (2, 48)
    frames, means, cached = (
        features_of(tmp_path / "second.h5"),
        features_of(tmp_path / "means.npy"),
        cached_features(speech_run, 2),
    )
    for name in cached:
        np.testing.assert_allclose(frames[name], cached[name], rtol=1e-5, atol=1e-5)
        np.testing.assert_allclose(means[name], cached[name].mean(0, keepdims=True), rtol=1e-5, atol=1e-5)
    assert np.load(tmp_path / "means.index.npz")["labels_digit"].tolist() == [name[0] for name in cached]


def test_labels_of_a_table_are_written_beside_the_features(speech_run: RunResult, digits: Path, tmp_path: Path) -> None:
    names = sorted(path.name for path in digits.rglob("*.wav"))
    moods = {name: f"mood {number % 3}" for number, name in enumerate(names)}
    table = "".join(f"{name},{mood}\n" for name, mood in moods.items())
    (tmp_path / "moods.csv").write_text(f"file,mood\n{table}")
    said: list[Message | Progress] = []
    layerwise.extract(
        speech_run.paths.out,
        digits,
        tmp_path / "means.npy",
        mean=True,
        labels=tmp_path / "moods.csv",
        notify=said.append,
    )
    index = np.load(tmp_path / "means.index.npz")
    kept = [Path(str(name)).with_suffix(".wav").name for name in index["ids"]]
    assert index["labels_mood"].tolist() == [moods[name] for name in kept]
    assert any(isinstance(line, Message) and "mood" in line.text for line in said)


def test_one_file_needs_no_others(speech_run: RunResult, vision_run: RunResult, digits: Path, pictures: Path) -> None:
    for result, file, stage in (
        (speech_run, digits / "3_theo_5.wav", 4),
        (vision_run, pictures / "cat" / "04.png", 3),
    ):
        path = result.paths.out.parent / "one.h5"
        layerwise.extract(result.paths.out, file, path)
        (found,) = features_of(path).values()
        cached = next(rows for name, rows in cached_features(result, stage).items() if name.endswith(file.name))
        np.testing.assert_allclose(found, cached, rtol=1e-5, atol=1e-5)


def test_a_long_recording_passes_in_pieces_under_the_budget(
    speech_run: RunResult, digits: Path, tmp_path: Path
) -> None:
    joined = np.concatenate([soundfile.read(path, dtype="float32")[0] for path in sorted(digits.iterdir())] * 2)
    soundfile.write(tmp_path / "long.wav", joined, 8000)
    free = layerwise.extract(speech_run.paths.out, tmp_path / "long.wav", tmp_path / "free.h5", gpu_mem="100MB")
    tight = layerwise.extract(speech_run.paths.out, tmp_path / "long.wav", tmp_path / "tight.h5", gpu_mem="30kB")
    assert tight.peak_bytes <= 30_000 < free.peak_bytes < joined.nbytes / 10
    (found,), (again,) = features_of(tmp_path / "free.h5").values(), features_of(tmp_path / "tight.h5").values()
    samples = torch.from_numpy(soundfile.read(tmp_path / "long.wav", dtype="float32")[0])
    whole = layerwise.load(speech_run.paths.out)(samples[None])[0].detach().numpy()
    np.testing.assert_allclose(found, whole, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(again, whole, rtol=1e-5, atol=1e-5)
    with pytest.raises(BudgetError, match="cannot hold the encoder"):
        layerwise.extract(speech_run.paths.out, tmp_path / "long.wav", tmp_path / "no.h5", gpu_mem="2kB")
    assert left_in(tmp_path) == ["free.h5", "long.wav", "tight.h5"]


def write_damaged(path: Path) -> None:
    """A recording whose middle is damaged, which is found only when it is read; long enough to be read in pieces."""
    soundfile.write(path, 0.1 * np.random.default_rng(0).standard_normal(9000), 8000)
    content = bytearray(path.read_bytes())
    middle = len(content) * 7 // 10
    content[middle : middle + 200] = bytes(200)
    path.write_bytes(content)


def test_bad_files_are_skipped_and_named(speech_run: RunResult, digits: Path, tmp_path: Path) -> None:
    folder = tmp_path / "mixed"
    shutil.copytree(digits, folder)
    (folder / "broken.wav").write_bytes(b"RIFF no sound")
    soundfile.write(folder / "a_short.wav", np.zeros(20), 8000)
    nan = np.full(9000, np.nan, dtype=np.float32)
    nan[:8000] = 0.1
    soundfile.write(folder / "1_nan.wav", nan, 8000, subtype="FLOAT")
    write_damaged(folder / "2_middle.flac")
    extracted = layerwise.extract(speech_run.paths.out, folder, tmp_path / "features.h5", gpu_mem="200kB")
    reasons = {entry.path: entry.reason for entry in extracted.skipped}
    assert reasons.keys() == {"broken.wav", "a_short.wav", "1_nan.wav", "2_middle.flac"}
    assert "not numbers" in reasons["1_nan.wav"]
    assert "cannot be read any more" in reasons["2_middle.flac"]
    found, cached = features_of(tmp_path / "features.h5"), cached_features(speech_run, 4)
    assert found.keys() == cached.keys()
    for name in cached:
        np.testing.assert_allclose(found[name], cached[name], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("content", ["nothing", "text", "nan", "damaged"])
def test_where_no_file_is_left_that_is_said(speech_run: RunResult, tmp_path: Path, content: str) -> None:
    folder = tmp_path / "bad"
    folder.mkdir()
    if content == "text":
        (folder / "a.wav").write_text("no sound")
    elif content == "nan":
        soundfile.write(folder / "a.wav", np.full(3000, np.nan, dtype=np.float32), 8000, subtype="FLOAT")
    elif content == "damaged":
        write_damaged(folder / "a.flac")
    message = {
        "nothing": "holds no recordings",
        "text": "1 files were skipped, the first: a.wav",
        "nan": "1 files were skipped, the first: a.wav, holds samples that are not numbers",
        "damaged": "Not one file",
    }
    with pytest.raises(DataError, match=message[content]):
        layerwise.extract(speech_run.paths.out, folder, tmp_path / "features.h5")
    assert left_in(tmp_path) == ["bad"]


def test_a_wish_to_stop_leaves_nothing(speech_run: RunResult, digits: Path, tmp_path: Path) -> None:
    stop = StopFlag()
    told: list[Progress] = []

    def notify(progress: Progress) -> None:
        told.append(progress)
        stop.reason = "SIGTERM" if len(told) == 3 else None

    for name in ("features.h5", "features.npy"):
        told.clear()
        with pytest.raises(Interrupted, match="Stopped by SIGTERM"):
            layerwise.extract(speech_run.paths.out, digits, tmp_path / name, stop=stop, notify=notify)
        stop.reason = None
    with ActivationCache(speech_run.paths.cache(4)) as cache:  # of the same recordings
        assert told[-1].total == cache.lengths.sum()
    assert left_in(tmp_path) == []


def test_files_that_exist_and_other_endings_are_refused(speech_run: RunResult, digits: Path, tmp_path: Path) -> None:
    (tmp_path / "there.h5").write_text("mine")
    for name, message in (
        ("there.h5", "exists"),
        ("x.csv", "ends in .npy, .h5, .npz, .parquet"),
        ("no/x.h5", "there is no folder"),
    ):
        with pytest.raises(CacheError, match=message):
            layerwise.extract(speech_run.paths.out, digits, tmp_path / name)
    assert (tmp_path / "there.h5").read_text() == "mine"
    assert left_in(tmp_path) == ["there.h5"]


def test_data_of_another_kind_are_refused(
    speech_run: RunResult, vision_run: RunResult, digits: Path, pictures: Path, tmp_path: Path
) -> None:
    with pytest.raises(DataError, match="holds pictures, but the encoder was trained on recordings"):
        layerwise.extract(speech_run.paths.out, f"images:{pictures}", tmp_path / "x.h5")
    with pytest.raises(DataError, match="holds recordings, but the encoder was trained on pictures"):
        layerwise.extract(vision_run.paths.out, f"speech:{digits}", tmp_path / "x.h5")


def test_what_is_held_at_a_time_does_not_grow_with_the_recording(
    speech_run: RunResult, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    soundfile.write(tmp_path / "long.wav", 0.1 * np.random.default_rng(0).standard_normal(400_000), 8000)
    asked: list[int] = []
    read = SampleSet.read

    def noted(self: SampleSet, sample: int, start: int, stop: int, view: int = 0) -> torch.Tensor:
        asked.append(stop - start)
        return read(self, sample, start, stop, view)

    handed: list[int] = []
    forward_all = extracting.forward_all

    def noted_rows(*arguments: Any) -> Iterator[Any]:
        for sample, rows, last in forward_all(*arguments):
            handed.append(len(rows))
            yield sample, rows, last

    monkeypatch.setattr(SampleSet, "read", noted)
    monkeypatch.setattr(extracting, "forward_all", noted_rows)
    layerwise.extract(speech_run.paths.out, tmp_path / "long.wav", tmp_path / "features.npy")
    assert max(asked) == 4 * 1600 // 2
    assert max(handed) <= 4 * 1600 // 2 // 40 + 2
    assert sum(asked) == 400_000


def test_a_recording_that_breaks_off_is_named_and_leaves_the_others_as_they_are(
    speech_run: RunResult, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, length in (("a", 2000), ("b", 40_000), ("c", 2000)):
        tone = 0.1 * np.random.default_rng(length).standard_normal(length)
        for folder in ("whole", "others") if name != "b" else ("whole",):
            (tmp_path / folder).mkdir(exist_ok=True)
            soundfile.write(tmp_path / folder / f"{name}.wav", tone, 8000)
    layerwise.extract(speech_run.paths.out, tmp_path / "others", tmp_path / "others.npy", mean=True)
    read = SampleSet.read

    def breaks_off(self: SampleSet, sample: int, start: int, stop: int, view: int = 0) -> torch.Tensor:
        if self.ids[sample] == "b.wav" and start > 0:
            raise DataError("it ends here")
        return read(self, sample, start, stop, view)

    monkeypatch.setattr(SampleSet, "read", breaks_off)
    extracted = layerwise.extract(speech_run.paths.out, tmp_path / "whole", tmp_path / "whole.npy", mean=True)
    assert [(each.path, each.reason) for each in extracted.skipped] == [("b.wav", "it ends here")]
    assert np.array_equal(np.load(tmp_path / "whole.npy"), np.load(tmp_path / "others.npy"))
