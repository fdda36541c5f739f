"""STL-10 and CIFAR-10 from tiny files of the published layout; only torchvision's checksums are taken out."""

import pickle
import re
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from layerwise.data.dataset import open_cifar10, open_stl10
from layerwise.data.images import PatchOptions, normalise
from layerwise.errors import DataError

STL10 = PatchOptions(picture=96, patch=16, patch_stride=8, gray=False, flip=True)
CIFAR10 = PatchOptions(picture=32, patch=8, patch_stride=4, gray=False, flip=False)
STL10_CLASSES = ["airplane", "bird", "car", "cat", "deer", "dog", "horse", "monkey", "ship", "truck"]
CIFAR10_CLASSES = ["airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"]


@pytest.fixture
def no_checksums(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in ("stl10", "cifar"):
        monkeypatch.setattr(f"torchvision.datasets.{module}.check_integrity", lambda path, md5: Path(path).is_file())


@pytest.fixture
def stl10_files(tmp_path: Path) -> tuple[Path, np.ndarray]:
    """The root, and the pictures in the order train (2), unlabeled (3), test (1): uint8 [6, 3, 96, 96]."""
    pictures = np.random.default_rng(0).integers(0, 256, (6, 3, 96, 96), dtype=np.uint8)
    folder = tmp_path / "stl10_binary"
    folder.mkdir()
    for name, part in {"train": pictures[:2], "unlabeled": pictures[2:5], "test": pictures[5:]}.items():
        part.transpose(0, 1, 3, 2).tofile(folder / f"{name}_X.bin")  # the files are column-major
    np.array([1, 10], dtype=np.uint8).tofile(folder / "train_y.bin")
    np.array([4], dtype=np.uint8).tofile(folder / "test_y.bin")
    (folder / "class_names.txt").write_text("\n".join(STL10_CLASSES) + "\n")
    return tmp_path, pictures


@pytest.fixture
def cifar10_files(tmp_path: Path) -> tuple[Path, np.ndarray]:
    """The root, and the pictures, one for each training batch and one for the test: uint8 [6, 3, 32, 32]."""
    pictures = np.random.default_rng(0).integers(0, 256, (6, 3, 32, 32), dtype=np.uint8)
    folder = tmp_path / "cifar-10-batches-py"
    folder.mkdir()
    for i, name in enumerate([f"data_batch_{n}" for n in range(1, 6)] + ["test_batch"]):
        (folder / name).write_bytes(pickle.dumps({"data": pictures[i : i + 1].reshape(1, -1), "labels": [i]}))
    (folder / "batches.meta").write_bytes(pickle.dumps({"label_names": CIFAR10_CLASSES}))
    return tmp_path, pictures


def first_patch(picture: np.ndarray, side: int) -> torch.Tensor:
    return normalise(torch.from_numpy(picture[:, :side, :side].copy()))


@pytest.mark.usefixtures("no_checksums")
def test_stl10_pixels_labels_and_split(stl10_files: tuple[Path, np.ndarray]):
    root, pictures = stl10_files
    data = open_stl10(root, STL10)
    assert (data.columns, data.frame_shape, data.views) == (11, (3, 16, 16), 2)
    assert data.lengths.tolist() == [121] * 6
    assert data.ids[0] == "train/000000"
    assert data.ids[-1] == "test/000000"
    assert len(set(data.ids)) == 6
    assert data.labels["class"].tolist() == ["airplane", "truck", "", "", "", "cat"]
    assert data.test.tolist() == [False] * 5 + [True]
    for sample in range(6):
        assert torch.equal(data.read(sample, 0, 1)[0], first_patch(pictures[sample], 16))
        assert torch.equal(data.read(sample, 0, 1, view=1)[0], first_patch(pictures[sample][:, :, ::-1], 16))


@pytest.mark.usefixtures("no_checksums")
def test_cifar10_pixels_labels_and_split(cifar10_files: tuple[Path, np.ndarray]):
    root, pictures = cifar10_files
    data = open_cifar10(root, CIFAR10)
    assert (data.columns, data.frame_shape, data.views) == (7, (3, 8, 8), 1)
    assert data.labels["class"].tolist() == CIFAR10_CLASSES[:6]
    assert data.test.tolist() == [False] * 5 + [True]
    for sample in range(6):
        assert torch.equal(data.read(sample, 0, 1)[0], first_patch(pictures[sample], 8))


@pytest.mark.usefixtures("no_checksums")
def test_pictures_are_resized_and_turned_gray(stl10_files: tuple[Path, np.ndarray]):
    options = PatchOptions(picture=64, patch=16, patch_stride=8, gray=True, flip=False)
    assert open_stl10(stl10_files[0], options).read(0, 0, 49).shape == (49, 1, 16, 16)


@pytest.mark.usefixtures("no_checksums")
def test_the_inner_folder_is_the_same_data_set(
    stl10_files: tuple[Path, np.ndarray], cifar10_files: tuple[Path, np.ndarray], monkeypatch: pytest.MonkeyPatch
):
    root = stl10_files[0]
    assert open_stl10(root, STL10).identity == open_stl10(root / "stl10_binary", STL10).identity
    assert open_cifar10(root, CIFAR10).identity == open_cifar10(root / "cifar-10-batches-py", CIFAR10).identity
    assert open_stl10(root, STL10).identity != open_stl10(root, CIFAR10).identity
    monkeypatch.chdir(root / "stl10_binary")
    assert len(open_stl10(Path("."), STL10).ids) == 6


@pytest.mark.parametrize(
    ("open_set", "inside", "file"),
    [(open_stl10, "stl10_binary", "train_X.bin"), (open_cifar10, "cifar-10-batches-py", "data_batch_1")],
)
def test_missing_files_are_named(tmp_path: Path, open_set, inside: str, file: str):
    for folder in (tmp_path, tmp_path / "nowhere"):
        with pytest.raises(DataError, match=re.escape(str(folder))) as caught:
            open_set(folder, STL10)
        assert inside in str(caught.value)
        assert file in str(caught.value)


def test_a_wrong_checksum_is_reported_as_damage(cifar10_files: tuple[Path, np.ndarray]):
    with pytest.raises(DataError, match=r"damaged.*corrupted.*unpack"):
        open_cifar10(cifar10_files[0], CIFAR10)


@pytest.mark.usefixtures("no_checksums")
def test_a_broken_pickle_is_reported_as_damage(cifar10_files: tuple[Path, np.ndarray]):
    (cifar10_files[0] / "cifar-10-batches-py/test_batch").write_bytes(b"not a pickle")
    with pytest.raises(DataError, match=r"damaged.*UnpicklingError"):
        open_cifar10(cifar10_files[0], CIFAR10)


def test_a_torchvision_that_does_not_fit_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, "torchvision", None)  # makes the import fail
    with pytest.raises(DataError, match=re.escape(f"torch {torch.__version__}") + ".*pip install 'torchvision==0"):
        open_stl10(tmp_path, STL10)
