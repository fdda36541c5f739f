"""What the input tells without anything learnt, for a probe to be held against, so that nobody is fooled.

Pictures pass through random filters; of recordings the levels of mel bands are taken. Of other data there is no baseline.
"""

import hashlib
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

from layerwise.config import Config
from layerwise.data.source import DataSet
from layerwise.evaluate.classifiers import fit_and_test
from layerwise.evaluate.examples import FeatureRows, Poll
from layerwise.evaluate.targets import ProbeTargets, ProbeTask, choose_frames
from layerwise.run_store.state import Baseline
from layerwise.training.spec import StageSpec

FILTERS, KERNEL, CELLS = 256, 5, 4
"""Of pictures: filters of KERNEL x KERNEL pixels, whose outputs above zero are averaged over CELLS x CELLS cells."""

SIDE = 32
"""Pixels a side that the filters see; larger pictures are made smaller."""

PICTURES = 64
"""That are filtered at once."""

BANDS, WINDOW, STEP = 40, 0.025, 0.01
"""Of recordings: mel bands of windows of so many seconds, one after each step."""

PIECE = 60
"""Seconds of a recording that are in memory at once."""


def baseline_of(
    task: ProbeTask,
    targets: ProbeTargets,
    spec: StageSpec,
    classifier: str,
    config: Config,
    folder: Path,
    known: Baseline | None = None,
    poll: Poll = lambda: None,
) -> Baseline | None:
    """The error of the same classifier on the same samples; None where the data are neither pictures nor recordings.

    spec: the stage whose frames are told where the label is per frame. known: what an earlier probe has found, which is
    believed where it was asked the same. poll: may raise.
    """
    data = task.data
    asked = hashlib.sha256(classifier.encode() + task.samples.tobytes() + targets.classes.tobytes()).hexdigest()
    if known is not None and known.asked == asked:
        return known
    if data.columns > 1 or (config.data.frames == "whole" and len(data.frame_shape) == 3):
        name, rows = f"random filters, {CELLS} x {CELLS}", picture_rows(task, config)
    elif data.takes == "waveforms" and data.frame_shape == (1,):
        rows = frame_rows(task, spec, config) if task.per_frame else recording_rows(task, config)
        name = "mel bands" if task.per_frame else "mel bands, mean and deviation"
    else:
        return None
    features = FeatureRows(folder)
    for some in rows:
        poll()
        features.append(some)
    error, _ = fit_and_test(features, targets, classifier, poll)
    features.close()
    return Baseline(name, error, asked)


def picture_rows(task: ProbeTask, config: Config) -> Iterator[np.ndarray]:
    """float32 [n, FILTERS * CELLS²] of the samples in their order."""
    channels = task.data.frame_shape[0]
    filters = torch.randn(FILTERS, channels, KERNEL, KERNEL, generator=torch.Generator().manual_seed(0))
    filters -= filters.mean((1, 2, 3), keepdim=True)  # blind to brightness, of which filters would see little else
    for samples in np.array_split(task.samples, -(-len(task.samples) // PICTURES)):
        pictures = torch.stack([_picture(task.data, config, sample) for sample in samples.tolist()])
        if max(pictures.shape[2:]) > SIDE:
            pictures = F.adaptive_avg_pool2d(pictures, SIDE)
        outputs = F.conv2d(pictures, filters, padding=KERNEL // 2).relu_()
        yield F.adaptive_avg_pool2d(outputs, CELLS).flatten(1).numpy()


def _picture(data: DataSet, config: Config, sample: int) -> torch.Tensor:
    """float32 [C, height, width]; where it comes in patches, they are put together again."""
    frames = data.read(sample, 0, int(data.lengths[sample]))
    if data.columns == 1:
        return frames[0]
    patch, step, rows = frames.shape[2:], config.data.patch_stride, len(frames) // data.columns
    shape = ((rows - 1) * step + patch[0], (data.columns - 1) * step + patch[1])
    overlapping = torch.stack([frames, torch.ones_like(frames)]).flatten(2).mT
    total, count = F.fold(overlapping, shape, tuple(patch), stride=step)
    return total / count.clamp(min=1)


def recording_rows(task: ProbeTask, config: Config) -> Iterator[np.ndarray]:
    """float32 [1, 2 * BANDS] of each sample: mean and deviation of each band."""
    rate, data = config.data.sample_rate, task.data
    width, step = int(WINDOW * rate), int(STEP * rate)
    for sample in task.samples.tolist():
        length, levels = int(data.lengths[sample]), []
        for start in range(0, length, PIECE * rate):
            sound = data.read(sample, start, min(start + PIECE * rate, length))[:, 0]
            sound = F.pad(sound, (0, max(width - len(sound), 0)))
            levels.append(_levels(sound.unfold(0, width, step), rate))
        of_sample = torch.cat(levels)
        yield torch.cat([of_sample.mean(0), of_sample.std(0, correction=0)])[None].numpy()


def frame_rows(task: ProbeTask, spec: StageSpec, config: Config) -> Iterator[np.ndarray]:
    """float32 [frames, BANDS] of each sample: the bands around each frame of the stage that the probe sees."""
    rate, data = config.data.sample_rate, task.data
    width = int(WINDOW * rate)
    for sample in task.samples.tolist():
        frames = choose_frames(sample, int(spec.output_lengths[sample]), per_frame=True)
        middles = frames * spec.geometry.hop + spec.geometry.offset
        length = int(data.lengths[sample])
        starts = np.clip(middles - width / 2, 0, max(length - width, 0)).astype(int).tolist()
        windows = [data.read(sample, start, min(start + width, length))[:, 0] for start in starts]
        yield _levels(torch.stack([F.pad(window, (0, width - len(window))) for window in windows]), rate).numpy()


def _levels(windows: torch.Tensor, rate: int) -> torch.Tensor:
    """float32 [n, BANDS]: logarithms of the power of windows [n, width] in each band."""
    width = windows.shape[1]
    power = torch.fft.rfft(windows * torch.hann_window(width)).abs().square()
    return (power @ torch.from_numpy(mel_bands(rate, width)) + 1e-6).log()


def mel_bands(rate: int, width: int) -> np.ndarray:
    """float32 [width // 2 + 1, BANDS]: what each frequency counts in triangular bands of equal width in mel."""
    frequencies = 2595 * np.log10(1 + np.fft.rfftfreq(width, 1 / rate) / 700)
    edges = np.linspace(0, 2595 * np.log10(1 + rate / 1400), BANDS + 2)
    rising = (frequencies[:, None] - edges[:-2]) / (edges[1] - edges[0])
    return np.maximum(0, np.minimum(rising, 2 - rising)).astype(np.float32)
