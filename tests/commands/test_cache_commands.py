"""`layerwise cache`: what is there, whether it is whole, freeing room, handing features over."""

import json
from collections.abc import Callable
from pathlib import Path

import h5py
import numpy as np
import pytest

from layerwise.cache import ActivationCache
from layerwise.commands import main
from layerwise.config import Config
from layerwise.engines.run import RunResult, run
from layerwise.errors import RunError
from layerwise.files import exclusive
from layerwise.training.cache_plan import free_for_caches

Call = Callable[..., tuple[int, str, str]]


@pytest.fixture
def call(capfd: pytest.CaptureFixture[str]) -> Call:
    """call(*arguments) gives exit code, stdout and stderr."""

    def run_main(*arguments: object) -> tuple[int, str, str]:
        with pytest.raises(SystemExit) as stopped:
            main(["cache", *map(str, arguments)])
        return int(stopped.value.code or 0), *capfd.readouterr()

    return run_main


@pytest.fixture
def finished(finished: Callable[[Config], RunResult], tiny_speech: Callable[..., Config], digits: Path) -> RunResult:
    return finished(tiny_speech(f"fsdd:{digits}", **{"training.max_epochs": 1}))


def test_what_is_there_is_listed(finished: RunResult, call: Call) -> None:
    for place in (finished.paths.out, finished.paths.caches, finished.paths.caches.parent):
        code, out, _ = call("ls", place, "--json")
        assert code == 0
        rows = json.loads(out)
        assert [row["stage"] for row in rows] == [1, 2, 3, 4]
        assert {row["state"] for row in rows} == {"sealed"}
        assert {row["samples"] for row in rows} == {48}
        assert rows[2]["frame_shape"] == [8]
    table = call("ls", finished.paths.out)[1]
    assert "stage-4.h5" in table
    assert "in all" in table


def test_a_damaged_cache_is_found_and_named(finished: RunResult, call: Call) -> None:
    code, out, _ = call("verify", finished.paths.out)
    assert (code, out.count("whole")) == (0, 4)
    path = finished.paths.cache(3)
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    code, out, err = call("verify", finished.paths.out)
    assert (code, out.count("whole")) == (2, 3)
    assert "stage-3.h5" in out
    assert "Damaged caches: 1." in err


def test_what_cannot_be_looked_at_is_listed_with_the_reason(tmp_path: Path, call: Call) -> None:
    (tmp_path / "stage-1.h5").symlink_to(tmp_path / "gone")
    code, out, _ = call("ls", tmp_path, "--json")
    assert code == 0
    (row,) = json.loads(out)
    assert row["state"] == "unusable"
    assert "stage-1.h5 cannot be read: No such file" in row["finding"]
    assert "stage-1.h5 cannot be read: No such file" in " ".join(call("ls", tmp_path)[1].split())
    assert free_for_caches(tmp_path) > 0


def test_a_place_without_caches_is_not_taken_for_a_whole_one(tmp_path: Path, finished: RunResult, call: Call) -> None:
    assert call("ls", tmp_path)[:2] == (0, f"{tmp_path} holds no caches.\n")
    for command in (["verify", tmp_path], ["export", tmp_path, "-o", tmp_path / "x.npy"]):
        code, _, err = call(*command)
        assert code == 2
        assert "holds no caches; name a run directory" in err
    code, _, err = call("rm", finished.paths.caches, "--all")
    assert code == 2
    assert "is not a run directory; name the one of the run" in err


def test_a_cache_that_is_not_finished_is_not_exported(tmp_path: Path, finished: RunResult, call: Call) -> None:
    unfinished = finished.paths.cache(4).rename(finished.paths.caches / "stage-4.h5.part")
    code, _, err = call("export", unfinished, "-o", tmp_path / "x.npy")
    assert code == 2
    assert "has no sealed cache; start its run again" in err


def test_only_damage_is_called_damage(tmp_path: Path, call: Call) -> None:
    with h5py.File(tmp_path / "stage-1.h5", "w") as file:
        file["mine"] = [1, 2, 3]
    code, out, err = call("verify", tmp_path)
    assert code == 2
    assert "holds no layerwise cache" in out
    assert "1 of these files could not be read as caches" in err
    assert "delete" not in err


