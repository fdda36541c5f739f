"""STL-10 and CIFAR-10 in their published files, loaded and checked by torchvision, cut into patches as in images.py.

torchvision compares each file's MD5 before it reads (and unpickles) it, and holds the uint8 pictures in host memory
(STL-10: 3.1 GB). Nothing is downloaded: machines that train often have no network, and a folder named by mistake must
not be filled. torchvision is imported only here, when asked for, since a mismatched one fails at import.
"""

import os
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from layerwise.data.images import PatchOptions, PictureSet, identity, square_pixels
from layerwise.errors import DataError


def open_stl10(folder: str | os.PathLike[str], options: PatchOptions) -> PictureSet:
    """STL-10: 5000 training, 100 000 unlabeled (label "") and 8000 test pictures of 96×96, in this order.

    `folder` holds stl10_binary, or is it. Raises DataError where files are missing or damaged.
    """
    kind = _torchvision_datasets().STL10
    files = [name for name, _ in kind.train_list + kind.test_list] + [kind.class_names_file]
    # One split at a time: "train+unlabeled" would copy 3 GB to join them.
    splits = {name: {"split": name} for name in ("train", "unlabeled", "test")}
    parts = _load(kind, Path(folder), files, splits)
    return _picture_set("stl10", parts, [part.labels for part in parts.values()], files, options)


def open_cifar10(folder: str | os.PathLike[str], options: PatchOptions) -> PictureSet:
    """CIFAR-10: 50 000 training and 10 000 test pictures of 32×32, in this order.

    `folder` holds cifar-10-batches-py, or is it. Raises DataError where files are missing or damaged.
    """
    kind = _torchvision_datasets().CIFAR10
    files = [name for name, _ in kind.train_list + kind.test_list] + [kind.meta["filename"]]
    parts = _load(kind, Path(folder), files, {"train": {"train": True}, "test": {"train": False}})
    return _picture_set("cifar10", parts, [part.targets for part in parts.values()], files, options)


def _torchvision_datasets() -> Any:
    """The module torchvision.datasets."""
    try:
        from torchvision import datasets
    except (ImportError, OSError, RuntimeError) as error:
        raise DataError(
            f"torchvision cannot be imported beside torch {torch.__version__} ({error}); install versions that match: "
            "pip install -c constraints.txt torch torchvision"
        ) from error
    return datasets


def _load(kind: Any, folder: Path, files: list[str], splits: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """Split name to torchvision data set."""
    folder = Path(os.path.abspath(folder))
    inside = folder.name == kind.base_folder and not (folder / kind.base_folder).exists()
    root = folder.parent if inside else folder
    expected = f"{kind.base_folder} with {', '.join(files)}"
    missing = [name for name in files if not (root / kind.base_folder / name).is_file()]
    if missing:
        raise DataError(
            f"{kind.__name__} is not complete in {folder}: {', '.join(missing)} not found; unpack {kind.url} there, "
            f"so that it holds {expected}."
        )
    try:
        return {name: kind(root, download=False, **arguments) for name, arguments in splits.items()}
    except Exception as error:  # a failed checksum is a RuntimeError; unpickling can raise nearly anything
        raise DataError(
            f"{kind.__name__} in {folder} is damaged or cannot be read ({type(error).__name__}: {error}); unpack "
            f"{kind.url} there again, so that it holds {expected}."
        ) from error


def _picture_set(
    name: str, parts: dict[str, Any], targets: list[Any], files: list[str], options: PatchOptions
) -> PictureSet:
    """All splits as one data set; `targets` holds a class number for each picture of each split, -1 for none."""
    ids = [f"{split}/{i:06d}" for split, part in parts.items() for i in range(len(part))]
    class_names = np.array([*parts["train"].classes, ""])  # the last one, so -1, stands for no label
    folder = Path(parts["train"].root, parts["train"].base_folder)
    return PictureSet(
        pixels=partial(_read_part, list(parts.values()), options),
        options=options,
        ids=ids,
        labels={"class": class_names[np.concatenate([np.asarray(part, dtype=np.int64) for part in targets])]},
        test=np.array([sample.startswith("test/") for sample in ids]),
        skipped=[],
        identity=identity(name, options, [(file, (folder / file).stat().st_size) for file in files]),
    )


def _read_part(parts: list[Any], options: PatchOptions, sample: int) -> torch.Tensor:
    """The picture number `sample` of all splits, one after another."""
    for part in parts:
        if sample < len(part):
            return square_pixels(part[sample][0], options)
        sample -= len(part)
    raise IndexError(f"no picture {sample} beyond the last")
