"""Labels from a CSV file, for data of any kind: a row for each sample, a column with its name, the others are labels.

They are no part of the data's identity: a file of labels may be written, mended or given when the encoder is trained already.
"""

import csv
import io
import unicodedata
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from layerwise.data.source import DataSet, several
from layerwise.data.splits import are_names_of_parts
from layerwise.data.views import Derived
from layerwise.errors import DataError, UnreadableFile
from layerwise.files import read_bytes

NAME_COLUMNS = (
    *("id", "path", "file", "filename", "file_name", "filepath", "file_path", "name"),
    *("image", "image_path", "img", "audio"),
)
"""What the column with the names of the samples may be called, in any case."""

FILE_BYTES = 2**30
"""Most that a file of labels may have."""

LONGEST = 200
"""Letters of a label; a column with longer texts holds none."""

NOWHERE, IN_SEVERAL = -1, -2
"""In place of the number of a sample: none has such a name, or several have."""


@dataclass(frozen=True, slots=True)
class Table:
    """A CSV file as it was read."""

    path: Path
    columns: list[str]
    rows: list[list[str]]
    """Each with a value for each column; an empty text where there is none."""

    def column(self, number: int) -> list[str]:
        """Its values, row by row."""
        return [row[number] for row in self.rows]


class Labelled(Derived):
    """A data set with more labels; it keeps its identity."""

    def __init__(self, data: DataSet, labels: Mapping[str, np.ndarray], notes: Sequence[str]) -> None:
        super().__init__(data, "")
        self.identity = data.identity
        self.labels = {**data.labels, **labels}
        self.notes = tuple(dict.fromkeys((*getattr(data, "notes", ()), *notes)))


def with_labels(data: DataSet, file: str) -> DataSet:
    """The data with the labels in a CSV file, if one is named, and a note on each label that only says how the data are split.

    A sample is named by its id, or by so much of its path that no other ends alike, with or without the ending of the file.
    Raises DataError where the file cannot be read, names no sample, or says two things of one.
    """
    labels, notes = _read_labels(Path(file).expanduser(), data) if file else ({}, [])
    notes += [
        f"The label {name!r} consists of names of splits ({', '.join(np.unique(values[values != '']))}): it says where a "
        "sample belongs, not what it is."
        for name, values in {**data.labels, **labels}.items()
        if are_names_of_parts(np.unique(values).tolist())
    ]
    return Labelled(data, labels, notes) if labels or notes else data


def _read_labels(path: Path, data: DataSet) -> tuple[dict[str, np.ndarray], list[str]]:
    """Label name to str [N], and what is to be said about them."""
    table = _read_table(path)
    column, samples = _naming_column(table, data.ids)
    row_of = _row_of_each_sample(table, column, samples, data.ids)
    labels: dict[str, np.ndarray] = {}
    left_out: list[str] = []
    for number, name in enumerate(table.columns):
        values = table.column(number)
        if number == column or not name:
            continue
        if reason := _no_label(name, values):
            left_out.append(f"{path}: {name!r} is no label, {reason}")
        else:
            labels[name] = np.array([values[row_of[each]] if each in row_of else "" for each in range(len(data.ids))])
    unnamed = [name for number, name in enumerate(data.ids) if number not in row_of]
    strangers = [row[column] for row, sample in zip(table.rows, samples, strict=True) if sample == NOWHERE]
    given = {name: int((values != "").sum()) for name, values in labels.items()}
    counts = [
        name if count == len(data.ids) else f"{name} ({count} of {len(data.ids)})" for name, count in given.items()
    ]
    notes = [f"labels from {path}, by {table.columns[column]}: {', '.join(counts) or 'none'}"]
    if unnamed:
        notes.append(f"{path} has no row for {len(unnamed)} of {len(data.ids)} samples: {several(unnamed)}")
    if strangers:
        notes.append(f"{path} has {len(strangers)} rows for samples that are not there: {several(strangers)}")
    return labels, notes + left_out


def _no_label(name: str, values: Iterable[str]) -> str:
    """Why a column cannot be a label, if it cannot."""
    if name == "." or "/" in name or "\0" in name:
        return "for its name would be that of a folder"
    longest = max(map(len, values), default=0)
    return "for it is empty" if not longest else f"for it holds up to {longest} letters" if longest > LONGEST else ""


def _read_table(path: Path) -> Table:
    """Raises DataError."""
    try:
        text = read_bytes(path, FILE_BYTES).decode("utf-8-sig")
        lines = csv.reader(io.StringIO(text, newline=""), delimiter=_delimiter(text))
        columns, *rows = [line for line in lines if any(map(str.strip, line))] or [[]]
    except FileNotFoundError:
        # A run may name it, too: to leave the option out would not help.
        raise DataError(
            f'There is no file of labels {path}; give --labels the one there is, or --labels "" for none.'
        ) from None
    except UnreadableFile as error:
        raise DataError(str(error)) from None
    except UnicodeDecodeError:
        raise DataError(f"{path} is no text in UTF-8; save it as CSV in UTF-8.") from None
    except csv.Error as error:
        raise DataError(f"{path} cannot be read as CSV: {error}; save it anew from the program that made it.") from None
    columns = [name.strip() for name in columns]
    if twice := next((name for name in columns if name and columns.count(name) > 1), None):
        raise DataError(f"{path} has two columns {twice!r}; give one of them another name.")
    if wide := next((number for number, row in enumerate(rows, 2) if any(row[len(columns) :])), None):
        raise DataError(
            f"{path}, row {wide}, has more values than there are columns; put a value with commas in quotes."
        )
    width = len(columns)
    return Table(path, columns, [[*map(str.strip, row[:width]), *[""] * (width - len(row))] for row in rows])


