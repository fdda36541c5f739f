"""Any torch.utils.data.Dataset as a data set: torchvision's, torchaudio's, Hugging Face's, or one of the user's own.

An item is a sample, alone or with what is known about it: a tuple (sample, label, ...), or a dict as Hugging Face's. Pictures
(PIL) are resized and cut as files are; waveforms with their rate, as torchaudio has them, are mixed and resampled as files are;
other arrays and tensors are taken as they are: steps first, [L, C, ...], or whole, [C, ...].

Opening goes through all items once: it finds their lengths, shapes and labels, and a hash of the values names the data, so
that a resume notices where they have changed. Items must be the same at every call: a data set that augments at random is
refused, for caches would hold one of its renderings for ever.

STL-10 and CIFAR-10 are named by their kind, and read from their published files. torchvision compares each file's MD5 before it
reads (and unpickles) it, and holds the uint8 pictures in host memory (STL-10: 3.1 GB). Nothing is downloaded: machines that
train often have no network, and a folder named by mistake must not be filled. torchvision is imported only where it is needed,
since a mismatched one fails at import.
"""

import hashlib
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from PIL import Image
from torch.utils.data import ConcatDataset

from layerwise.config import DataOptions
from layerwise.data.arrays import measure_level, without_absurd
from layerwise.data.channels import cancel, notes_on
from layerwise.data.images import PatchOptions, patch_options, picture_identity, picture_set, square_pixels
from layerwise.data.source import SampleSet, digest
from layerwise.errors import DataError
from layerwise.importing import import_torchvision

READ_TWICE = 3
"""Items that are read a second time."""

RATES = range(1000, 1_000_001)
"""Sampling rates of sound, Hz; other whole numbers behind a tensor are labels."""

CHANNELS = 8
"""Most channels of a waveform."""


