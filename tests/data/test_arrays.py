"""Arrays in files of the user's own."""

import os
import zipfile
from collections.abc import Callable
from pathlib import Path

import h5py
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.data import TensorDataset

from layerwise.config import DataOptions, resolve
from layerwise.data import arrays
from layerwise.data.open import as_data, open_data
from layerwise.data.source import DataSet, SampleSet, said_of
from layerwise.data.views import Framed
from layerwise.errors import ConfigError, DataError

VALUES = np.random.default_rng(0).standard_normal((6, 20, 3)).astype(np.float32) * 7


def opened(source: str, **options: object) -> DataSet:
    config = resolve(overrides={"data.source": source, **{f"data.{name}": value for name, value in options.items()}})
    return open_data(config.data, 1)


def test_an_npy_file_holds_sequences_of_steps(tmp_path: Path) -> None:
    np.save(tmp_path / "x.npy", VALUES)
    data = opened(f"npy:{tmp_path}/x.npy")
    assert (data.lengths.tolist(), data.frame_shape) == ([20] * 6, (3,))
    assert np.allclose(data.read(2, 5, 9) * data.level, VALUES[2, 5:9], atol=1e-5)
    assert np.mean([data.read(n, 0, 20).square().mean() for n in range(6)]) == pytest.approx(1, rel=1e-4)


def test_an_npy_file_holds_whole_samples(tmp_path: Path) -> None:
    np.save(tmp_path / "x.npy", (VALUES * 10).astype(np.int16))
    data = opened(f"npy:{tmp_path}/x.npy", frames="whole", views=1)
    assert (data.lengths.tolist(), data.frame_shape) == ([1] * 6, (20, 3))
    assert np.allclose(data.read(2, 0, 1)[0] * data.level, (VALUES[2] * 10).astype(np.int16), atol=1e-3)


def test_numbers_alone_are_steps_of_one_channel(tmp_path: Path) -> None:
    np.save(tmp_path / "x.npy", VALUES[..., 0])
    assert opened(f"npy:{tmp_path}/x.npy").read(0, 0, 4).shape == (4, 1)


def test_what_extract_writes_can_be_trained_on(tmp_path: Path) -> None:
    np.save(tmp_path / "x.npy", VALUES.reshape(120, 3))
    np.savez(tmp_path / "x.index.npz", offsets=[0, 50, 60, 120], ids=["a", "b", "c"], labels_kind=["one", "two", "one"])
    data = opened(f"npy:{tmp_path}/x.npy")
    assert (data.lengths.tolist(), list(data.ids)) == ([50, 10, 60], ["a", "b", "c"])
    assert data.labels["kind"].tolist() == ["one", "two", "one"]
    assert np.allclose(data.read(1, 2, 5) * data.level, VALUES.reshape(120, 3)[52:55], atol=1e-5)


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "x.h5"
    with h5py.File(path, "w") as made:
        made["sensor"] = VALUES
        made["labels/activity"] = ["rest", "run", "rest", "run", "walk", "walk"]
        made["ids"] = [f"person {n}" for n in range(6)]
    return path


def test_an_hdf5_file_brings_labels_and_ids_along(file: Path) -> None:
    data = opened(f"h5:{file}")
    assert data.labels["activity"].tolist()[:2] == ["rest", "run"]
    assert data.ids[1] == "person 1"
    assert np.allclose(data.read(3, 1, 3) * data.level, VALUES[3, 1:3], atol=1e-5)


def test_of_several_data_sets_one_is_named(file: Path) -> None:
    with h5py.File(file, "a") as made:
        made["other"] = VALUES[:, :4]
    with pytest.raises(DataError, match=r"holds other, sensor; say which one"):
        opened(f"h5:{file}")
    assert opened(f"h5:{file}:other").lengths.tolist() == [4] * 6
    with pytest.raises(DataError, match="has no data set third"):
        opened(f"h5:{file}:third")


@pytest.mark.parametrize(
    "offsets", [[0, 40, 20, 120], [-20, 60, 90, 120], [0, 60, 90, 121], [0.0, 60.0, 90.0, 120.0], [[0, 120]]]
)
def test_offsets_that_lie_are_refused(tmp_path: Path, offsets: list) -> None:
    np.save(tmp_path / "x.npy", VALUES.reshape(120, 3))
    np.savez(tmp_path / "x.index.npz", offsets=offsets, ids=["a", "b", "c"])
    with pytest.raises(DataError, match="offsets must be whole numbers that rise from 0"):
        opened(f"npy:{tmp_path}/x.npy")


def test_what_has_changed_in_the_middle_of_a_file_or_beside_it_is_another_data_set(tmp_path: Path) -> None:
    values = np.random.default_rng(0).standard_normal((60, 4000, 3))
    np.save(tmp_path / "x.npy", values)
    before = opened(f"npy:{tmp_path}/x.npy").identity
    values[20:40] = 0
    np.save(tmp_path / "x.npy", values)
    assert opened(f"npy:{tmp_path}/x.npy").identity != before


