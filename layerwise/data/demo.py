"""The demo data set: the synthetic corpus, held in memory; it is the same on every machine and needs no file."""

import hashlib
from collections.abc import Sequence

import numpy as np
import torch

from layerwise.data.source import Skipped
from layerwise.data.synthesis import Utterance, synthesise_corpus


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
