"""Opens the data set that `--data` names, framed, in as many views and with the labels that the options say."""

import copy
import re
from pathlib import Path
from typing import Any

import numpy as np

from layerwise.config import ARRAYS, DATA_KINDS, FUNCTION, OWN, PICTURES, Config, DataOptions
from layerwise.data.arrays import open_h5, open_npy
from layerwise.data.dataset import open_cifar10, open_dataset, open_stl10
from layerwise.data.images import open_images, patch_options
from layerwise.data.labels import with_labels
from layerwise.data.source import DataSet, SampleSet, digest
from layerwise.data.synthesis import Utterance, synthesise_corpus
from layerwise.data.views import Framed, WithViews
from layerwise.errors import ConfigError, DataError
from layerwise.importing import called


def open_data(options: DataOptions, shortest: int) -> DataSet:
    """The data set that the options name; samples of fewer than `shortest` frames are skipped where lengths differ.

    Raises DataError where it cannot be read, ConfigError where the name is none.
    """
    return with_labels(_framed(_open(options, shortest), options), options.labels)


def as_data(given: Any, options: DataOptions) -> DataSet:
    """What a user has in Python as a data set: a torch Dataset, an array or tensor [N, ...], or a DataSet of their own.

    Raises DataError where it is none of these.
    """
    return with_labels(_framed(_as_data_set(given, options), options), options.labels)


def _as_data_set(given: Any, options: DataOptions) -> DataSet:
    if hasattr(given, "frame_shape") and hasattr(given, "identity"):  # a DataSet of the user's own
        # A run may set the level, and another run with the same object is to find its own.
        own: DataSet = copy.copy(given)
        return own
    if not hasattr(given, "__getitem__") or isinstance(given, str | bytes | dict):
        raise DataError(
            f"The data are a {type(given).__name__}; give a torch.utils.data.Dataset, an array [samples, ...], or text as "
            "--data takes it."
        )
    return open_dataset(given, options)


def _framed(data: DataSet, options: DataOptions) -> DataSet:
    """In frames of several steps, and in several views, where the options ask for it. Raises DataError where they cannot."""
    if not data.level > 0:  # known from now on: where nothing can be learnt, that is said before anything is begun
        raise DataError(f"The data say that their level is {data.level}; it must be above 0.")
    whole = options.frames == "whole"
    if options.frames == "steps" and data.columns > 1:
        raise DataError("--frames steps: pictures come in patches or whole; give --frames patches or whole.")
    if options.frames == "steps" and (options.frame_length > 1 or options.frame_step not in (None, 1)):
        data = Framed(data, options.frame_length, options.frame_step or options.frame_length)
    if options.views not in (None, data.views):
        data = WithViews(data, options.views, whole, whole and options.flip)
    return data


def open_input(
    source: str, config: Config, takes: str, frame_shape: tuple[int, ...], level: float, shortest: int
) -> DataSet:
    """What a trained encoder is to be given: a file or a folder, or what --data takes; in one view.

    takes, frame_shape, level: of the run's data. What cannot be used is in `skipped`. Raises DataError where nothing is left
    or the encoder does not read such data.
    """
    named = source == "demo" or source.startswith(tuple(f"{kind}:" for kind in DATA_KINDS))
    path, read_as = Path(source).expanduser(), source
    if not named and path.exists():
        kind = {"waveforms": "speech", "pictures": "images"}.get(takes, "npy" if path.suffix == ".npy" else "h5")
        read_as = f"{kind}:{path}"
    elif not named and not re.fullmatch(FUNCTION, source):
        raise DataError(f"There is no file or folder {source}; name one, or KIND:PATH as --data takes it.")
    options = config.data.model_copy(update={"source": read_as, "views": None, "flip": False, "pattern": ""})
    data = _open(options, shortest, fewest=0)
    data.level = level  # of the run, not their own
    if data.takes != takes:
        given, taken = (kind.replace("waveforms", "recordings") for kind in (data.takes, takes))
        raise DataError(f"{source} holds {given}, but the encoder was trained on {taken}; name some of those.")
    data = _framed(data, options)
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