def test_numbers_as_ids_and_labels_are_read(file: Path) -> None:
    with h5py.File(file, "a") as made:
        del made["ids"]
        made["ids"] = np.arange(6)
        made["labels/person"] = np.arange(6) // 2
    data = opened(f"h5:{file}")
    assert (data.ids[5], data.labels["person"].tolist()) == ("5", ["0", "0", "1", "1", "2", "2"])


def test_values_beside_that_lie_elsewhere_are_refused(file: Path, tmp_path: Path) -> None:
    (tmp_path / "secret.txt").write_text("TOPSECRET" * 10)
    with h5py.File(file, "a") as made:
        made["labels"].create_dataset("kind", (6,), "S8", external=[(str(tmp_path / "secret.txt"), 0, 48)])
        made["deep/down"] = h5py.ExternalLink(str(file), "sensor")
    with pytest.raises(DataError, match="lie in other files"):
        opened(f"h5:{file}:sensor")
    with pytest.raises(DataError, match="down is a link"):
        opened(f"h5:{file}:deep/down")


def test_links_to_other_files_are_refused(file: Path, tmp_path: Path) -> None:
    with h5py.File(tmp_path / "linked.h5", "w") as made:
        made["x"] = h5py.ExternalLink(str(file), "sensor")
    with pytest.raises(DataError, match="x is a link"):
        opened(f"h5:{tmp_path}/linked.h5")
    with h5py.File(tmp_path / "virtual.h5", "w") as made:
        layout = h5py.VirtualLayout((6, 20, 3), "f4")
        layout[:] = h5py.VirtualSource(str(file), "sensor", (6, 20, 3))
        made.create_virtual_dataset("x", layout)
    with pytest.raises(DataError, match="lie in other files"):
        opened(f"h5:{tmp_path}/virtual.h5")


@pytest.mark.parametrize(
    ("content", "complaint"),
    [
        (np.array(["a", "b"]), "arrays of numbers"),
        (np.zeros((4, 8, 2)), "zero everywhere"),
        (np.full((4, 8, 2), np.nan), "no numbers"),
        (np.ones(5), "samples first"),
        (np.ones((3, 0, 2)), "are empty"),
        (np.array([{"pickled": 1}], dtype=object), "cannot be read as a .npy file of numbers"),
    ],
)
def test_what_cannot_be_trained_on_is_refused(tmp_path: Path, content: np.ndarray, complaint: str) -> None:
    np.save(tmp_path / "x.npy", content, allow_pickle=True)
    with pytest.raises(DataError, match=complaint):
        opened(f"npy:{tmp_path}/x.npy")


def huge_claim(path: Path) -> None:
    with zipfile.ZipFile(path, "w") as archive, archive.open("offsets.npy", "w") as member:
        described = {"descr": "<i8", "fortran_order": False, "shape": (2**50,)}
        np.lib.format.write_array_header_1_0(member, described)


def noise(samples: int, *shape: int) -> np.ndarray:
    return np.random.default_rng(0).standard_normal((samples, *shape)).astype(np.float32)


@pytest.mark.parametrize("value", [1e30, -1e20, 9.96921e36, 3e7])
@pytest.mark.parametrize("kind", ["npy", "h5", "object"])
def test_an_absurd_value_moves_the_level_of_no_other_and_its_sample_is_named(
    tmp_path: Path, kind: str, value: float
) -> None:
    values, person = noise(301, 20, 3), np.arange(301) % 3
    level = as_data(np.delete(values, 77, axis=0), DataOptions()).level
    values[77, 4, 1] = value
    np.save(tmp_path / "x.npy", values)
    with h5py.File(tmp_path / "x.h5", "w") as file:
        file["x"], file["labels/label"] = values, person
    items = TensorDataset(torch.from_numpy(values), torch.from_numpy(person))
    data = as_data(items, DataOptions()) if kind == "object" else opened(f"{kind}:{tmp_path}/x.{kind}")
    assert data.level == pytest.approx(level, rel=0.01)
    (skipped,) = data.skipped
    assert (skipped.path, skipped.reason[:18]) == ("77", f"its values reach {abs(value):.3g}"[:18])
    assert data.ids[76:78] == ["76", "78"]
    assert torch.equal(data.read(77, 2, 9), torch.from_numpy(values[78, 2:9] / np.float32(data.level)))
    if kind != "npy":
        assert data.labels["label"].tolist() == [str(each) for each in np.delete(person, 77)]
    assert said_of(data)[-2:] == ["1 samples skipped:", f"  77: {skipped.reason}"]


