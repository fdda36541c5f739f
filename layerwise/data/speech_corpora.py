"""Speech corpora whose labels are written in their file names: Free Spoken Digits and LibriSpeech."""

from pathlib import Path

import numpy as np

from layerwise.data.speech import RecordingSet, open_recordings
from layerwise.errors import DataError

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
