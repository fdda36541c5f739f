"""Files of features say where each row lies, in whatever format they are."""

import sys
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest

import layerwise
from layerwise.cache import ActivationCache
from layerwise.cache.feature_formats import RowPlaces
from layerwise.commands import main
from layerwise.data.open import open_data
from layerwise.engines.run import RunResult
from layerwise.errors import CacheError
from layerwise.events import Progress

ENDINGS = ["npy", "npz", "h5", "parquet"]


def said_in(path: Path) -> dict[str, Any]:
    """All that a file of features holds, under the same names in each format."""
    if path.suffix == ".h5":
        with h5py.File(path) as file:
            said = {name: values[()] for name, values in file.items() if isinstance(values, h5py.Dataset)}
            said |= {f"labels_{name}": values.asstr()[()] for name, values in file["labels"].items()}
            return said | dict(file.attrs) | {"ids": file["ids"].asstr()[()]}
    if path.suffix == ".parquet":
        return said_in_table(path)
    if path.suffix == ".npy":
        return {"features": np.load(path), **np.load(path.with_suffix(".index.npz"))}
    return dict(np.load(path))


def said_in_table(path: Path) -> dict[str, Any]:
    parquet = pytest.importorskip("pyarrow.parquet")
    table = parquet.read_table(path)
    values = {name: np.array(table[name].to_pylist()) for name in table.column_names}
    metadata = {name.decode(): value.decode() for name, value in (table.schema.metadata or {}).items()}
    shape = tuple(map(int, metadata["frame_shape"].split("x")))
    ids, first = np.unique(values["id"], return_index=True)
    order = np.argsort(first)
    said = {"features": values["features"].reshape(-1, *shape), "ids": ids[order]}
    said["offsets"] = np.append(first[order], len(values["id"]))
    said |= {
        f"labels_{name.removeprefix('label_')}": of[first[order]] for name, of in values.items() if "label_" in name
    }
    if "unit" in metadata:
        said |= {name: float(metadata[name]) for name in ("hop", "offset")} | {"unit": metadata["unit"]}
        assert values["frame"].tolist() == [n for length in np.diff(said["offsets"]) for n in range(length)]
        if "time" in values:
            said["frame_times"] = values["time"]
        else:
            said["frame_places"] = np.stack([values["down"], values["across"]], axis=1)
    return said


@pytest.mark.parametrize("ending", ENDINGS)
def test_rows_of_recordings_have_their_times(speech_run: RunResult, digits: Path, tmp_path: Path, ending: str) -> None:
    if ending == "parquet":
        pytest.importorskip("pyarrow")
    path = tmp_path / f"features.{ending}"
    extracted = layerwise.extract(speech_run.paths.out, f"fsdd:{digits}", path)
    with ActivationCache(speech_run.paths.cache(4)) as cache:
        hop, offset, lengths, ids = cache.layout.hop / 8000, cache.layout.offset / 8000, cache.lengths, cache.ids
        rows = np.concatenate([cache.read(n, 0, int(length)).float().numpy() for n, length in enumerate(lengths)])
    said = said_in(path)
    assert (str(said["unit"]), float(said["hop"])) == ("seconds", hop)
    np.testing.assert_allclose(said["offset"], offset)
    np.testing.assert_allclose(said["frame_times"], np.concatenate([offset + hop * np.arange(n) for n in lengths]))
    np.testing.assert_allclose(said["features"], rows, rtol=1e-5, atol=1e-5)
    assert said["ids"].tolist() == list(ids)
    assert np.diff(said["offsets"]).tolist() == lengths.tolist()
    assert said["labels_digit"].tolist() == [name[0] for name in ids]
    assert [each.name for each in tmp_path.glob("*.part*")] + [each.name for each in tmp_path.glob("*.whole")] == []
    assert extracted.rows == len(rows)


