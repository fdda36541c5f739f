"""From `--data` to a data set, framed and in as many views as the options say.

The demo data set: the synthetic corpus, held in memory; it is the same on every machine and needs no file."""

import hashlib
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from layerwise.config import ARRAYS, DATA_KINDS, FUNCTION, OWN, Config, DataOptions
from layerwise.data.arrays import Framed
from layerwise.data.images import open_image_folder, patch_options, pictures_at
from layerwise.data.source import DataSet, Skipped
from layerwise.data.synthesis import Utterance, synthesise_corpus
from layerwise.data.views import WithViews
from layerwise.errors import ConfigError, DataError
from layerwise.importing import called


def open_data(options: DataOptions, shortest: int) -> DataSet:
    """The data set that the options name; samples of fewer than `shortest` frames are skipped where lengths differ.

    Raises DataError where it cannot be read, ConfigError where the name is none.
    """
    return framed(_measured(_open(options, shortest)), options)


def as_data(given: Any, options: DataOptions) -> DataSet:
    """What a user has in Python as a data set: a torch Dataset, an array or tensor [N, ...], or a DataSet of their own.

    Raises DataError where it is none of these.
    """
    return framed(_measured(given if is_data_set(given) else open_items(given, options)), options)


def is_data_set(given: Any) -> bool:
    """Whether it is a `DataSet` already, and knows its frames."""
    return hasattr(given, "frame_shape") and hasattr(given, "identity")


def open_items(given: Any, options: DataOptions) -> DataSet:
    """A torch Dataset, an array, a tensor, or a list, whose items are samples. Raises DataError."""
    from layerwise.data.dataset import open_dataset

    if not hasattr(given, "__getitem__") or isinstance(given, str | bytes | dict):
        raise DataError(
            f"The data are a {type(given).__name__}; give a torch.utils.data.Dataset, an array [samples, ...], or text as "
            "--data takes it."
        )
    return open_dataset(given, options)


def framed(data: DataSet, options: DataOptions) -> DataSet:
    """In frames of several steps, and in several views, where the options ask for it. Raises DataError where they cannot."""
    if options.frames == "steps" and data.columns > 1:
        raise DataError("--frames steps: pictures come in patches or whole; give --frames patches or whole.")
    if options.frames == "steps" and (options.frame_length > 1 or options.frame_step not in (None, 1)):
        data = Framed(data, options.frame_length, options.frame_step or options.frame_length)
    whole = options.frames == "whole"
    return (
        data if options.views in (None, data.views) else WithViews(data, options.views, whole, whole and options.flip)
    )


def _measured(data: DataSet) -> DataSet:
    """With its level known: where nothing can be learnt, that is said before anything is begun. Raises DataError."""
    if not data.level > 0:
        raise DataError(f"The data say that their level is {data.level}; it must be above 0.")
    return data


def open_input(
    source: str, config: Config, takes: str, frame_shape: tuple[int, ...], level: float, shortest: int
) -> DataSet:
    """What a trained encoder is to be given: a file or a folder, or what --data takes; in one view.

    takes, frame_shape, level: of the run's data. What cannot be used is in `skipped`. Raises DataError where nothing is left
    or the encoder does not read such data.
    """
    options = config.data.model_copy(update={"source": source, "views": None, "flip": False})
    kind, colon, place = source.partition(":")
    named = source == "demo" or (colon and kind in DATA_KINDS)
    plain = not named and Path(source).expanduser().exists()
    if not named and not plain and not re.fullmatch(FUNCTION, source):
        raise DataError(f"There is no file or folder {source}; name one, or KIND:PATH as --data takes it.")
    if plain or kind in ("speech", "images"):
        given = {"speech": "waveforms", "images": "pictures"}.get(kind if named else "", takes)
        data = _open_plain(_found(source, place if named else source), options, given, level, shortest)
    else:
        data = _open(options, shortest)
    data.level = level  # of the run, not their own
    return _usable(data, options, source, takes, frame_shape)


def _usable(data: DataSet, options: DataOptions, source: str, takes: str, frame_shape: tuple[int, ...]) -> DataSet:
    """The data in the run's frames. Raises DataError where an encoder of such data does not read them."""
    if data.takes != takes:
        given, taken = (kind.replace("waveforms", "recordings") for kind in (data.takes, takes))
        raise DataError(f"{source} holds {given}, but the encoder was trained on {taken}; name some of those.")
    data = framed(data, options)
    if not len(data.ids):
        first = data.skipped[0]
        raise DataError(
            f"Nothing of {source} can be used; {len(data.skipped)} files were skipped, the first: {first.path}, "
            f"{first.reason}. Name others."
        )
    if tuple(data.frame_shape) != tuple(frame_shape):
        shapes = [" x ".join(map(str, shape)) for shape in (data.frame_shape, frame_shape)]
        raise DataError(f"{source} has frames of {shapes[0]}, but the encoder was trained on frames of {shapes[1]}.")
    return data


