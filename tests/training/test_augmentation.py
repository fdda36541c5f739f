"""What is added to the inputs of a stage."""

import numpy as np
import pytest
import torch

from layerwise.config import TrainingOptions
from layerwise.data.batches import Batch
from layerwise.training.loader import augmented


def batch(dtype: torch.dtype = torch.float16) -> Batch:
    torch.manual_seed(0)
    frames = 3 * torch.randn(4, 500, 8)
    frames[1, 300:] = 0
    return Batch(frames.to(dtype), np.array([500, 300, 500, 500]))


def changed(seed: int = 0, of: Batch | None = None, **options: float) -> torch.Tensor:
    return augmented(of or batch(), TrainingOptions(**options), np.random.default_rng(seed)).frames


def test_nothing_is_added_where_nothing_is_asked_for() -> None:
    before = batch()
    assert changed(of=before) is before.frames


def test_noise_has_the_level_that_was_asked_for() -> None:
    real = batch().lengths
    added = (changed(input_noise=0.25).float() - batch().frames.float())[:, : real.min()]
    assert added.std().item() == pytest.approx(0.25 * 3, rel=0.03)


@pytest.mark.parametrize("options", [{"input_noise": 0.5}, {"frame_dropout": 0.3}])
def test_padding_stays_zero_and_the_same_seed_gives_the_same_bits(options: dict[str, float]) -> None:
    first = changed(**options)
    assert not first[1, 300:].any()
    assert torch.equal(first, changed(**options))
    assert not torch.equal(first, changed(seed=1, **options))
    assert first.dtype == torch.float16


def test_frames_are_dropped_whole() -> None:
    dropped = ~changed(frame_dropout=0.3)[0].any(1)
    assert dropped.float().mean().item() == pytest.approx(0.3, abs=0.06)
    kept = ~dropped
    assert torch.equal(changed(frame_dropout=0.3)[0, kept], batch().frames[0, kept])


def test_pictures_and_bfloat16_are_augmented_too() -> None:
    pictures = Batch(torch.ones(2, 9, 3, 4, 4, dtype=torch.bfloat16), np.array([9, 9]))
    frames = changed(of=pictures, frame_dropout=0.5)
    assert frames.shape == pictures.frames.shape
    per_frame = frames.flatten(2).float()
    assert set(per_frame.sum(2).unique().tolist()) == {0.0, 48.0}
