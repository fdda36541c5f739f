"""What stands beside a probe is of the input alone, and the same every time."""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from layerwise.config import resolve
from layerwise.data.open import open_data
from layerwise.evaluate import baseline
from layerwise.evaluate.probe import probe
from layerwise.evaluate.targets import ProbeTask
from layerwise.nets import shortest_sample


def test_pictures_in_patches_are_filtered_as_whole_ones_are(tmp_path: Path) -> None:
    for number in range(4):
        path = tmp_path / ("cat" if number % 2 else "ship") / f"{number}.png"
        path.parent.mkdir(exist_ok=True)
        Image.fromarray(np.random.default_rng(number).integers(0, 256, (32, 32, 3), dtype=np.uint8)).save(path)
    read = []
    for frames, changes in {"patches": {"data.patch": 8, "data.patch_stride": 4, "data.crop": 32}, "whole": {}}.items():
        options = {"data.source": f"images:{tmp_path}", "data.frames": frames, "data.picture": 32, "data.gray": False}
        config = resolve(overrides={**options, **changes, "net.name": "vision" if frames == "patches" else "timm:x"})
        data = open_data(config.data, shortest_sample(config))
        task = ProbeTask("class", data, False, np.array([3, 1]), np.zeros(2, dtype=np.uint8))
        read.append(np.concatenate([*baseline.picture_rows(task, config)]))
    assert read[0].shape == (2, baseline.FILTERS * baseline.CELLS**2)
    assert np.allclose(*read, atol=1e-5)


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