def _open(options: DataOptions, shortest: int, fewest: int = 2) -> DataSet:
    """fewest: recordings and pictures of speech: and images: that must be usable."""
    kind, _, place = options.source.partition(":")
    if kind == "demo":
        if options.frames != "steps":
            read, known = (
                ("pictures", PICTURES) if options.frames == "patches" else ("whole samples", (*PICTURES, *ARRAYS))
            )
            places = ", ".join(f"{each}:{'FILE' if each in ARRAYS else 'DIR'}" for each in known)
            raise ConfigError(
                f"--frames {options.frames}, which the recipe may say, reads {read}, and without --data there are only the "
                f"recordings of the demo; name some with --data, as {places}."
            )
        return open_demo()
    if options.source == OWN:
        raise ConfigError(
            "The data of this run were an object, or made by a function; give them again, with --data, or data= in Python."
        )
    if kind not in DATA_KINDS:
        return _as_data_set(called(options.source, "--data", DATA_KINDS), options)
    if not place:
        raise ConfigError(
            f"--data {options.source}: name the place too, like {kind}:{'FILE' if kind in ARRAYS else 'DIR'}."
        )
    path = _path(options.source, place)
    if kind == "npy":
        return open_npy(path, options.frames)
    if kind == "h5":
        file, colon, name = str(path).rpartition(":")  # FILE, or FILE:NAME
        named = colon and not path.exists()
        return open_h5(Path(file) if named else path, name if named else None, options.frames)
    if kind == "images":
        return open_images(path, patch_options(options), fewest)
    if kind in PICTURES:
        return {"stl10": open_stl10, "cifar10": open_cifar10}[kind](path, patch_options(options))
    from layerwise.data.speech import open_fsdd, open_librispeech, open_recordings

    if kind == "speech":
        return open_recordings(path, options.sample_rate, options.pattern, shortest, fewest=fewest)
    return {"fsdd": open_fsdd, "librispeech": open_librispeech}[kind](path, options.sample_rate, shortest)


def _path(source: str, place: str) -> Path:
    try:
        return Path(place).expanduser()
    except RuntimeError as error:
        raise DataError(f"--data {source} cannot be found: {error}.") from None


def open_demo() -> SampleSet:
    """The corpus of the recipe `demo`; a frame is one audio sample. Labels: speaker, and phone per frame.

    Two of five utterances are the test, of every speaker and whatever the seed: one of them is to be less than half a point.
    """
    utterances = synthesise_corpus()
    ids, lengths = tuple(each.name for each in utterances), [each.length for each in utterances]
    return SampleSet(
        takes="waveforms",
        ids=ids,
        lengths=np.array(lengths, dtype=np.int64),
        frame_shape=(1,),
        # The parameters, not the samples: these may differ by a rounding from one processor to the next.
        identity=digest(f"demo 5 {ids} {lengths}"),
        read_values=lambda sample, start, stop, view: utterances[sample].samples[start:stop, None],
        # One number for the whole set, as for recordings (see speech.py), of a part that is made soon.
        measure_level=lambda data: float(
            np.sqrt(np.mean([np.square(each.samples).mean() for each in utterances[::16]]))
        ),
        labels={"speaker": np.array([each.speaker for each in utterances], dtype=str)},
        test=np.arange(len(ids)) % 5 > 2,
        frame_label_names=("phone",),
        read_frame_labels=lambda name, sample, positions: _phones(utterances[sample], positions),
    )


def _phones(utterance: Utterance, positions: np.ndarray) -> np.ndarray:
    """The phone that sounds at each position, str [P]."""
    phone = np.searchsorted(utterance.phone_stops, positions, side="right")
    return np.array(utterance.phones, dtype=str)[np.clip(phone, 0, len(utterance.phones) - 1)]