def _open_plain(place: Path, options: DataOptions, takes: str, level: float, shortest: int) -> DataSet:
    """A file or a folder of what the encoder takes."""
    from layerwise.data.speech import recordings_at

    if takes == "waveforms":
        return recordings_at(place, options.sample_rate, level, shortest)
    if takes == "pictures":
        return pictures_at(place, patch_options(options))
    from layerwise.data.arrays import open_h5, open_npy

    return open_npy(place, options.frames) if place.suffix == ".npy" else open_h5(place, None, options.frames)


def _open(options: DataOptions, shortest: int) -> DataSet:
    kind, _, place = options.source.partition(":")
    if kind == "demo":
        return open_demo()
    if options.source == OWN:
        raise ConfigError("The data of this run were given as an object, in Python; give them again there, as data=.")
    if kind not in DATA_KINDS:
        given = called(options.source, "--data", DATA_KINDS)
        return given if is_data_set(given) else open_items(given, options)
    if not place:
        raise ConfigError(
            f"--data {options.source}: name the place too, like {kind}:{'FILE' if kind in ARRAYS else 'DIR'}."
        )
    folder = _found(options.source, place)
    if kind in ARRAYS:
        return _open_array(kind, folder, options)
    if kind in ("speech", "fsdd", "librispeech"):
        return _open_speech(kind, folder, options, shortest)
    return _open_pictures(kind, folder, options)


def _found(source: str, place: str) -> Path:
    try:
        return Path(place).expanduser()
    except RuntimeError as error:
        raise DataError(f"--data {source} cannot be found: {error}.") from None


def _open_speech(kind: str, folder: Path, options: DataOptions, shortest: int) -> DataSet:
    from layerwise.data.speech import open_fsdd, open_librispeech, open_recordings

    if kind == "fsdd":
        return open_fsdd(folder, options.sample_rate, shortest)
    if kind == "librispeech":
        return open_librispeech(folder, options.sample_rate, shortest)
    return open_recordings(folder, options.sample_rate, options.pattern, shortest)


def _open_pictures(kind: str, folder: Path, options: DataOptions) -> DataSet:
    from layerwise.data.torchvision_sets import open_cifar10, open_stl10

    opener = {"images": open_image_folder, "stl10": open_stl10, "cifar10": open_cifar10}[kind]
    return opener(folder, patch_options(options))


def _open_array(kind: str, place: Path, options: DataOptions) -> DataSet:
    """FILE, or of HDF5 FILE:NAME."""
    from layerwise.data.arrays import open_h5, open_npy

    if kind == "npy":
        return open_npy(place, options.frames)
    file, colon, name = str(place).rpartition(":")
    named = colon and not place.exists()
    return open_h5(Path(file) if named else place, name if named else None, options.frames)


class DemoSpeech:
    """A DataSet of synthetic utterances; a frame is one audio sample. Labels: speaker, and phone per frame."""

    takes = "waveforms"
    columns = 1
    frame_shape: tuple[int, ...] = (1,)
    views = 1
    test: np.ndarray | None = None
    skipped: Sequence[Skipped] = ()
    frame_label_names: tuple[str, ...] = ("phone",)

    def __init__(self, utterances: list[Utterance]) -> None:
        self.ids: Sequence[str] = tuple(utterance.name for utterance in utterances)
        self.lengths = np.array([len(utterance.samples) for utterance in utterances], dtype=np.int64)
        self.labels = {"speaker": np.array([utterance.speaker for utterance in utterances], dtype=str)}
        self._utterances = utterances
        # One number for the whole set, as for recordings (see speech.py).
        self.level = float(np.sqrt(np.mean([np.square(utterance.samples).mean() for utterance in utterances])))
        # The parameters, not the samples: these may differ by a rounding from one processor to the next.
        self.identity = hashlib.sha256(f"demo 3 {self.ids} {self.lengths.tolist()}".encode()).hexdigest()

    def read(self, sample: int, start: int, stop: int, view: int = 0) -> torch.Tensor:
        """Samples start to stop: float32 [stop - start, 1] at the level of the set."""
        return torch.from_numpy(self._utterances[sample].samples[start:stop, None] / self.level)

    def frame_labels(self, name: str, sample: int, positions: np.ndarray) -> np.ndarray:
        """The phone that sounds at each position, str [P]."""
        utterance = self._utterances[sample]
        phone = np.searchsorted(utterance.phone_stops, positions, side="right")
        return np.array(utterance.phones, dtype=str)[np.clip(phone, 0, len(utterance.phones) - 1)]


def open_demo() -> DemoSpeech:
    """The corpus of the recipe `demo`."""
    return DemoSpeech(synthesise_corpus())
