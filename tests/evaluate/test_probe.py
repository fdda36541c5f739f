"""The probe tells what can be told, and nothing else."""

import numpy as np
import pytest
import torch

from layerwise.evaluate.features import FRAMES_PER_SAMPLE, SampleSummary, choose_frames
from layerwise.evaluate.linear import probe_error


def split(count: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    return np.arange(0, count // 2), np.arange(count // 2, count * 3 // 4), np.arange(count * 3 // 4, count)


def test_separable_classes_are_told_apart_at_any_scale() -> None:
    rng = np.random.default_rng(0)
    classes = rng.integers(0, 3, 400)
    features = np.eye(3)[classes] + 0.05 * rng.standard_normal((400, 3))
    features = (features * [1e-4, 1, 1e4] + [5, -1e3, 7]).astype(np.float32)
    assert probe_error(features, classes, *split(400)) == 0


def test_noise_is_not_told_apart() -> None:
    rng = np.random.default_rng(0)
    classes = rng.integers(0, 4, 4000)
    features = rng.standard_normal((4000, 8)).astype(np.float32)
    assert probe_error(features, classes, *split(4000)) == pytest.approx(0.75, abs=0.05)


def test_dead_channels_do_no_harm() -> None:
    rng = np.random.default_rng(0)
    classes = rng.integers(0, 2, 200)
    features = np.stack([classes + 0.01 * rng.standard_normal(200), np.zeros(200), np.full(200, 3.0)], 1)
    assert probe_error(features.astype(np.float32), classes, *split(200)) == 0


def test_many_useless_channels_are_held_down_by_the_penalty() -> None:
    rng = np.random.default_rng(0)
    classes = rng.integers(0, 2, 400)
    features = rng.standard_normal((400, 150)).astype(np.float32)
    features[:, 0] += 4 * classes
    assert probe_error(features, classes, *split(400)) < 0.15


def test_a_summary_does_not_depend_on_the_pieces() -> None:
    frames = torch.arange(60, dtype=torch.float32).reshape(20, 3)
    chosen = np.array([0, 7, 8, 19])
    whole, pieces = SampleSummary(chosen), SampleSummary(chosen)
    whole.add(frames)
    for piece in frames.split([1, 6, 0, 5, 8]):
        pieces.add(piece)
    assert np.allclose(whole.mean, pieces.mean)
    assert np.allclose(pieces.mean, frames.mean(0))
    assert np.array_equal(pieces.chosen_frames, frames[chosen].numpy())


def test_chosen_frames_are_the_same_for_every_encoder_and_bounded() -> None:
    assert np.array_equal(choose_frames(3, 100, True), choose_frames(3, 100, True))
    assert len(choose_frames(3, 10_000, True)) == FRAMES_PER_SAMPLE
    assert choose_frames(3, 5, True).tolist() == [0, 1, 2, 3, 4]
    assert len(choose_frames(3, 100, False)) == 0
