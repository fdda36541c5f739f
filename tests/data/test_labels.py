"""A CSV file gives labels to data of any kind, and says what of it could not be used."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
from PIL import Image
from torch.utils.data import TensorDataset

from layerwise.config import DataOptions
from layerwise.data.labels import with_labels
from layerwise.data.open import as_data, open_data
from layerwise.data.source import DataSet, SampleSet
from layerwise.errors import DataError

PATHS = ("a/one.wav", "a/two.wav", "b/two.wav")


def samples(*ids: str, **labels: list[str]) -> SampleSet:
    return SampleSet(
        takes="arrays",
        ids=ids,
        lengths=np.ones(len(ids), dtype=np.int64),
        frame_shape=(1,),
        identity="theirs",
        read_values=lambda sample, start, stop, view: np.ones((stop - start, 1)),
        labels={name: np.array(values) for name, values in labels.items()},
    )


def labelled(folder: Path, text: str | bytes, data: DataSet | None = None) -> DataSet:
    path = folder / "labels.csv"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return with_labels(data or samples(*PATHS), str(path))


def found(data: DataSet) -> dict[str, list[str]]:
    return {name: values.tolist() for name, values in data.labels.items()}


@pytest.mark.parametrize(
    "text",
    [
        "path,who\na/one.wav,ada\nb/two.wav,bob\n",
        "who,id\nbob,b/two.wav\nada,a/one.wav\n",
        "File;who\r\na/one.wav;ada\r\nb/two.wav;bob\r\n",
        "filename\twho\na/one\tada\nb/two\tbob\n",
        "\ufeffpath,who\none.wav,ada\nb/two.wav,bob\n",
        'path,who\n./a/one.wav,"ada"\nb\\two.wav,bob\n',
        "path,who\n/elsewhere/a/one.wav,ada\n/elsewhere/b/two.wav,bob\n",
        "path,who\na/one.wav, ada \n\nb/two.wav,bob\na/two.wav\n",
        "id,path,who\n7,a/one.wav,ada\n8,b/two.wav,bob\n9,a/two.wav,\n",
        "path,who\na/one.wav,ada\na/one.wav,ada\nb/two.wav,bob\nc/three.wav,eve\n",
        "number,fname,who\n1,one.wav,ada\n2,b/two.wav,bob\n",
    ],
)
def test_a_row_names_its_sample_as_people_do(tmp_path: Path, text: str) -> None:
    data = labelled(tmp_path, text)
    assert data.labels["who"].tolist() == ["ada", "", "bob"]
    assert data.identity == "theirs"


def test_a_name_as_it_stands_comes_before_one_without_its_ending(tmp_path: Path) -> None:
    data = samples("a/one.wav", "a/one.wav.flac", "a/one")
    for prefix in ("", "/data/"):
        text = f"path,who\n{prefix}a/one,ada\n{prefix}a/one.wav,bob\n{prefix}a/one.wav.flac,eve\n"
        assert labelled(tmp_path, text, data).labels["who"].tolist() == ["bob", "eve", "ada"]


@pytest.mark.parametrize(
    "text",
    [
        ",image,animal\n0,2.png,cat\n1,0.png,dog\n2,1.png,cow\n",  # as pandas' to_csv writes it, with its index
        ",fname,animal\n0,2.png,cat\n1,0.png,dog\n2,1.png,cow\n",
        "number,fname,animal\n0,2.png,cat\n1,0.png,dog\n2,1.png,cow\n",
        "number,fname,animal\n0,/data/2.png,cat\n1,/data/0.png,dog\n2,/data/1.png,cow\n",
        "id,path,animal\n0,2.png,cat\n1,0.png,dog\n2,1.png,cow\n",
        "file,path,animal\n2.png,2.png,cat\n0.png,0.png,dog\n1.png,1.png,cow\n",
    ],
)
def test_labels_never_go_to_other_samples_for_a_column_of_numbers(tmp_path: Path, text: str) -> None:
    assert labelled(tmp_path, text, samples("0.png", "1.png", "2.png")).labels["animal"].tolist() == [
        "dog",
        "cow",
        "cat",
    ]


@pytest.mark.parametrize("names", ["image,path", "id,path"])
def test_two_columns_that_name_the_samples_equally_well_are_refused(tmp_path: Path, names: str) -> None:
    text = f"{names},animal\n0,2,cat\n1,0,dog\n2,1,cow\n"
    with pytest.raises(DataError, match=f"two columns, {names.replace(',', ' and ')}, .* call the right one id"):
        labelled(tmp_path, text, samples("0.png", "1.png", "2.png"))


def test_a_column_that_counts_rows_names_no_sample_but_under_such_a_name(tmp_path: Path) -> None:
    counted = "number,fname,animal\n0,2.jpg,cat\n1,0.jpg,dog\n2,1.jpg,cow\n"
    numbered, padded = samples("0.png", "1.png", "2.png"), samples("000.png", "001.png", "002.png")
    with pytest.raises(DataError, match="names no sample"):
        labelled(tmp_path, counted, numbered)
    named = labelled(tmp_path, counted.replace("number", "id"), numbered)
    like_names = labelled(tmp_path, "image_id,animal\n000,cat\n001,dog\n002,cow\n", padded)
    assert found(named)["animal"] == found(like_names)["animal"] == ["cat", "dog", "cow"]


def test_a_column_without_a_name_names_no_sample(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"names no sample: its column animal .* in a column id or path"):
        labelled(tmp_path, ",animal\n0.png,cat\n", samples("0.png"))


def test_letters_that_file_systems_write_in_two_ways_are_the_same(tmp_path: Path) -> None:
    assert found(labelled(tmp_path, "id,who\ncafe\u0301.wav,ada\n", samples("caf\xe9.wav"))) == {"who": ["ada"]}


def test_labels_of_the_file_come_before_those_of_the_data(tmp_path: Path) -> None:
    data = labelled(tmp_path, "id,who\n0,ada\n1,bob\n", samples("0", "1", who=["x", "y"], mood=["glad", ""]))
    assert found(data) == {"who": ["ada", "bob"], "mood": ["glad", ""]}


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("", "has 0 rows with the columns none"),
        ("path,who\n", "has 0 rows with the columns path, who"),
        ("clip,who\nx.wav,ada\n", r"names no sample: its column clip begins with 'x\.wav'"),
        ("path,who\nx.wav,ada\n", r"names no sample: its column path begins with 'x\.wav'.* called 'a/one\.wav'"),
        ("path,who\ntwo.wav,ada\n", r"'two\.wav' is the name of several samples"),
        ("path,who\na/one.wav,ada\na/one.wav,bob\n", r"two rows for 'a/one\.wav' that differ"),
        ("path,who\na/one.wav,ada,7\n", "row 2, has more values than there are columns"),
        ("path,who,who\na/one.wav,ada,7\n", "two columns 'who'"),
        (b"path,who\na/one.wav,\xe9va\n", "no text in UTF-8"),
        ("path,who\n" + "x" * 200_000 + ",ada\n", "cannot be read as CSV"),
    ],
)
def test_a_file_that_cannot_be_meant_is_refused(tmp_path: Path, text: str | bytes, complaint: str) -> None:
    with pytest.raises(DataError, match=complaint):
        labelled(tmp_path, text)


def test_numbers_are_names_of_samples_in_a_column_of_that_name_alone(tmp_path: Path) -> None:
    numbered = samples("0", "1")
    with pytest.raises(DataError, match="needs a row for each sample, and a column id or path"):
        labelled(tmp_path, "age,who\n0,ada\n1,bob\n", numbered)
    assert labelled(tmp_path, "age,id\n7,1\n8,0\n", numbered).labels["age"].tolist() == ["8", "7"]


def test_a_file_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"no file of labels .*nowhere\.csv"):
        with_labels(samples(*PATHS), str(tmp_path / "nowhere.csv"))
    with pytest.raises(DataError, match="cannot be read"):
        with_labels(samples(*PATHS), str(tmp_path))


def test_what_could_not_be_used_is_said(tmp_path: Path) -> None:
    text = f"path,who,said,,km/h,none\na/one.wav,ada,{'bla ' * 60},1,2,\nc/x.wav,eve,,,,\n"
    data = labelled(tmp_path, text)
    assert found(data) == {"who": ["ada", "", ""]}
    notes = "\n".join(data.notes)
    assert "by path: who" in notes
    assert "no row for 2 of 3 samples: a/two.wav, b/two.wav" in notes
    assert "1 rows for samples that are not there: c/x.wav" in notes
    assert "'said' is no label, for it holds up to 239 letters" in notes
    assert "'km/h' is no label, for its name would be that of a folder" in notes
    assert "'none' is no label, for it is empty" in notes


@pytest.mark.parametrize(
    ("values", "warned"),
    [
        (["train", "test", ""], True),
        (["Train", "DEV", "dev"], True),
        (["train", "bus", "tram"], False),
        (["", "", ""], False),
    ],
)
def test_a_label_of_names_of_splits_is_pointed_out(values: list[str], warned: bool) -> None:
    data = with_labels(samples(*PATHS, part=values), "")
    assert any("'part' consists of names of splits" in note for note in data.notes) == warned


def recordings(folder: Path) -> DataOptions:
    for name in ("x", "y", "z"):
        soundfile.write(folder / f"{name}.wav", np.random.default_rng(0).standard_normal(900) / 9, 8000)
    return DataOptions(source=f"speech:{folder}", sample_rate=8000)


def pictures(folder: Path) -> DataOptions:
    for name in ("x", "y", "z"):
        Image.new("L", (32, 32), ord(name)).save(folder / f"{name}.png")
    return DataOptions(source=f"images:{folder}", frames="patches", picture=32)


def an_array(folder: Path) -> DataOptions:
    np.save(folder / "array.npy", np.random.default_rng(0).standard_normal((3, 20, 2)))
    return DataOptions(source=f"npy:{folder / 'array.npy'}")


@pytest.mark.parametrize(("make", "first"), [(recordings, "x"), (pictures, "x.png"), (an_array, "0")])
def test_every_kind_of_data_takes_them(tmp_path: Path, make: Callable[[Path], DataOptions], first: str) -> None:
    options = make(tmp_path)
    (tmp_path / "labels.csv").write_text(f"path,mood,size\n{first},glad,3\n")
    without = open_data(options, 1)
    data = open_data(options.model_copy(update={"labels": str(tmp_path / "labels.csv")}), 1)
    assert (data.labels["mood"].tolist(), data.labels["size"].tolist()) == (["glad", "", ""], ["3", "", ""])
    assert data.identity == without.identity
    assert torch.equal(data.read(1, 0, 1), without.read(1, 0, 1))


def test_a_dataset_given_as_an_object_takes_them(tmp_path: Path) -> None:
    (tmp_path / "labels.csv").write_text("id,mood\n1,glad\n")
    items = TensorDataset(torch.randn(3, 9, 2), torch.tensor([1, 2, 1]))
    data = as_data(items, DataOptions(labels=str(tmp_path / "labels.csv")))
    assert found(data) == {"label": ["1", "2", "1"], "mood": ["", "glad", ""]}
