"""What stands beside a probe is of the input alone, and the same every time."""

from pathlib import Path

import numpy as np
import pytest
import torch

from layerwise.config import resolve
from layerwise.data.open import open_data
from layerwise.evaluate import baseline
from layerwise.evaluate.probe import probe
from layerwise.nets import shortest_sample


def test_patches_make_the_picture_again(cifar10: Path) -> None:
    read = []
    for frames, changes in {"patches": {"data.patch": 8, "data.patch_stride": 4, "data.crop": 32}, "whole": {}}.items():
        options = {"data.source": f"images:{cifar10}", "data.frames": frames, "data.picture": 32, "data.gray": False}
        config = resolve(overrides={**options, **changes, "net.name": "vision" if frames == "patches" else "timm:x"})
        read.append(baseline._picture(open_data(config.data, shortest_sample(config)), config, 3))
    assert torch.allclose(*read, atol=1e-6)


@pytest.mark.parametrize("hertz", [300, 1000, 3000])
def test_a_tone_sounds_in_its_own_band(hertz: int) -> None:
    rate, width = 16000, 400
    sound = torch.sin(2 * torch.pi * hertz * torch.arange(width) / rate)
    band = int(baseline._levels(sound[None], rate)[0].argmax())
    edges = np.linspace(0, 2595 * np.log10(1 + rate / 1400), baseline.BANDS + 2)
    assert edges[band] < 2595 * np.log10(1 + hertz / 700) < edges[band + 2]


def test_the_baseline_of_the_same_question_is_worked_out_once(small_run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = probe(small_run, "digit").baseline
    assert first is not None
    assert first.error < 0.6  # chance is 0.75

    def forget(*_: object) -> None:
        raise AssertionError("worked out again")

    monkeypatch.setattr(baseline, "recording_rows", forget)
    assert probe(small_run, "digit").baseline == first
    with pytest.raises(AssertionError, match="again"):
        probe(small_run, "speaker", classifier="knn")
