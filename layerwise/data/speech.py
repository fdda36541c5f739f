"""Recordings as samples: any tree of audio files, mixed to mono and resampled to one rate.

Windows are read straight from the files, so host memory stays the same whatever the size of the data set. A window of a
file at another rate is resampled from the stretch around it, which gives what resampling the whole file would give.
Samples are divided by one number for the whole set, so that their mean square is 1, as in the reference code of Greedy
InfoMax (a constant measured on LibriSpeech there): otherwise the first layer sees little but its own biases.

Speech corpora whose labels are written in their file names: Free Spoken Digits and LibriSpeech."""

import hashlib
import json
import math
import os
import re
import struct
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import soundfile
import torch

from layerwise.data.listing import list_files
from layerwise.data.source import Skipped
from layerwise.errors import ConfigError, DataError

EXTENSIONS = {".wav", ".flac", ".ogg", ".opus", ".mp3"}
_FILTER_WIDTH = 6
_ROLLOFF = 0.99

LEVEL_RECORDINGS = 200
LEVEL_SECONDS = 10
"""The level of a set is measured on this many recordings, spread over the set, and this much of each."""


@dataclass(frozen=True, slots=True)
class Recording:
    """One audio file."""

    path: Path
    rate: int
    """Of the file, Hz."""
    frames: int
    """Of the file, samples per channel."""
    length: int
    """At the rate of the set, samples."""


class RecordingSet:
    """A DataSet of recordings; a frame is one audio sample, of shape (1,).

    Its identity covers names, rates, lengths and labels, not contents: hashing those would read the whole set at each start.
    """

    columns = 1
    frame_shape: tuple[int, ...] = (1,)
    views = 1
    takes = "waveforms"
    frame_label_names: tuple[str, ...] = ()

    def __init__(
        self,
        ids: Sequence[str],
        recordings: Sequence[Recording],
        rate: int,
        labels: dict[str, np.ndarray],
        test: np.ndarray | None,
        skipped: Sequence[Skipped],
        level: float,
    ) -> None:
        self.ids: Sequence[str] = tuple(ids)
        self.rate = rate
        self.labels = labels
        self.test = test
        self.skipped: Sequence[Skipped] = tuple(skipped)
        self.lengths = np.array([recording.length for recording in recordings], dtype=np.int64)
        self.level = level
        self._recordings = recordings
        files = [(name, recording.rate, recording.frames) for name, recording in zip(ids, recordings, strict=True)]
        described = {"rate": rate, "files": files, "labels": {name: values.tolist() for name, values in labels.items()}}
        self.identity = hashlib.sha256(json.dumps(described, sort_keys=True).encode()).hexdigest()

    def read(self, sample: int, start: int, stop: int, view: int = 0) -> torch.Tensor:
        """Samples start to stop: float32 [stop - start, 1] at the level of the set. Raises DataError for a damaged file."""
        recording = self._recordings[sample]
        if recording.rate == self.rate:
            samples = torch.from_numpy(_decode(recording, start, stop))
        else:
            samples = _read_resampled(recording, start, stop, self.rate)
        return samples[:, None] / self.level

    def frame_labels(self, name: str, sample: int, positions: np.ndarray) -> np.ndarray:
        """Recordings have no labels per frame."""
        raise DataError(f"Recordings have no {name!r} label per frame.")


def open_recordings(
    folder: Path, rate: int, pattern: str = "", shortest: int = 1, mismatch: str = "data.pattern matches no path"
) -> RecordingSet:
    """Every audio file below the folder, in the order of its path.

    pattern: a regular expression searched in each path relative to the folder, with / between its parts; its named
    groups become labels. Empty: the label `speaker` is the name of the folder that holds the file.
    shortest: recordings with fewer samples at `rate` are skipped. mismatch: what is said where no path matches.
    Raises DataError where the folder is missing or fewer than two recordings can be used, ConfigError for the pattern.
    """
    expression = _compiled(pattern)
    names, skipped = list_files(folder, EXTENSIONS, "recordings")
    ids, recordings, unusable = _inspected(folder, names, rate, shortest)
    skipped += unusable
    if len(ids) < 2:
        first = f"; the first: {skipped[0].path}, {skipped[0].reason}" if skipped else ""
        raise DataError(
            f"{folder} holds {len(ids)} usable recordings and {len(skipped)} unusable ones{first}. "
            "That is too few to train on."
        )
    labels, level = _labels(ids, expression, mismatch), _measure_level(recordings)
    return RecordingSet(ids, recordings, rate, labels, None, skipped, level)


