"""Batch jobs of an earlier start that Slurm has not ended yet."""

import json
from pathlib import Path

from layerwise.engines.slurm_command import NoAnswer, NoCommand, ask_slurm
from layerwise.errors import RunError, SlurmError

QUEUE = "jobs.json"
"""Beside the scripts: numbers of the jobs that were handed in last."""


def refuse_while_queued(folder: Path) -> None:
    """Raises RunError where jobs of the run are queued or at work, SlurmError where Slurm does not say.

    folder: of its batch scripts. Where there is no Slurm, as behind a copy to another machine, there are none.
    """
    numbers: list[str] = json.loads((folder / QUEUE).read_text()) if (folder / QUEUE).exists() else []
    if not numbers:
        return
    asked = ["squeue", "--noheader", "--format=%i", f"--jobs={','.join(numbers)}"]
    try:
        answer = ask_slurm(asked)
    except NoCommand:
        return
    except NoAnswer as error:
        raise SlurmError(f"{error}; try again when Slurm is back.") from None
    # Of a single job that it has forgotten Slurm says so as an error, of several it lists those that it knows.
    if answer.returncode and "Invalid job id" not in answer.stderr:
        raise SlurmError(f"squeue does not say whether jobs are queued: {answer.stderr.strip()}; try again later.")
    if queued := answer.stdout.split():
        raise RunError(
            f"Jobs of an earlier start are still queued: {', '.join(queued)}. Let them work, or end them first with: "
            f"scancel {' '.join(queued)}."
        )
