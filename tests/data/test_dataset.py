"""Data sets of torch, torchvision, torchaudio and Hugging Face, and arrays, as data."""

from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import Dataset, TensorDataset

from layerwise.config import DataOptions
from layerwise.data.open import as_data
from layerwise.errors import DataError

RNG = np.random.default_rng(0)
STEPS, WHOLE = DataOptions(), DataOptions(frames="whole")


class Items(Dataset):
    def __init__(self, items: list[Any]) -> None:
        self.items = items

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, index: int) -> Any:
        return self.items[index]


def test_tensors_are_sequences_of_steps_or_whole() -> None:
    values = torch.randn(5, 12, 3)
    steps, whole = as_data(values, STEPS), as_data(values, WHOLE)
    assert (steps.lengths.tolist(), steps.frame_shape) == ([12] * 5, (3,))
    assert (whole.lengths.tolist(), whole.frame_shape) == ([1] * 5, (12, 3))
    assert torch.allclose(steps.read(4, 2, 5) * steps.level, values[4, 2:5])
    assert steps.identity != whole.identity


def test_what_follows_a_sample_are_its_labels() -> None:
    data = as_data(TensorDataset(torch.randn(4, 9, 2), torch.tensor([3, 1, 3, 1])), STEPS)
    assert data.labels["label"].tolist() == ["3", "1", "3", "1"]


def test_sequences_may_differ_in_length_and_whole_samples_may_not() -> None:
    items = Items([torch.randn(length, 2) for length in (5, 9, 7)])
    assert as_data(items, STEPS).lengths.tolist() == [5, 9, 7]
    with pytest.raises(DataError, match=r"Item 1 of the data set has frames of \(9, 2\)"):
        as_data(items, WHOLE)


def picture(size: tuple[int, int] = (40, 30)) -> Image.Image:
    return Image.fromarray(RNG.integers(0, 255, (size[1], size[0], 3), dtype=np.uint8))


def test_pictures_are_cut_into_patches_or_taken_whole() -> None:
    items = Items([(picture(), n % 2) for n in range(4)])
    patches = as_data(items, DataOptions(frames="patches", picture=32, patch=16, patch_stride=8, gray=False))
    whole = as_data(items, DataOptions(frames="whole", picture=32, gray=False, views=3))
    assert (patches.columns, patches.frame_shape, patches.takes) == (3, (3, 16, 16), "pictures")
    assert (whole.columns, whole.frame_shape, whole.views) == (1, (3, 32, 32), 3)
    assert torch.equal(whole.read(1, 0, 1), patches_of(items, 1))
    assert not torch.allclose(whole.read(1, 0, 1, 0), whole.read(1, 0, 1, 2))


def patches_of(items: Items, number: int) -> torch.Tensor:
    return as_data(items, DataOptions(frames="patches", picture=32, patch=32, patch_stride=32, gray=False)).read(
        number, 0, 1
    )


def test_waveforms_of_torchaudio_are_mixed_and_resampled() -> None:
    items = Items([(torch.randn(2, 800), 8000, "yes", f"speaker {n}") for n in range(3)])
    data = as_data(items, DataOptions(sample_rate=4000))
    assert (data.takes, data.frame_shape, data.lengths.tolist()) == ("waveforms", (1,), [400] * 3)
    assert data.labels["label_2"].tolist() == ["speaker 0", "speaker 1", "speaker 2"]


def test_items_of_hugging_face_are_named() -> None:
    audio = {"array": RNG.standard_normal(500), "sampling_rate": 8000, "path": None}
    data = as_data(Items([{"audio": audio, "text": "one", "speaker": 7}] * 2), DataOptions(sample_rate=8000))
    assert (data.takes, data.lengths.tolist()) == ("waveforms", [500, 500])
    assert {name: values.tolist() for name, values in data.labels.items()} == {
        "text": ["one"] * 2,
        "speaker": ["7"] * 2,
    }
    pictures = as_data(Items([{"image": picture(), "label": 1}] * 3), DataOptions(frames="whole", picture=16))
    assert pictures.frame_shape == (1, 16, 16)


class Augmenting(Dataset):
    def __len__(self) -> int:
        return 4

    def __getitem__(self, index: int) -> torch.Tensor:
        return torch.rand(6, 2)


def test_a_data_set_that_augments_at_random_is_refused() -> None:
    with pytest.raises(DataError, match="another sample at each call"):
        as_data(Augmenting(), STEPS)


@pytest.mark.parametrize(
    ("given", "complaint"),
    [
        (7, "The data are a int"),
        (Items([]), "too few"),
        (Items(["text", "more"]), "begins with a str"),
        (Items([{"label": 1}, {"label": 2}]), "no array and no picture"),
        (Items([(None, 1), (None, 2)]), "begins with a NoneType"),
        (iter([1, 2]), "The data are a list_iterator"),
    ],
)
def test_what_is_no_data_set_is_refused(given: Any, complaint: str) -> None:
    with pytest.raises(DataError, match=complaint):
        as_data(given, STEPS)


def test_a_data_set_that_changes_has_another_identity() -> None:
    values = torch.randn(4, 8, 2)
    before = as_data(values, STEPS).identity
    assert as_data(values.clone(), STEPS).identity == before
    values[3, 7, 1] += 1
    assert as_data(values, STEPS).identity != before
