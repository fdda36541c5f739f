"""`layerwise doctor`: whether the installation and the machine are fit."""

from pathlib import Path

import click

from layerwise.commands.options import json_option
from layerwise.doctor import Finding
from layerwise.doctor.examine import examine
from layerwise.errors import SetupError
from layerwise.report.printing import answer, answer_json


@click.command(short_help="Examine the installation and the machine.")
@click.option(
    "--cache-dir",
    default="cache",
    show_default=True,
    type=click.Path(path_type=Path),
    help="Folder of the activation caches, whose disk is tried with a file of 256 MB.",
)
@json_option
def doctor(cache_dir: Path, as_json: bool) -> None:
    """Examine Python, torch and its companions, the GPUs, HDF5, the disk of the caches, memory, cores, Slurm and extras.

    Each line is ok, note, or fix with what to do. Exit code 2 where something must be fixed.
    """
    found: list[Finding] = []
    for finding in examine(cache_dir):
        found.append(finding)
        if not as_json:
            answer(_line(finding))
    broken = [finding.check for finding in found if finding.verdict == "fix"]
    if as_json:
        answer_json({"fit": not broken, "findings": found})
    if broken:
        raise SetupError(f"To be fixed: {', '.join(broken)}.")


def _line(finding: Finding) -> str:
    advice = f"; {finding.advice}" if finding.advice else ""
    return f"{finding.verdict:<5} {finding.check + ':':<18} {finding.found}{advice}"