class Items(Protocol):
    """What a map-style torch.utils.data.Dataset is."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Any: ...


@dataclass(frozen=True, slots=True)
class Item:
    """A sample and what is known about it."""

    sample: Any
    """A picture, or an array."""
    labels: dict[str, str]
    rate: int | None
    """Of a waveform, Hz."""
    where: str
    """What of the item the sample is."""
    left_out: dict[str, str]
    """Names of values that are neither sample nor label, and what they are."""

    @property
    def described(self) -> str:
        """The sample in a few words."""
        if isinstance(self.sample, Image.Image):
            return f"a picture of {self.sample.width} x {self.sample.height}"
        return f"{self.sample.dtype} {self.sample.shape}{f', sound at {self.rate} Hz' if self.rate else ''}"


def open_dataset(items: Items, options: DataOptions) -> SampleSet:
    """The items as the options frame them. Raises DataError where they cannot be used, naming the first that cannot."""
    count, first = _count(items), item_of(items, 0)
    shape = _values(first, options, 0).shape[1:]
    contents, lengths = hashlib.sha256(), []
    labels: list[dict[str, str]] = []
    left_out: dict[str, str] = {}
    cancelling: list[str] = []
    peaks: dict[int, float] = {}
    for number in range(count):
        item = item_of(items, number)
        if item.where != first.where:
            raise DataError(
                f"The sample of item {number} of the data set is {item.where}, and of the first {first.where}; all must agree."
            )
        values = _values(item, options, number)
        if values.shape[1:] != shape:
            raise DataError(
                f"Item {number} of the data set has frames of {values.shape[1:]}, and the first of {shape}; all must agree. "
                "Sequences of several lengths need --frames steps."
            )
        if not np.isfinite(values).all() or not values.size:
            raise DataError(
                f"Item {number} of the data set is empty, or holds values that are no numbers; leave it out."
            )
        peaks[number] = float(np.abs(values).max())
        lengths.append(len(values))
        labels.append(item.labels)
        left_out |= item.left_out
        if item.rate is not None and item.sample.ndim == 2 and cancel(item.sample.T):
            cancelling.append(str(number))
        contents.update(f"{values.dtype} {values.shape} {sorted(item.labels.items())}".encode())
        contents.update(np.ascontiguousarray(values).tobytes())
        if number < READ_TWICE and not np.array_equal(values, _values(item_of(items, number), options, number)):
            raise DataError(
                "The data set gives another sample at each call: it augments at random, and a cache would keep one rendering "
                "for ever. Leave the augmentation out; --views N makes renderings that are cached side by side."
            )
    names = dict.fromkeys(name for each in labels for name in each if name not in left_out)
    named = {name: np.array([each.get(name, "") for each in labels]) for name in names}
    notes = [_what_was_taken(first, list(names), left_out), *notes_on(cancelling)]
    ids = [str(number) for number in range(count)]
    newest = lru_cache(maxsize=4)(lambda number: _values(item_of(items, number), options, number))
    if isinstance(first.sample, Image.Image):
        framing = patch_options(options)
        identity = picture_identity("dataset", framing, [(contents.hexdigest(), count)])
        pictures = picture_set(lambda number: torch.from_numpy(newest(number)), framing, ids, identity, named)
        pictures.notes = notes
        return pictures
    data = SampleSet(
        takes="arrays" if first.rate is None else "waveforms",
        ids=ids,
        lengths=np.array(lengths, dtype=np.int64),
        frame_shape=shape,
        identity=digest(f"dataset {options.frames} {options.sample_rate} {contents.hexdigest()}"),
        read_values=lambda number, start, stop, view: newest(number)[start:stop],
        measure_level=measure_level,
        labels=named,
        notes=notes,
    )
    return without_absurd(data, peaks)


def _what_was_taken(first: Item, labels: Sequence[str], left_out: Mapping[str, str]) -> str:
    """A line about the items."""
    others = ", ".join(f"{name} ({kind})" for name, kind in left_out.items())
    return (
        f"the sample is {first.where} of each item, {first.described} in the first; labels: {', '.join(labels) or 'none'}"
        f"{f'; left out: {others}' if others else ''}"
    )


def item_of(items: Items, number: int) -> Item:
    """One item, taken apart. Raises DataError where it has no sample that can be used."""
    try:
        item = items[number]
    except Exception as error:
        raise DataError(f"Item {number} of the data set cannot be read ({type(error).__name__}: {error}).") from error
    if isinstance(item, Mapping):
        return _of_mapping(item, number)
    if (isinstance(item, tuple) and item) or (isinstance(item, list) and _numbers(item) is None):
        return _of_tuple(tuple(item), number)
    return _item(_array(item, number), "all of it", {}, None)


def _of_mapping(item: Mapping[str, Any], number: int) -> Item:
    """The sample is the first array or picture that is no label."""
    labels = {name: label_of(value) for name, value in item.items()}
    usable = [name for name, value in item.items() if _may_be_sample(value)]
    found = next((name for name in usable if labels[name] is None), usable[0] if usable else None)
    if found is None:
        raise DataError(f"Item {number} of the data set holds no array and no picture, only {', '.join(item)}.")
    sample, rate = item[found], None
    if isinstance(sample, Mapping):  # audio of Hugging Face
        sample, rate = sample["array"], int(sample["sampling_rate"])
    others = {name: value for name, value in item.items() if name != found}
    return _item(_array(sample, number), repr(found), others, rate)


def _of_tuple(item: tuple[Any, ...], number: int) -> Item:
    """The sample comes first; what stands behind it is named by its place."""
    array, others, rate = _array(item[0], number), list(item[1:]), None
    if others and _is_rate(_plain(others[0])) and isinstance(item[0], torch.Tensor) and _is_sound(array):
        rate, *others = others
    names = ["label", *(f"label_{place}" for place in range(2, len(others) + 1))]
    return _item(array, "the first value", dict(zip(names, others, strict=False)), None if rate is None else int(rate))


def _item(sample: Any, where: str, others: Mapping[str, Any], rate: int | None) -> Item:
    labels = {name: label_of(value) for name, value in others.items()}
    known = {name: label for name, label in labels.items() if label}
    return Item(sample, known, rate, where, {name: _kind(others[name]) for name in labels if labels[name] is None})


def label_of(value: Any) -> str | None:
    """The label that a value is: a word, or a whole number; of a one-hot vector the place of its one. None where it is none.

    Empty where it is missing: None, or not a number, as tables have it. Where one is missing they write the others as 3.0.
    """
    value = _plain(value)
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return ""
    if isinstance(value, float) and value.is_integer() and abs(value) < 2**53:
        return str(int(value))
    if isinstance(value, bytes):
        return value.decode(errors="replace")
    if isinstance(value, str | int):
        return str(value)
    return _place_of_one(value)


def _place_of_one(value: Any) -> str | None:
    vector = _numbers(value) if isinstance(value, np.ndarray | torch.Tensor | list) else None
    if vector is None or vector.size != max(vector.shape) or np.count_nonzero(vector) != 1 or vector.sum() != 1:
        return None
    return str(int(vector.argmax()))


def _plain(value: Any) -> Any:
    """What an array, a tensor or a list of one value holds, and a number of numpy's or torch's, as Python's."""
    if isinstance(value, list | tuple) and len(value) == 1:
        return _plain(value[0])
    one = isinstance(value, np.generic) or (isinstance(value, np.ndarray) and value.size == 1)
    if one or (isinstance(value, torch.Tensor) and value.numel() == 1):
        return value.item()
    return value


def _may_be_sample(value: Any) -> bool:
    if isinstance(value, Mapping):
        return "array" in value
    return isinstance(value, Image.Image) or (not isinstance(value, str | bytes) and _numbers(value) is not None)


def _kind(value: Any) -> str:
    shape = getattr(value, "shape", None)
    return type(value).__name__ if shape is None else f"{type(value).__name__} {tuple(shape)}"


