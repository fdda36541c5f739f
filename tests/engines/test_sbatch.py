"""The text of batch scripts, and what becomes of sbatch's answers."""

import shlex
from pathlib import Path

import pytest

from layerwise.config.options import EngineOptions
from layerwise.engines.sbatch import script, submit
from layerwise.errors import SlurmError


def asked(text: str) -> list[str]:
    return [shlex.split(line.removeprefix("#SBATCH "))[0] for line in text.splitlines() if line.startswith("#SBATCH ")]


def test_a_script_may_be_started_again_and_is_warned() -> None:
    text = script("run-stage-1", ["layerwise", "run"], Path("logs/1.txt"), EngineOptions(gpus=0))
    assert text.startswith("#!/bin/bash\n#SBATCH ")
    assert asked(text) == [
        *("--job-name=run-stage-1", "--output=logs/1.txt", "--open-mode=append", "--requeue", "--signal=USR1@120"),
        *("--nodes=1", "--ntasks=1"),
    ]
    assert text.endswith("\nexec srun layerwise run\n")


def test_options_of_the_cluster_are_asked_for_and_extra_ones_come_last() -> None:
    options = EngineOptions(partition="small", time="36h", gpus=2, sbatch=("--account=physics", "--signal=USR1@300"))
    assert asked(script("x", ["true"], Path("log"), options))[7:] == [
        *("--partition=small", "--time=1-12:00:00", "--gres=gpu:2", "--account=physics", "--signal=USR1@300")
    ]


def test_words_reach_the_command_as_they_are() -> None:
    command = ["python", "-m", "layerwise", "--set", "data.pattern=(?P<mood>[a-z]+) $HOME 'x'", "a\nb"]
    text = script("x", command, Path("log"), EngineOptions(gpus=0))
    assert shlex.split(text.partition("exec srun ")[2]) == command


def test_a_path_with_a_percent_sign_is_no_pattern() -> None:
    assert "--output=my logs/50%%.txt" in asked(script("x", ["true"], Path("my logs/50%.txt"), EngineOptions(gpus=0)))


def test_an_option_of_two_lines_is_refused() -> None:
    with pytest.raises(SlurmError, match=r"'--comment=a\\nb' has more than one line"):
        script("x", ["true"], Path("log"), EngineOptions(gpus=0, sbatch=("--comment=a\nb",)))


@pytest.fixture
def sbatch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An sbatch that writes its words to a file and answers as the test says in another."""
    program = tmp_path / "sbatch"
    program.write_text(f'#!/bin/sh\necho "$@" > {tmp_path}/words\n. {tmp_path}/answer\n')
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    return tmp_path


def test_a_job_waits_for_others(sbatch: Path) -> None:
    (sbatch / "answer").write_text("echo '12;cluster'")
    assert submit(Path("job.sh"), ["10", "11"]) == "12"
    assert (sbatch / "words").read_text() == (
        "--parsable --dependency=afterok:10:11 --kill-on-invalid-dep=yes job.sh\n"
    )


def test_a_refusal_is_given_in_sbatchs_words(sbatch: Path) -> None:
    (sbatch / "answer").write_text("echo 'sbatch: error: Batch job submission failed: no such partition' >&2; exit 1")
    with pytest.raises(
        SlurmError, match=r"does not take job\.sh: Batch job submission failed: no such partition; mend"
    ):
        submit(Path("job.sh"))


def test_without_slurm_it_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(SlurmError, match="no sbatch on the PATH"):
        submit(Path("job.sh"))