def _delimiter(text: str) -> str:
    """Comma, semicolon (as spreadsheets write it where the comma is for decimals) or tab: the commonest in the first line."""
    return max(",;\t", key=text.partition("\n")[0].count)


def _naming_column(table: Table, ids: Sequence[str]) -> tuple[int, list[int]]:
    """The column that names the samples best, and the number of the sample in each of its rows. Raises DataError.

    Any column with a name may do so, but where samples are called 0, 1, 2: these may stand for anything. So may a column of
    numbers, which look like 0.png without its ending; pandas writes those of the rows into a column without a name.
    """
    chosen = [number for number, name in enumerate(table.columns) if name.lower() in NAME_COLUMNS]
    if not chosen and not all(name.isdigit() for name in ids):
        chosen = [
            number
            for number, name in enumerate(table.columns)
            if name and not all(map(_is_number, filter(None, table.column(number))))
        ]
    if not chosen or not table.rows:
        raise DataError(
            f"{table.path} has {len(table.rows)} rows with the columns {', '.join(table.columns) or 'none'}; it needs a row "
            "for each sample, and a column id or path that names it."
        )
    found = {number: _numbers_of(table.column(number), ids) for number in chosen}
    matches = {number: _matches(table.column(number), found[number], ids) for number in chosen}
    column = max(chosen, key=lambda number: matches[number])
    if not any(matches[column]):
        raise DataError(
            f"{table.path} names no sample: its column {table.columns[column]} begins with {table.rows[0][column]!r}, and "
            f"the first sample is called {ids[0]!r}; give the names of the samples in a column id or path."
        )
    for other in chosen:
        if matches[other] == matches[column] and found[other] != found[column]:
            raise DataError(
                f"{table.path} names the samples in two columns, {table.columns[column]} and {table.columns[other]}, "
                "which fit them equally well and differ; call the right one id, and take the other out."
            )
    return column, found[column]


def _is_number(value: str) -> bool:
    """Of those that count something; 007 is a name."""
    return value.isdecimal() and str(int(value[:LONGEST])) == value


def _matches(values: Sequence[str], samples: Sequence[int], ids: Sequence[str]) -> tuple[int, int, int]:
    """How many samples a column names: exactly; also by the end of a path; also without the ending of the file.

    Columns are compared by these in turn: a number is soon the name of some file without its ending.
    """
    exact, ends = set(), set()
    for value, sample in zip(values, samples, strict=True):
        if sample in (NOWHERE, IN_SEVERAL):
            continue
        value, name = f"/{_plain(value)}", f"/{_plain(ids[sample])}"
        if value == name:
            exact.add(sample)
        if value.endswith(name) or name.endswith(value):
            ends.add(sample)
    return len(exact), len(ends), len({*samples} - {NOWHERE})


def _row_of_each_sample(table: Table, column: int, samples: Sequence[int], ids: Sequence[str]) -> dict[int, int]:
    """Number of a sample to that of its row. Raises DataError where a row means several samples, or rows disagree."""
    rows: dict[int, int] = {}
    for row, sample in enumerate(samples):
        name = table.rows[row][column]
        if sample == IN_SEVERAL:
            raise DataError(f"{table.path}: {name!r} is the name of several samples; write more of their paths.")
        if sample == NOWHERE:
            continue
        first = rows.setdefault(sample, row)
        if first != row and _without(table.rows[row], column) != _without(table.rows[first], column):
            raise DataError(f"{table.path} has two rows for {ids[sample]!r} that differ; leave one.")
    return rows


def _without(row: list[str], column: int) -> list[str]:
    return [*row[:column], *row[column + 1 :]]


def _numbers_of(values: Sequence[str], ids: Sequence[str]) -> list[int]:
    """The number of the sample that each value names."""
    names, values = [_plain(name) for name in ids], [_plain(value) for value in values]
    known = {name: number for number, name in enumerate(names)}
    if others := set(values) - known.keys() - {""}:
        known = _known_otherwise(others, names) | known
    return [known.get(value, NOWHERE) for value in values]


def _known_otherwise(values: set[str], names: Sequence[str]) -> dict[str, int]:
    """The number of the sample that these values name otherwise: by the longest common end, and first by a whole name."""
    whole = _index((form, number) for number, name in enumerate(names) for form in _forms(name))
    whole |= {name: number for number, name in enumerate(names)}
    longer = {
        value: next((whole[tail] for tail in (value, *_tails(value)) if tail in whole), NOWHERE) for value in values
    }
    found = {value: number for value, number in longer.items() if number != NOWHERE}
    # Of the other values alone: the ends of all paths would be many.
    left = values - found.keys()
    ends = ((form, n) for n, name in enumerate(names) for tail in _tails(name) for form in _forms(tail)) if left else ()
    return found | _index((form, number) for form, number in ends if form in left)


def _plain(name: str) -> str:
    """Letters in one form (file systems have two for é), and / between the parts of a path."""
    return unicodedata.normalize("NFC", name.replace("\\", "/")).removeprefix("./")


def _forms(name: str) -> tuple[str, ...]:
    """With and without the ending of the file."""
    dot = name.rfind(".")
    return (name, name[:dot]) if dot > name.rfind("/") + 1 else (name,)


def _tails(name: str) -> Iterator[str]:
    """What stands behind each / of a path, the longest first."""
    while "/" in name:
        name = name.partition("/")[2]
        yield name


def _index(names: Iterable[tuple[str, int]]) -> dict[str, int]:
    found: dict[str, int] = {}
    for name, number in names:
        found[name] = number if found.get(name, number) == number else IN_SEVERAL
    return found