def _is_rate(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value in RATES


def _is_sound(array: Any) -> bool:
    """[channels, samples], as all of torchaudio's data sets have it."""
    return isinstance(array, np.ndarray) and array.ndim == 2 and len(array) <= min(CHANNELS, array.shape[1])


def _array(sample: Any, number: int) -> Any:
    """A picture as it is; anything else as an array of numbers."""
    if isinstance(sample, Image.Image):
        return sample
    array = None if isinstance(sample, tuple) else _numbers(sample)
    if array is None:
        raise DataError(
            f"Item {number} of the data set begins with a {type(sample).__name__}; give a tensor, an array or a picture first, "
            "and what is known about it behind."
        )
    return array


def _values(item: Item, options: DataOptions, number: int) -> np.ndarray:
    """[L, *frame shape]: pictures as pixels, waveforms as steps of one channel, others as they are framed."""
    if isinstance(item.sample, Image.Image):
        return square_pixels(item.sample, patch_options(options)).numpy()
    array = item.sample
    if item.rate is not None:
        return _waveform(array, item.rate, options.sample_rate)[:, None]
    if options.frames == "patches":
        raise DataError(
            f"Item {number} of the data set is an array; --frames patches needs pictures (PIL), others steps or whole."
        )
    if options.frames == "whole":
        return array[None]
    return array[:, None] if array.ndim == 1 else array


def _numbers(value: Any) -> np.ndarray | None:
    """A tensor, an array or a list as an array of numbers; None where it is none."""
    try:
        array = np.asarray(value.detach().cpu() if isinstance(value, torch.Tensor) else value)
    except Exception:  # a ragged list, or whatever an object of the user's raises
        return None
    return array if array.dtype.kind in "fiub" and array.ndim else None


def _waveform(array: np.ndarray, rate: int, wanted: int) -> np.ndarray:
    """One channel at the wanted rate."""
    mono = torch.from_numpy(np.ascontiguousarray(np.atleast_2d(array), dtype=np.float32)).mean(0)
    if rate != wanted:
        from layerwise.data.speech import load_resample

        mono = load_resample()(mono, rate, wanted)
    return mono.numpy()


def _count(items: Items) -> int:
    try:
        count = len(items)
    except TypeError:
        raise DataError(
            f"The data set, a {type(items).__name__}, has no length; give a map-style one, with __len__ and __getitem__."
        ) from None
    if count < 1:
        raise DataError("The data set has no items.")
    return count


def open_stl10(folder: Path, options: PatchOptions) -> SampleSet:
    """STL-10: 5000 training, 100 000 unlabeled (label "") and 8000 test pictures of 96×96, in this order.

    `folder` holds stl10_binary, or is it. Raises DataError where files are missing or damaged.
    """
    kind = import_torchvision(DataError).datasets.STL10
    # One split at a time: "train+unlabeled" would copy 3 GB to join them.
    splits = {name: {"split": name} for name in ("train", "unlabeled", "test")}
    return _open_published(kind, kind.class_names_file, splits, "labels", folder, options)


def open_cifar10(folder: Path, options: PatchOptions) -> SampleSet:
    """CIFAR-10: 50 000 training and 10 000 test pictures of 32×32, in this order.

    `folder` holds cifar-10-batches-py, or is it. Raises DataError where files are missing or damaged.
    """
    kind = import_torchvision(DataError).datasets.CIFAR10
    splits = {"train": {"train": True}, "test": {"train": False}}
    return _open_published(kind, kind.meta["filename"], splits, "targets", folder, options)


def _open_published(
    kind: Any, classes_file: str, splits: dict[str, dict[str, Any]], targets: str, folder: Path, options: PatchOptions
) -> SampleSet:
    """All splits of a class of torchvision as one data set.

    splits: name of each to the arguments that choose it; targets: the attribute with the class numbers, -1 for no class.
    """
    folder = Path(os.path.abspath(folder))
    inside = folder.name == kind.base_folder and not (folder / kind.base_folder).exists()
    root = folder.parent if inside else folder
    files = [name for name, _ in kind.train_list + kind.test_list] + [classes_file]
    expected = f"{kind.base_folder} with {', '.join(files)}"
    missing = [name for name in files if not (root / kind.base_folder / name).is_file()]
    if missing:
        raise DataError(
            f"{kind.__name__} is not complete in {folder}: {', '.join(missing)} not found; unpack {kind.url} there, "
            f"so that it holds {expected}."
        )
    try:
        parts = {name: kind(root, download=False, **arguments) for name, arguments in splits.items()}
    except Exception as error:  # a failed checksum is a RuntimeError; unpickling can raise nearly anything
        raise DataError(
            f"{kind.__name__} in {folder} is damaged or cannot be read ({type(error).__name__}: {error}); unpack "
            f"{kind.url} there again, so that it holds {expected}."
        ) from error
    ids = [f"{split}/{i:06d}" for split, part in parts.items() for i in range(len(part))]
    class_names = np.array([*parts["train"].classes, ""])  # the last one, so -1, stands for no label
    numbers = np.concatenate([np.asarray(getattr(part, targets), dtype=np.int64) for part in parts.values()])
    sizes = [(file, (root / kind.base_folder / file).stat().st_size) for file in files]
    pictures: ConcatDataset[Any] = ConcatDataset(parts.values())
    return picture_set(
        pixels=lambda sample: square_pixels(pictures[sample][0], options),
        options=options,
        ids=ids,
        identity=picture_identity(kind.__name__.lower(), options, sizes),
        labels={"class": class_names[numbers]},
        test=np.array([name.startswith("test/") for name in ids]),
    )