@pytest.mark.parametrize("ending", ENDINGS)
def test_rows_of_pictures_have_their_places(vision_run: RunResult, pictures: Path, tmp_path: Path, ending: str) -> None:
    if ending == "parquet":
        pytest.importorskip("pyarrow")
    path = tmp_path / f"features.{ending}"
    layerwise.extract(vision_run.paths.out, f"images:{pictures}", path)
    said, data = said_in(path), vision_run.config.data
    assert (str(said["unit"]), float(said["hop"])) == ("pixels", data.patch_stride)
    assert said["frame_places"].shape == (len(said["features"]), 2)
    ends = (data.patch - 1) / 2, data.picture - 1 - (data.patch - 1) / 2
    of_a_sample = said["frame_places"][:49]
    assert of_a_sample[[0, 6, 42, 48]].tolist() == [[a, b] for a in ends for b in ends]
    assert np.array_equal(said["frame_places"][49:98], of_a_sample)


def test_what_is_exported_from_a_cache_is_placed_as_what_is_extracted(
    speech_run: RunResult, vision_run: RunResult, digits: Path, pictures: Path, tmp_path: Path
) -> None:
    for run, data in ((speech_run, f"fsdd:{digits}"), (vision_run, f"images:{pictures}")):
        stage = len(run.state.stages)
        extracted, exported = tmp_path / f"extracted-{stage}.npz", tmp_path / f"exported-{stage}.npz"
        told: list[Progress] = []
        layerwise.extract(run.paths.out, data, extracted, notify=told.append)
        with pytest.raises(SystemExit, match=r"^0$"):
            main(["cache", "export", str(run.paths.out), "--stage", str(stage), "-o", str(exported)])
        expected, found = said_in(extracted), said_in(exported)
        assert found.keys() == expected.keys()
        assert told[-1] == Progress("", len(expected["features"]), len(expected["features"]))
        assert [each.done for each in told] == sorted({each.done for each in told})
        for name in expected.keys() - {"features"}:
            assert np.array_equal(found[name], expected[name]), name


@pytest.mark.parametrize("ending", ENDINGS)
def test_a_mean_lies_nowhere(speech_run: RunResult, digits: Path, tmp_path: Path, ending: str) -> None:
    if ending == "parquet":
        pytest.importorskip("pyarrow")
    path = tmp_path / f"means.{ending}"
    layerwise.extract(speech_run.paths.out, f"fsdd:{digits}", path, stage=1, mean=True)
    assert said_in(path).keys() == {"features", "ids", "offsets", "labels_digit", "labels_speaker"} | (
        {"stage"} if ending == "h5" else set()
    )


def test_without_pyarrow_a_table_is_refused_with_the_way_to_it(
    speech_run: RunResult, digits: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(CacheError, match=r"needs pyarrow .*pip install 'layerwise\[parquet\]'"):
        layerwise.extract(speech_run.paths.out, f"fsdd:{digits}", tmp_path / "x.parquet")
    assert list(tmp_path.iterdir()) == []


def test_places_of_frames_of_several_steps_are_their_middles() -> None:
    assert RowPlaces(2, 1.5, "steps").of(np.arange(3)).tolist() == [1.5, 3.5, 5.5]
    grid = RowPlaces(4, 3.5, "pixels", columns=3).of(np.arange(2, 5))
    assert grid.tolist() == [[3.5, 11.5], [7.5, 3.5], [7.5, 7.5]]


@pytest.mark.parametrize("ending", ["npy", "h5"])
def test_what_was_extracted_is_still_data(speech_run: RunResult, digits: Path, tmp_path: Path, ending: str) -> None:
    path = tmp_path / f"features.{ending}"
    layerwise.extract(speech_run.paths.out, f"fsdd:{digits}", path, stage=1)
    options = speech_run.config.data.model_copy(update={"source": f"{ending}:{path}", "frames": "steps"})
    assert len(open_data(options, 1).ids) == 48
