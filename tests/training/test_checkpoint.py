"""What is saved of a stage, as a file."""

from pathlib import Path

import numpy as np

from layerwise.training.checkpoint import Progress, load_arrays, save_arrays


def test_the_same_arrays_and_metadata_make_the_same_bytes_and_come_back(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    arrays = {"b": rng.random((3, 2), np.float32), "a": rng.integers(0, 9, 7), "empty": np.zeros((0, 4), np.float16)}
    metadata = {name: f'"größe" of {name}\n' for name in "hgfedcba"}
    for name in ("one", "other", "third"):
        save_arrays(tmp_path / name, arrays, metadata)
    content = (tmp_path / "one").read_bytes()
    assert (tmp_path / "other").read_bytes() == content == (tmp_path / "third").read_bytes()
    loaded, told = load_arrays(tmp_path / "one", "")
    assert told == metadata
    assert {name: (value.dtype, value.tolist()) for name, value in loaded.items()} == {
        name: (value.dtype, value.tolist()) for name, value in arrays.items()
    }
    assert int.from_bytes(content[:8], "little") % 8 == 0


def test_the_next_round_counts_on_and_measures_its_losses_anew() -> None:
    """Its input is another: what was lowest in this round may never be reached again."""
    ended = Progress(epoch=4, first_epoch=2, best_loss=0.5, plateau_loss=0.6, plateau_epochs=1)
    begun = ended.on_other_input()
    assert (begun.epoch, begun.first_epoch) == (4, 4)
    assert (begun.best_loss, begun.plateau_loss, begun.plateau_epochs) == (None, None, 0)