def test_of_a_large_set_the_samples_by_which_the_level_is_measured_are_looked_at(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(arrays, "MOST_LOOKED_AT", 100)
    values = noise(60, 20, 3)
    values[7, 4, 1] = 1e30
    np.save(tmp_path / "x.npy", values)
    assert [entry.path for entry in opened(f"npy:{tmp_path}/x.npy").skipped] == ["7"]


@pytest.mark.parametrize("scale", [1, 1e-9, 1e9])
def test_samples_that_only_differ_much_are_all_taken(tmp_path: Path, scale: float) -> None:
    np.save(tmp_path / "x.npy", scale * noise(5, 20, 3) * np.array([0, 1, 1, 1e-12, 1e4])[:, None, None])
    assert len(opened(f"npy:{tmp_path}/x.npy").ids) == 5
    np.save(tmp_path / "two.npy", noise(2, 20, 3) * np.array([1, 1e9])[:, None, None])
    assert len(opened(f"npy:{tmp_path}/two.npy").ids) == 2


def test_a_value_that_is_no_number_is_found_in_any_sample(tmp_path: Path) -> None:
    for value in (np.nan, -np.inf, 1e300):
        values = noise(901, 20).astype(np.float64)
        values[333, 7] = value
        np.save(tmp_path / "x.npy", values)
        with pytest.raises(DataError, match="Sample 333 holds values that are no numbers"):
            opened(f"npy:{tmp_path}/x.npy")


def test_a_file_that_is_damaged_after_it_was_opened_is_named(tmp_path: Path) -> None:
    values = noise(12, 500, 600)  # more than HDF5 keeps in memory
    np.save(tmp_path / "x.npy", values)
    with h5py.File(tmp_path / "x.h5", "w") as file:
        file.create_dataset("x", data=values, chunks=(1, 500, 600), compression="gzip", compression_opts=1)
    of_npy, of_h5 = opened(f"npy:{tmp_path}/x.npy"), opened(f"h5:{tmp_path}/x.h5")
    os.truncate(tmp_path / "x.npy", 1000)
    with (tmp_path / "x.h5").open("r+b") as damaged:
        damaged.seek(10_000)
        damaged.write(bytes(10_000))
    for data, name in ((of_npy, "x.npy"), (of_h5, "x.h5")):
        with pytest.raises(DataError, match=rf"{name} cannot be read any more \(.*\); restore it\.$"):
            for sample in range(12):
                data.read(sample, 0, 500)


INDEXES: dict[str, Callable[[Path], object]] = {
    "a pipe": os.mkfifo,
    "a folder": Path.mkdir,
    "no archive": lambda path: path.write_bytes(b"PK\x03\x04" + bytes(100)),
    "empty": Path.touch,
    "a claim": huge_claim,
}


@pytest.mark.parametrize("spoil", INDEXES.values(), ids=INDEXES)
def test_what_is_no_index_beside_an_array_is_a_sentence(tmp_path: Path, spoil: Callable[[Path], object]) -> None:
    np.save(tmp_path / "x.npy", np.ones((4, 8, 2)))
    spoil(tmp_path / "x.index.npz")
    with pytest.raises(DataError, match="cannot be read"):
        opened(f"npy:{tmp_path}/x.npy")


def test_an_index_of_samples_that_takes_too_much_memory_is_refused_before_it_is_read(tmp_path: Path) -> None:
    with h5py.File(tmp_path / "x.h5", "w") as file:
        file["x"] = np.ones((4, 8, 2))
        file.create_dataset("ids", (2**40,), "S8")
    with pytest.raises(DataError, match="that is no index of samples"):
        opened(f"h5:{tmp_path}/x.h5")


def test_a_kind_that_is_almost_right_is_suggested() -> None:
    with pytest.raises(ConfigError, match=r"[Dd]id you mean npy\?"):
        resolve(overrides={"data.source": "numpy:x.npy"})


@given(st.integers(1, 6), st.integers(1, 7), st.integers(0, 12), st.integers(0, 12))
@settings(deadline=None)
def test_frames_that_are_read_in_parts_are_those_of_the_whole(length: int, step: int, start: int, more: int) -> None:
    steps = np.arange(2 * 40 * 2, dtype=np.float32).reshape(2, 40, 2)
    inner = SampleSet("arrays", ("0", "1"), np.array([40, 40]), (2,), "steps", lambda n, a, b, view: steps[n, a:b])
    data = Framed(inner, length, step)
    whole = data.read(1, 0, int(data.lengths[1]))
    assert whole.shape == (len(range(0, 40 - length + 1, step)), 2, length)
    start, stop = min(start, len(whole)), min(start + more, len(whole))
    assert np.array_equal(data.read(1, start, stop), whole[start:stop])
    assert np.array_equal(whole[-1].T, steps[1, (len(whole) - 1) * step :][:length])
