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


def test_waveforms_whose_channels_cancel_are_named() -> None:
    x, y = torch.randn(1, 800), torch.randn(1, 800)
    channels = [
        torch.cat(each) for each in ((x, y), (x, -x), (x, x), (x, 0 * x), (0 * x, 0 * x), (x, y, -x - 0.98 * y))
    ]
    notes = as_data(Items([(each, 8000, "yes") for each in channels]), DataOptions(sample_rate=8000)).notes
    assert len(notes) == 2
    assert "channels of 2 recordings cancel" in notes[1]
    assert "them: 1, 5;" in notes[1]


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


@pytest.mark.parametrize(
    ("item", "labels"),
    [
        ((torch.randn(300, 6), 3, 7), {"label": "3", "label_2": "7"}),
        ((torch.randn(300, 6), np.int64(3)), {"label": "3"}),
        ({"x": torch.randn(9, 2), "label": torch.tensor(1), "who": np.str_("ada")}, {"label": "1", "who": "ada"}),
        ({"label": np.int64(1), "x": torch.randn(9, 2)}, {"label": "1"}),
        ((torch.randn(9, 2), None, 2.5, True), {"label_3": "True"}),
        ((torch.randn(9, 2), np.array([1])), {"label": "1"}),
        ((torch.randn(9, 2), np.array(4), torch.tensor([[6]])), {"label": "4", "label_2": "6"}),
        ((torch.randn(9, 2), b"cat", np.bytes_(b"dog")), {"label": "cat", "label_2": "dog"}),
        ((torch.randn(9, 2), np.array(["cat"]), np.bool_(True)), {"label": "cat", "label_2": "True"}),
        ((torch.randn(9, 2), torch.tensor([0, 0, 1]), np.array([1.0, 0.0])), {"label": "2", "label_2": "0"}),
        ((torch.randn(9, 2), [0, 1, 0], [False, True]), {"label": "1", "label_2": "1"}),
        ((torch.randn(9, 2), float("nan"), None, "b"), {"label_3": "b"}),
        ({"label": np.array([1]), "x": torch.randn(9, 2)}, {"label": "1"}),
        ({"label": torch.tensor([0, 1]), "x": torch.randn(9, 2)}, {"label": "1"}),
        ((torch.randn(9, 2), [4], (np.int64(6),), ["cat"]), {"label": "4", "label_2": "6", "label_3": "cat"}),
        ((torch.randn(9, 2), [[7]], np.float32(3), torch.tensor(5.0)), {"label": "7", "label_2": "3", "label_3": "5"}),
        ([torch.randn(9, 2), np.array([1]), "a"], {"label": "1", "label_2": "a"}),
        ([[0.0, 1.0], [2.0, 3.0], [4.0, 5.0]], {}),
    ],
)
def test_labels_are_numbers_and_words_of_any_library(item: Any, labels: dict[str, str]) -> None:
    data = as_data(Items([item] * 3), STEPS)
    assert data.takes == "arrays"
    assert {name: values[0] for name, values in data.labels.items()} == labels
    assert data.lengths[0] in (300, 9, 3)
    assert all(len(values) == 3 for values in data.labels.values())


@pytest.mark.parametrize(
    ("known", "labels"),
    [
        ([(None, "b"), (7, "a"), (7, None)], {"label": ["", "7", "7"], "label_2": ["b", "a", ""]}),
        ([(7, "a"), (8,), ()], {"label": ["7", "8", ""], "label_2": ["a", "", ""]}),
        ([(float("nan"),), (3.0,), (np.float64(2),)], {"label": ["", "3", "2"]}),
        ([(3.0,), (2.5,), (2.0,)], {}),
        ([(np.array([None]),), ([5],), (np.array([np.nan]),)], {"label": ["", "5", ""]}),
        ([{"b": 1}, {"a": "x"}, {"a": "y", "b": None}], {"a": ["", "x", "y"], "b": ["1", "", ""]}),
    ],
)
def test_labels_keep_their_places_where_one_is_missing(known: list[Any], labels: dict[str, list[str]]) -> None:
    x = torch.randn(9, 2)
    data = as_data(Items([{"x": x, **each} if isinstance(each, dict) else (x, *each) for each in known]), STEPS)
    assert {name: values.tolist() for name, values in data.labels.items()} == labels


def test_a_vector_that_is_one_hot_for_some_items_alone_is_no_label() -> None:
    items = [(torch.randn(9, 2), np.array(tags), n) for n, tags in enumerate([[0, 1, 0], [1, 1, 0], [0, 0, 1]])]
    data = as_data(Items(items), STEPS)
    assert {name: values.tolist() for name, values in data.labels.items()} == {"label_2": ["0", "1", "2"]}
    assert "left out: label (ndarray (3,))" in data.notes[0]


def test_what_was_taken_and_what_was_left_out_is_said() -> None:
    item = {"label": 1, "x": torch.randn(9, 2), "more": torch.randn(4, 4), "score": 0.5}
    (note,) = as_data(Items([item] * 2), STEPS).notes
    assert note == (
        "the sample is 'x' of each item, float32 (9, 2) in the first; labels: label; left out: more (Tensor (4, 4)), score "
        "(float)"
    )
    (note,) = as_data(Items([(picture(), 1)] * 2), DataOptions(frames="whole", picture=16)).notes
    assert note == "the sample is the first value of each item, a picture of 40 x 30 in the first; labels: label"


def test_items_whose_samples_have_other_names_are_refused() -> None:
    with pytest.raises(DataError, match="The sample of item 1 of the data set is 'y', and of the first 'x'"):
        as_data(Items([{"x": torch.randn(9, 2)}, {"y": torch.randn(9, 2)}]), STEPS)


def test_a_waveform_and_its_rate_need_no_label() -> None:
    data = as_data(Items([(torch.randn(1, 4000), 8000)] * 2), DataOptions(sample_rate=8000))
    assert (data.takes, data.lengths.tolist(), data.labels) == ("waveforms", [4000, 4000], {})


def test_labels_and_the_ends_of_samples_are_part_of_the_identity() -> None:
    values = torch.randn(20, 2)

    def identity(cuts: list[int], labels: list[int]) -> str:
        return as_data(Items(list(zip(torch.split(values, cuts), labels, strict=True))), STEPS).identity

    found = {identity(*each) for each in (([10, 10], [0, 1]), ([12, 8], [0, 1]), ([10, 10], [1, 1]))}
    assert len(found) == 3
    assert identity([10, 10], [0, 1]) in found


def test_values_that_are_no_numbers_are_named() -> None:
    items = [torch.randn(5, 2) for _ in range(400)]
    items[303][2, 1] = float("nan")
    with pytest.raises(DataError, match="Item 303 of the data set is empty, or holds values that are no numbers"):
        as_data(Items(items), STEPS)


def test_pictures_are_no_steps() -> None:
    for length in (1, 2):
        with pytest.raises(DataError, match="pictures come in patches or whole"):
            as_data(Items([picture() for _ in range(3)]), DataOptions(frame_length=length))


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
        (Items([]), "no items"),
        (Items([(), ()]), "begins with a tuple"),
        (Items([torch.zeros(0, 2)] * 2), "is empty"),
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