def recordings_at(place: Path, rate: int, level: float, shortest: int = 1) -> RecordingSet:
    """One audio file, or every one below a folder, at a level that is known; nothing is too few.

    The label `speaker` is the name of the folder that holds the file. Raises DataError where nothing is there.
    """
    if place.is_file():
        folder, names, skipped = place.parent, [place.name], list[Skipped]()
    else:
        folder = place
        names, skipped = list_files(place, EXTENSIONS, "recordings")
    ids, recordings, unusable = _inspected(folder, names, rate, shortest)
    return RecordingSet(ids, recordings, rate, _labels(ids, None, ""), None, [*skipped, *unusable], level)


def _inspected(
    folder: Path, names: Sequence[str], rate: int, shortest: int
) -> tuple[list[str], list[Recording], list[Skipped]]:
    """The files of these names that can be used, and those that cannot."""
    with ThreadPoolExecutor(max_workers=os.cpu_count()) as pool:
        found = list(pool.map(lambda name: _inspect(folder, name, rate, shortest), names))
    usable = [(name, entry) for name, entry in zip(names, found, strict=True) if isinstance(entry, Recording)]
    skipped = [entry for entry in found if isinstance(entry, Skipped)]
    return [name for name, _ in usable], [entry for _, entry in usable], skipped


def _compiled(pattern: str) -> re.Pattern[str] | None:
    try:
        expression = re.compile(pattern) if pattern else None
    except re.error as error:
        raise ConfigError(f"data.pattern {pattern!r} is not a regular expression: {error}.") from None
    if expression is not None and not expression.groupindex:
        raise ConfigError(f"data.pattern {pattern!r} names no label; write a group such as (?P<speaker>[^/_]+).")
    return expression


