"""Recordings as samples: any tree of audio files, mixed to mono and resampled to one rate.

Windows are read from the files, so host memory does not grow with the data set. A window of a file at another rate is
resampled from the stretch around it, which gives what resampling the whole file would give. All samples are divided by one
number, so that their mean square is 1, as in the reference code of Greedy InfoMax (a constant measured on LibriSpeech
there): otherwise the first layer sees little but its own biases. Free Spoken Digits and LibriSpeech write their labels in
file names.
"""

import json
import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import soundfile
import torch

from layerwise.data.channels import cancel, notes_on
from layerwise.data.files import Extensions, UsableFiles, usable_files
from layerwise.data.source import SampleSet, Skipped, digest
from layerwise.data.splits import folder_split
from layerwise.data.wav import data_chunk, open_sound
from layerwise.errors import ConfigError, DataError
from layerwise.importing import install_beside

EXTENSIONS = {".wav", ".w64", ".rf64", ".flac", ".ogg", ".opus", ".mp3"}
OTHER_FORMATS = {".m4a", ".aac", ".wma", ".amr", ".aif", ".aiff", ".caf", ".au"}
"""Of recordings that are not read."""

_FILTER_WIDTH = 6
_ROLLOFF = 0.99

LEVEL_RECORDINGS = 200
LEVEL_SECONDS = 10
"""The level of a set is measured on this many recordings, spread over the set, and this much of each."""

ABSURD = 1000
"""A recording with samples so many times as large as those of the others is left out."""

STRETCHES = 5
"""In which channels are compared, a second in all."""

BLOCK_FRAMES = 2**18
"""Decoded at once where a file is gone through."""

WHOLE_SECONDS = 60
"""A recording of floats that lasts no longer is gone through. Every process opens the set, and cannot read all of it."""

LOOKS = 10
"""Stretches of a second that are looked at in a longer one, the first and the last second among them."""


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
    patch: tuple[int, bytes] | None
    """What its header must be read as, see `DataChunk`."""
    peak: float
    """Of the samples that were looked at; 1 where its format holds no larger ones."""
    cancels: bool
    """Whether hardly anything is left of it when its channels are mixed."""


def open_recordings(
    place: Path,
    rate: int,
    pattern: str = "",
    shortest: int = 1,
    mismatch: str = "data.pattern matches no path",
    fewest: int = 2,
) -> SampleSet:
    """Every audio file below a folder, in the order of its path; a frame is one audio sample, of shape (1,).

    pattern: a regular expression searched in each path relative to the folder, with / between its parts; its named
    groups become labels. Empty: the label `speaker` is the name of the folder that holds the file. Outermost folders that are
    parts (see `folder_split`) are the customary split, and no speakers.
    shortest: recordings with fewer samples at `rate` are skipped. mismatch: what is said where no path matches.
    fewest: recordings that must be usable; where one is enough, `place` may be a file.
    Raises DataError where the folder is missing or too few recordings can be used, ConfigError for the pattern.
    """
    expression = _compiled(pattern)
    kinds = Extensions(EXTENSIONS, OTHER_FORMATS, "WAV or FLAC")
    files = _without_absurd(usable_files(place, kinds, "recordings", partial(_inspect, rate, shortest), fewest))
    recordings, split = files.details, folder_split(files.ids)
    if expression:
        labels = _labels(files.ids, expression, mismatch)
    else:
        folders = [Path(name).parts[1 if split else 0 : -1] for name in files.ids]
        labels = {"speaker": np.array([each[-1] if each else "" for each in folders], dtype=str)}
    # Without the contents: to hash those would read the whole set, in every process that opens it.
    described = {
        "rate": rate,
        "files": [(name, each.rate, each.frames) for name, each in zip(files.ids, recordings, strict=True)],
        "labels": {name: values.tolist() for name, values in labels.items()},
    }
    if split:
        described["split"] = split.folders
    return SampleSet(
        takes="waveforms",
        ids=files.ids,
        lengths=np.array([recording.length for recording in recordings], dtype=np.int64),
        frame_shape=(1,),
        identity=digest(json.dumps(described, sort_keys=True)),
        read_values=partial(_read, recordings, rate),
        measure_level=lambda data: _measure_level(recordings),
        labels=labels,
        test=split.test if split else None,
        held_out=split.held_out if split else None,
        skipped=files.skipped,
        notes=notes_on([name for name, each in zip(files.ids, recordings, strict=True) if each.cancels]),
    )


