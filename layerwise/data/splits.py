"""Names of the parts of a data set: a folder of this name says where a sample belongs, not what it is."""

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np

TRAINING, VALIDATION = {"train", "training"}, {"val", "valid", "validation", "dev", "eval", "evaluation"}
TEST = {"test", "testing"}
"""In small letters; folders may be written in any case, and with a `set` behind."""


@dataclass(frozen=True, slots=True)
class FolderSplit:
    """What the outermost folders say."""

    folders: tuple[str, ...]
    """Those that are parts, sorted."""
    test: np.ndarray | None
    """bool [N]: of the test part, or of the validation part where there is no other; None where there is neither."""
    held_out: np.ndarray | None
    """bool [N]: of the validation part where there is a test part, too."""


def folder_split(ids: Sequence[str]) -> FolderSplit | None:
    """The parts that the outermost folders of the paths name; None where these folders are classes.

    They are parts where all of them have such names, or where training data lie beside another part: a class may be called
    train, beside bus and tram.
    """
    tops = np.array([name.split("/")[0] if "/" in name else "" for name in ids], dtype=str)
    small = np.array([_in_short(top) for top in tops.tolist()], dtype=str)
    there = set(small.tolist()) - {""}
    parts = there & (TRAINING | VALIDATION | TEST)
    if not parts or not (parts == there or (parts & TRAINING and parts - TRAINING)):
        return None
    test, held_out = _part(small, TEST), _part(small, VALIDATION)
    if test is None:
        test, held_out = held_out, None
    folders = sorted({top for top, low in zip(tops.tolist(), small.tolist(), strict=True) if low in parts})
    return FolderSplit(tuple(folders), test, held_out if parts & TRAINING else None)


def _in_short(name: str) -> str:
    """test for Test, test_set or testset."""
    return re.sub(r"(?<=.)[ _-]?set$", "", name.lower())


def _part(tops: np.ndarray, names: set[str]) -> np.ndarray | None:
    """Where there are such samples, and others."""
    found = np.isin(tops, sorted(names))
    return found if found.any() and not found.all() else None


def are_names_of_parts(values: Iterable[str]) -> bool:
    """Whether the values of a label, those that are there, say nothing but the part of each sample."""
    found = {_in_short(value) for value in values if value}
    return bool(found) and found <= TRAINING | VALIDATION | TEST