def test_removed_caches_are_made_again_when_they_are_needed(
    finished: RunResult, call: Call, tiny_speech: Callable[..., Config], digits: Path
) -> None:
    before = finished.paths.cache(2).read_bytes()
    code, out, _ = call("rm", finished.paths.out, "--stage", 2, "--stage", 3)
    assert code == 0
    assert "freed" in out
    assert [finished.paths.cache(stage).exists() for stage in (1, 2, 3, 4)] == [True, False, False, True]
    again = run(tiny_speech(f"fsdd:{digits}", **{"training.max_epochs": 1}), from_stage=4)
    assert again.state.done
    assert finished.paths.cache(2).read_bytes() == before  # that of stage 3 was made from it
    assert call("rm", finished.paths.out, "--all")[0] == 0
    assert not list(finished.paths.caches.glob("stage-*"))
    run(tiny_speech(f"fsdd:{digits}", **{"training.max_epochs": 1}), from_stage=3)
    assert finished.paths.cache(2).read_bytes() == before


def test_nothing_is_removed_under_a_run_or_by_a_vague_wish(finished: RunResult, call: Call) -> None:
    with exclusive(finished.paths.lock, RunError("busy")):
        code, _, err = call("rm", finished.paths.out, "--all")
    assert code == 2
    assert "is running; stop it first" in err
    assert call("rm", finished.paths.out)[0] == 2
    assert call("rm", finished.paths.out, "--stage", 9)[0] == 2
    assert len(list(finished.paths.caches.glob("stage-*.h5"))) == 4


def test_compressed_caches_are_listed_verified_and_exported(
    tiny_speech: Callable[..., Config], digits: Path, call: Call, tmp_path: Path
) -> None:
    finished = run(tiny_speech(f"fsdd:{digits}", **{"training.max_epochs": 1, "cache.compression": "zstd"}))
    out, path = finished.paths.out, finished.paths.cache(2)
    rows = json.loads(call("ls", out, "--json")[1])
    assert {row["compression"] for row in rows} == {"zstd"}
    assert [row["bytes"] for row in rows] == [finished.paths.cache(s).stat().st_blocks * 512 for s in (1, 2, 3, 4)]
    assert "float16, zstd" in " ".join(call("ls", out)[1].split())
    code, shown, _ = call("verify", out)
    assert (code, shown.count("whole")) == (0, 4)
    assert call("export", out, "--stage", 2, "-o", tmp_path / "frames.npy")[0] == 0
    with ActivationCache(path) as cache:
        assert np.array_equal(np.load(tmp_path / "frames.npy")[: cache.lengths[0]], cache.read(0, 0, cache.lengths[0]))
    path.with_name("stage-2.h5.packing").write_bytes(bytes(5000))  # what a kill leaves
    assert json.loads(call("ls", out, "--json")[1])[-1]["state"] == "not packed to its end"
    assert "stage-2.h5.packing: not packed to its end; its run goes on with it" in call("verify", out)[1]
    assert call("rm", out, "--stage", 2)[0] == 0
    assert sorted(path.parent.glob("stage-2*")) == []


@pytest.mark.parametrize("ending", ["npy", "h5"])
def test_features_are_handed_over_frame_by_frame_or_as_means(
    finished: RunResult, call: Call, tmp_path: Path, ending: str
) -> None:
    frames, means = tmp_path / f"frames.{ending}", tmp_path / f"means.{ending}"
    assert call("export", finished.paths.out, "--stage", 3, "-o", frames)[0] == 0
    assert call("export", finished.paths.out, "--stage", 3, "-o", means, "--mean")[0] == 0
    if ending == "npy":
        rows, per_sample = np.load(frames), np.load(means)
        index = np.load(tmp_path / "frames.index.npz")
        offsets, ids = index["offsets"], index["ids"].tolist()
    else:
        with h5py.File(frames) as file, h5py.File(means) as other:
            rows, offsets, per_sample = file["features"][:], file["offsets"][:], other["features"][:]
            ids = [name.decode() for name in file["ids"][:]]
    with ActivationCache(finished.paths.cache(3)) as cache:
        assert ids == list(cache.ids)
        for sample in (0, 20, 47):
            expected = cache.read(sample, 0, int(cache.lengths[sample])).numpy()
            assert np.array_equal(rows[offsets[sample] : offsets[sample + 1]], expected)
            assert np.allclose(per_sample[sample], expected.astype(np.float64).mean(0), atol=1e-6)
    code, _, err = call("export", finished.paths.out, "-o", frames)
    assert code == 2
    assert "exists" in err
    assert call("export", finished.paths.out, "-o", tmp_path / "x.csv")[0] == 2
    (tmp_path / "precious.index.npz").write_text("of another export")
    code, _, err = call("export", finished.paths.out, "-o", tmp_path / "precious.npy")
    assert code == 2
    assert "precious.index.npz exists" in err
    assert (tmp_path / "precious.index.npz").read_text() == "of another export"