def _inspect(folder: Path, name: str, rate: int, shortest: int) -> Recording | Skipped:
    path = folder / name
    try:
        with soundfile.SoundFile(path) as file:
            frames, file_rate = file.frames, file.samplerate
            if frames <= 0:
                return Skipped(name, "holds no sound")
            # A compressed file that was cut off still declares its full length; its last sample tells.
            file.seek(frames - 1)
            if len(file.read(1)) != 1:
                return Skipped(name, "is cut off")
        if _wav_is_cut_off(path):
            return Skipped(name, "is cut off")
    except (soundfile.LibsndfileError, OSError, RuntimeError) as error:
        return Skipped(name, f"cannot be decoded ({_reason(error)})")
    length = -(-frames * rate // file_rate)
    if length < shortest:
        return Skipped(
            name, f"lasts {length / rate:.3f} s, less than the {shortest / rate:.3f} s that the network needs"
        )
    return Recording(path, file_rate, frames, length)


def _reason(error: Exception) -> str:
    return str(getattr(error, "error_string", error)).rstrip(".")


def _wav_is_cut_off(path: Path) -> bool:
    """Whether the data chunk of a WAV file declares more bytes than follow; libsndfile reads such a file in silence."""
    with open(path, "rb") as file:
        if file.read(4) != b"RIFF":
            return False
        file.seek(12)
        while len(header := file.read(8)) == 8:
            kind, size = struct.unpack("<4sI", header)
            if kind == b"data":
                streamed = size in (0, 0xFFFFFFFF)
                return not streamed and file.tell() + size > os.fstat(file.fileno()).st_size
            file.seek(size + size % 2, os.SEEK_CUR)
    return False


def _labels(ids: Sequence[str], expression: re.Pattern[str] | None, mismatch: str) -> dict[str, np.ndarray]:
    if expression is None:
        return {"speaker": np.array([Path(name).parent.name for name in ids], dtype=str)}
    matches = [expression.search(name) for name in ids]
    if not any(matches):
        raise DataError(f"{mismatch}; the first one is {ids[0]}.")
    return {
        label: np.array([(match and match[label]) or "" for match in matches], dtype=str)
        for label in expression.groupindex
    }


def _measure_level(recordings: Sequence[Recording]) -> float:
    """Root of the mean square over recordings spread evenly over the set; 1 where all is silence."""
    chosen = np.unique(np.linspace(0, len(recordings) - 1, LEVEL_RECORDINGS).astype(int))
    energy = count = 0.0
    for recording in (recordings[number] for number in chosen.tolist()):
        samples = _decode(recording, 0, min(recording.frames, LEVEL_SECONDS * recording.rate))
        energy += float(np.square(samples, dtype=np.float64).sum())
        count += len(samples)
    return float(np.sqrt(energy / count)) or 1.0


def _decode(recording: Recording, start: int, stop: int) -> np.ndarray:
    """Samples start to stop of the file at its own rate: float32 [stop - start], the mean of its channels."""
    try:
        with soundfile.SoundFile(recording.path) as file:
            file.seek(start)
            samples = file.read(stop - start, dtype="float32", always_2d=True)
    except (soundfile.LibsndfileError, OSError, RuntimeError) as error:
        raise DataError(f"{recording.path} cannot be read any more ({_reason(error)}); restore or remove it.") from None
    if len(samples) != stop - start:
        raise DataError(
            f"{recording.path} gave {len(samples)} of {stop - start} samples from {start} on: it is damaged or has "
            "changed; restore or remove it."
        )
    if not np.isfinite(samples).all():
        raise DataError(f"{recording.path} holds samples that are not numbers; repair or remove it.")
    return samples.mean(axis=1)


def _read_resampled(recording: Recording, start: int, stop: int, rate: int) -> torch.Tensor:
    divisor = math.gcd(recording.rate, rate)
    step_in, step_out = recording.rate // divisor, rate // divisor
    # The filter repeats its phase every step_out outputs, so the stretch starts at a multiple of step_in.
    reach = math.ceil(_FILTER_WIDTH * step_in / (min(step_in, step_out) * _ROLLOFF)) + step_in
    first = max(start // step_out - math.ceil(reach / step_in), 0)
    last = -(-stop // step_out) * step_in + reach
    samples = torch.from_numpy(_decode(recording, first * step_in, min(last, recording.frames)))
    resampled = _resample()(samples, recording.rate, rate, lowpass_filter_width=_FILTER_WIDTH, rolloff=_ROLLOFF)
    return resampled[start - first * step_out : stop - first * step_out]


def _resample() -> Callable[..., torch.Tensor]:
    try:
        from torchaudio.functional import resample
    except (ImportError, OSError, RuntimeError) as error:
        raise DataError(
            f"torchaudio does not load beside torch {torch.__version__} ({error}); install the versions that belong "
            "together: pip install -c constraints.txt torch torchaudio."
        ) from None
    return resample


FSDD_PATTERN = r"(?P<digit>\d)_(?P<speaker>[^_/]+)_(?P<index>\d+)\.wav$"
FSDD_TEST_INDICES = {"0", "1", "2", "3", "4"}
"""The customary test split (Free Spoken Digit Dataset, README)."""

LIBRISPEECH_PATTERN = r"(?P<speaker>\d+)-(?P<chapter>\d+)-\d+\.flac$"


def open_fsdd(folder: Path, rate: int, shortest: int) -> RecordingSet:
    """`{digit}_{speaker}_{index}.wav` in the folder or in its sub-folder `recordings`. Raises DataError."""
    inner = folder / "recordings"
    mismatch = f"{folder} does not look like Free Spoken Digits: no file is named DIGIT_SPEAKER_INDEX.wav"
    recordings = open_recordings(inner if inner.is_dir() else folder, rate, FSDD_PATTERN, shortest, mismatch)
    indices = recordings.labels.pop("index")
    recordings.test = np.isin(indices, sorted(FSDD_TEST_INDICES))
    if recordings.test.all() or not recordings.test.any():
        recordings.test = None
    return recordings


def open_librispeech(folder: Path, rate: int, shortest: int) -> RecordingSet:
    """`SPEAKER/CHAPTER/SPEAKER-CHAPTER-UTTERANCE.flac`, at any depth below the folder. Raises DataError."""
    mismatch = f"{folder} does not look like LibriSpeech: no file is named SPEAKER-CHAPTER-UTTERANCE.flac"
    recordings = open_recordings(folder, rate, LIBRISPEECH_PATTERN, shortest, mismatch)
    if (recordings.labels["speaker"] == "").any():
        odd = recordings.ids[int(np.argmax(recordings.labels["speaker"] == ""))]
        raise DataError(
            f"{folder} is not LibriSpeech: {odd} is not named SPEAKER-CHAPTER-UTTERANCE.flac; try speech:{folder}."
        )
    return recordings
