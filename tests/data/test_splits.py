"""Folders named after the parts of a data set are its split, and never classes or speakers."""

from pathlib import Path

import numpy as np
import pytest
import soundfile
from PIL import Image

from layerwise.config import resolve
from layerwise.data.images import patch_options, picture_identity
from layerwise.data.open import open_data
from layerwise.data.source import DataSet
from layerwise.data.splits import folder_split
from layerwise.training.samples import HELD_OUT, TEST, TRAIN, split_samples


def names(*folders: str) -> list[str]:
    return [f"{folder}/{label}/1.png" for folder in folders for label in ("cat", "dog")]


@pytest.mark.parametrize(
    ("folders", "test", "held_out"),
    [
        (("train", "test"), "test", None),
        (("train", "val"), "val", None),
        (("train", "valid"), "valid", None),
        (("Train", "Test"), "Test", None),
        (("TRAINING", "Validation"), "Validation", None),
        (("train", "dev", "test"), "test", "dev"),
        (("train", "val", "testing"), "testing", "val"),
        (("val", "test"), "test", None),
        (("training_set", "test_set"), "test_set", None),
        (("Train-Set", "valset", "testing"), "testing", "valset"),
        (("train", "eval"), "eval", None),
        (("train", "test", "unlabeled"), "test", None),
        (("train",), None, None),
    ],
)
def test_folders_of_such_names_are_a_split(folders: tuple[str, ...], test: str | None, held_out: str | None) -> None:
    ids = names(*folders)
    split = folder_split(ids)
    assert split is not None
    for mask, part in ((split.test, test), (split.held_out, held_out)):
        assert mask is None if part is None else mask.tolist() == [name.startswith(f"{part}/") for name in ids]


@pytest.mark.parametrize(
    "folders", [("train", "tram"), ("cat", "dog"), ("bus", "test", "train-old"), ("set", "sunset"), ()]
)
def test_other_folders_are_none(folders: tuple[str, ...]) -> None:
    assert folder_split([*names(*folders), "loose.png"]) is None
    assert folder_split(names(*folders)) is None


def pictures(folder: Path, parts: tuple[str, ...], count: int) -> DataSet:
    for name in (f"{part}/{label}/{number}.png" for part in parts for label in "ab" for number in range(count)):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("L", (32, 32), len(name)).save(folder / name)
    return open_data(
        resolve(overrides={"data.source": f"images:{folder}", "data.picture": 32, "data.crop": 32}).data, 1
    )


@pytest.mark.parametrize("parts", [("train", "val"), ("Train", "Test"), ("training", "valid", "test"), ("train",)])
def test_classes_lie_below_the_parts(tmp_path: Path, parts: tuple[str, ...]) -> None:
    assert sorted(set(pictures(tmp_path, parts, 2).labels["class"].tolist())) == ["a", "b"]


def test_the_validation_part_stops_the_training_where_there_is_a_test_part(tmp_path: Path) -> None:
    data = pictures(tmp_path, ("train", "val", "test"), 4)
    config = resolve(overrides={"data.source": f"images:{tmp_path}"})
    split = split_samples(data, config)
    for part, number in (("train", TRAIN), ("val", HELD_OUT), ("test", TEST)):
        assert {int(split[n]) for n, name in enumerate(data.ids) if name.startswith(part)} == {number}


def test_parts_of_recordings_are_no_speakers(tmp_path: Path) -> None:
    for name in ("train/ann/1.wav", "train/2.wav", "test/ben/3.wav", "test/4.wav"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        soundfile.write(tmp_path / name, np.random.default_rng(1).standard_normal(800) / 9, 8000)
    data = open_data(resolve(overrides={"data.source": f"speech:{tmp_path}"}).data, 1)
    assert dict(zip(data.ids, data.labels["speaker"].tolist(), strict=True)) == {
        "test/4.wav": "",
        "test/ben/3.wav": "ben",
        "train/2.wav": "",
        "train/ann/1.wav": "ann",
    }
    assert data.test.tolist() == [True, True, False, False]


@pytest.mark.parametrize(("parts", "same"), [(("train", "test"), True), (("train", "val"), False)])
def test_where_val_was_a_class_once_the_data_are_others_now(tmp_path: Path, parts: tuple[str, ...], same: bool) -> None:
    """A run that was trained on it cannot be gone on with; all others can."""
    data = pictures(tmp_path, parts, 1)
    options = patch_options(resolve(overrides={"data.source": "images:x", "data.picture": 32, "data.crop": 32}).data)
    sizes = [(name, (tmp_path / name).stat().st_size) for name in data.ids]
    assert (data.identity == picture_identity("images", options, sizes)) == same
