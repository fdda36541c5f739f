"""Batch scripts of ours, as the real sbatch reads them."""

from pathlib import Path

import pytest
from cluster import Cluster

from layerwise.config.options import EngineOptions
from layerwise.engines.sbatch import script, submit
from layerwise.errors import SlurmError


@pytest.fixture(autouse=True)
def of_the_cluster(slurm: Cluster, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In a folder with the worst of names, with the environment of the cluster."""
    folder = tmp_path / "my 'logs' 50%j #1"
    folder.mkdir()
    monkeypatch.chdir(folder)
    monkeypatch.setenv("SLURM_CONF", slurm.environment["SLURM_CONF"])


def write(name: str, command: list[str], options: EngineOptions) -> Path:
    path = Path(f"{name}.sh").resolve()
    path.write_text(script(name, command, path.with_suffix(".txt"), options))
    return path


def test_jobs_follow_each_other_and_log_where_they_were_told(slurm: Cluster) -> None:
    options = EngineOptions(partition="small", time="0:30:00", gpus=0, sbatch=("--comment=it's mine",))
    first = submit(write("stage 1", ["python3", "-c", "print('one $HOME')"], options))
    second = submit(write("stage 2", ["cat", "stage 1.txt"], options), [first])
    assert slurm.job(second)["Dependency"].startswith(f"afterok:{first}") or slurm.job(first)["JobState"] == "COMPLETED"
    job = slurm.wait(second, ["COMPLETED"])
    assert Path("stage 2.txt").read_text() == "one $HOME\n"
    assert (job["TimeLimit"], job["Partition"], job["Requeue"]) == ("00:30:00", "small", "1")


def test_a_job_whose_predecessor_fails_is_cancelled(slurm: Cluster) -> None:
    first = submit(write("first", ["false"], EngineOptions(gpus=0)))
    second = submit(write("second", ["true"], EngineOptions(gpus=0)), [first])
    assert slurm.wait(second, ["CANCELLED"])


def test_what_sbatch_refuses_is_a_sentence() -> None:
    with pytest.raises(SlurmError, match=r"does not take .*invalid partition specified: nowhere"):
        submit(write("job", ["true"], EngineOptions(partition="nowhere", gpus=0)))