def _without_absurd(files: UsableFiles[Recording]) -> UsableFiles[Recording]:
    """Without those whose samples are far beyond those of the others: one would set the level of them all."""
    peaks = sorted(each.peak for each in files.details if each.peak)
    usual = max(peaks[(len(peaks) - 1) // 2], 1.0) if peaks else 1.0
    kept, absurd = [], []
    for name, recording in zip(files.ids, files.details, strict=True):
        if recording.peak > ABSURD * usual:
            absurd.append(
                Skipped(name, f"its samples reach {recording.peak:.3g}, those of the others about {usual:.3g}")
            )
        else:
            kept.append((name, recording))
    return UsableFiles(files.folder, [name for name, _ in kept], [each for _, each in kept], [*files.skipped, *absurd])


def _compiled(pattern: str) -> re.Pattern[str] | None:
    try:
        expression = re.compile(pattern) if pattern else None
    except re.error as error:
        raise ConfigError(f"data.pattern {pattern!r} is not a regular expression: {error}.") from None
    if expression is not None and not expression.groupindex:
        raise ConfigError(f"data.pattern {pattern!r} names no label; write a group such as (?P<speaker>[^/_]+).")
    return expression


def _inspect(rate: int, shortest: int, path: Path) -> Recording | str:
    """The recording, or why it cannot be used."""
    try:
        chunk = data_chunk(path)
        if chunk and chunk.is_cut_off:
            return "is cut off"
        patch = chunk.patch if chunk else None
        with open_sound(path, patch) as file:
            frames, file_rate = file.frames, file.samplerate
            if frames <= 0:
                return "holds no sound"
            # A compressed file that was cut off still declares its full length; its last sample tells.
            file.seek(frames - 1)
            if len(file.read(1)) != 1:
                return "is cut off"
            # Only these can hold what is no number, or out of all bounds.
            peak = _peak(file) if file.subtype in ("FLOAT", "DOUBLE") else 1.0
            if isinstance(peak, str):
                return peak
            cancels = file.channels > 1 and _cancels(file)
    except (soundfile.LibsndfileError, OSError, RuntimeError) as error:
        return f"cannot be decoded ({_reason(error)})"
    length = -(-frames * rate // file_rate)
    if length < shortest:
        return f"lasts {length / rate:.3f} s, less than the {shortest / rate:.3f} s that the network needs"
    return Recording(path, file_rate, frames, length, patch, peak, cancels)


def _peak(file: soundfile.SoundFile) -> float | str:
    """The largest absolute value of the samples; or why the file cannot be used, where one is no number.

    Of a long file some stretches alone: what lies between them is found when it is read, see `_decode`.
    """
    if file.frames <= WHOLE_SECONDS * file.samplerate:
        length, starts = BLOCK_FRAMES, list(range(0, file.frames, BLOCK_FRAMES))
    else:
        length = file.samplerate
        starts = _spread(file, length, LOOKS)
    peak = 0.0
    for start in starts:
        block = _stretch(file, start, length)
        largest = float(np.abs(block).max(initial=0.0))
        if not math.isfinite(largest):
            first = start + int(np.argmin(np.isfinite(block).all(axis=1)))
            return f"holds samples that are not numbers, the first at {first / file.samplerate:.3f} s"
        peak = max(peak, largest)
    return peak


def _cancels(file: soundfile.SoundFile) -> bool:
    """Whether its channels cancel, in stretches from its beginning to its end."""
    length = max(file.samplerate // STRETCHES, 1)
    return cancel(np.concatenate([_stretch(file, start, length) for start in _spread(file, length, STRETCHES)]))


def _spread(file: soundfile.SoundFile, length: int, count: int) -> list[int]:
    """Where stretches of a length begin that are spread over a file, from its beginning to its end."""
    starts: list[int] = np.linspace(0, max(file.frames - length, 0), count).astype(int).tolist()
    return starts


def _stretch(file: soundfile.SoundFile, start: int, length: int) -> np.ndarray:
    """Samples of a file from `start` on, [length or less, channels]."""
    file.seek(start)
    samples: np.ndarray = file.read(length, dtype="float32", always_2d=True)
    return samples


def _reason(error: Exception) -> str:
    return str(getattr(error, "error_string", error)).rstrip(".") or "it is damaged"


def _labels(ids: Sequence[str], expression: re.Pattern[str], mismatch: str) -> dict[str, np.ndarray]:
    """Those that are written in the names."""
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
        with open_sound(recording.path, recording.patch) as file:
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
        first = (start + int(np.argmin(np.isfinite(samples).all(axis=1)))) / recording.rate
        raise DataError(
            f"{recording.path} holds samples that are not numbers, the first at {first:.3f} s; repair or remove it."
        )
    return samples.mean(axis=1)


def _read(recordings: Sequence[Recording], rate: int, sample: int, start: int, stop: int, view: int) -> np.ndarray:
    """Samples start to stop of a recording at the rate of the set: float32 [stop - start, 1]."""
    recording = recordings[sample]
    if recording.rate == rate:
        return _decode(recording, start, stop)[:, None]
    divisor = math.gcd(recording.rate, rate)
    step_in, step_out = recording.rate // divisor, rate // divisor
    # The filter repeats its phase every step_out outputs, so the stretch starts at a multiple of step_in.
    reach = math.ceil(_FILTER_WIDTH * step_in / (min(step_in, step_out) * _ROLLOFF)) + step_in
    first = max(start // step_out - math.ceil(reach / step_in), 0)
    last = -(-stop // step_out) * step_in + reach
    samples = torch.from_numpy(_decode(recording, first * step_in, min(last, recording.frames)))
    resampled = load_resample()(samples, recording.rate, rate, lowpass_filter_width=_FILTER_WIDTH, rolloff=_ROLLOFF)
    return resampled[start - first * step_out : stop - first * step_out, None].numpy()


def load_resample() -> Callable[..., torch.Tensor]:
    """The function of torchaudio. Raises DataError where torchaudio does not load."""
    try:
        from torchaudio.functional import resample
    except (ImportError, OSError, RuntimeError) as error:
        raise DataError(
            f"torchaudio does not load beside torch {torch.__version__} ({error}), and recordings of another rate need it; "
            f"install the version that belongs to it: {install_beside('torchaudio', torch.__version__)}."
        ) from None
    return resample


FSDD_PATTERN = r"(?P<digit>\d)_(?P<speaker>[^_/]+)_(?P<index>\d+)\.wav$"
FSDD_TEST_INDICES = {"0", "1", "2", "3", "4"}
"""The customary test split (Free Spoken Digit Dataset, README)."""

LIBRISPEECH_PATTERN = r"(?P<speaker>\d+)-(?P<chapter>\d+)-\d+\.flac$"


def open_fsdd(folder: Path, rate: int, shortest: int) -> SampleSet:
    """`{digit}_{speaker}_{index}.wav` in the folder or in its sub-folder `recordings`. Raises DataError."""
    inner = folder / "recordings"
    mismatch = f"{folder} does not look like Free Spoken Digits: no file is named DIGIT_SPEAKER_INDEX.wav"
    recordings = open_recordings(inner if inner.is_dir() else folder, rate, FSDD_PATTERN, shortest, mismatch)
    indices = recordings.labels.pop("index")
    test = np.isin(indices, sorted(FSDD_TEST_INDICES))
    recordings.test = test if test.any() and not test.all() else None
    return recordings


def open_librispeech(folder: Path, rate: int, shortest: int) -> SampleSet:
    """`SPEAKER/CHAPTER/SPEAKER-CHAPTER-UTTERANCE.flac`, at any depth below the folder. Raises DataError."""
    mismatch = f"{folder} does not look like LibriSpeech: no file is named SPEAKER-CHAPTER-UTTERANCE.flac"
    recordings = open_recordings(folder, rate, LIBRISPEECH_PATTERN, shortest, mismatch)
    if (recordings.labels["speaker"] == "").any():
        odd = recordings.ids[int(np.argmax(recordings.labels["speaker"] == ""))]
        raise DataError(
            f"{folder} is not LibriSpeech: {odd} is not named SPEAKER-CHAPTER-UTTERANCE.flac; try speech:{folder}."
        )
    return recordings
