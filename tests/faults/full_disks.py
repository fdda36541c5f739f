"""Calls every command on a disk that is full, or nearly so, and again when there is room.

    python tests/faults/full_disks.py [--blocks 0,1,16,64,258] [--only COMMAND]

The disk is a small file system in memory, which root may mount; a file of ballast leaves it so many free blocks of 4 KiB. A
command must end well, where it needs no more, or in one sentence and exit code 2; what was there before must be whole; and
when the ballast is gone the same command must make what it makes on an empty disk, bit by bit, and leave nothing over.
`cache rm` must succeed on the fullest one, and give its room back.
"""

import argparse
import contextlib
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from forked_commands import Ended, call
from hostile import fault_of_end
from kills_elsewhere import killed_commands, names_in
from small_runs import Command, World, commands, load_and_apply, make_world, makes, run_command, run_made

ROUNDS = 2
SIZE = "12m"
BLOCK = 4096


@dataclass(frozen=True, slots=True)
class Case:
    """A command, and the state of the disk that it is called on."""

    name: str
    state: str
    command: Command


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--blocks", default="0,1,16,64,258")
    parser.add_argument("--only", default="")
    options = parser.parse_args()
    torch.set_num_threads(1)
    faults = 0
    with tempfile.TemporaryDirectory(prefix="full-disks-") as name:
        world = make_world(Path(name), {key: value for key, value in makes(ROUNDS).items() if key != "other"})
        shutil.rmtree(world.arena)
        with small_disk(world.arena):
            for case in cases():
                if options.only in case.name:
                    faults += try_case(case, [int(text) for text in options.blocks.split(",")], world)
    sys.exit(1 if faults else 0)


def cases() -> list[Case]:
    """Every command on a finished run, `run` on every kind of it."""
    finished = commands(ROUNDS) | killed_commands()
    del finished["run"]
    return [
        Case("run, begun", "empty", Command(run_command(ROUNDS), run_made)),
        Case("run, in training", "training", Command(run_command(ROUNDS), run_made)),
        Case("run, in caching", "caching", Command(run_command(ROUNDS), run_made)),
        Case("run, finished", "finished", Command(run_command(ROUNDS), run_made)),
        *(Case(name, "finished", command) for name, command in finished.items()),
    ]


@contextlib.contextmanager
def small_disk(folder: Path) -> Iterator[None]:
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", f"size={SIZE},huge=never", "none", str(folder)]
    if subprocess.run(mount, capture_output=True).returncode:
        sys.exit("Mounting a file system is not allowed here: nothing was tried.")
    try:
        yield
    finally:
        subprocess.run(["umount", str(folder)], check=True)


def try_case(case: Case, blocks: list[int], world: World) -> int:
    """Number of faults. Prints each, and a line."""
    place = lay_out(case.state, world)
    undisturbed = call(case.command.action, place, world.streams)
    assert undisturbed.code == 0, undisturbed
    expected, names = case.command.made(place, undisturbed), names_in(place)
    faults, ends = 0, []
    for free in blocks:
        place = lay_out(case.state, world)
        features = load(case, place, world)
        fill(place, free)
        ended = call(case.command.action, place, world.streams)
        room = os.statvfs(place).f_bavail - free
        (place / "ballast").unlink()
        fault = fault_of_end(ended) or ("frees nothing" if case.name == "cache rm" and room <= 0 else "")
        if not fault and features != (after := load(case, place, world)) and case.name != "run --overwrite":
            fault = f"the encoder of before is lost: {after}"
        fault = fault or fault_when_there_is_room(case, place, ended, expected, names, world)
        if fault:
            said = (ended.err or ended.out).strip()[-300:]
            print(f"FAULT: {case.name}, {free} free blocks: {fault}\n    {said}", flush=True)
            faults += 1
        ends.append(f"{free}: {'FAULT' if fault else {0: 'done', 2: 'refused'}[ended.code or 0]}")
    print(f"{case.name:<20} {'  '.join(ends)}", flush=True)
    return faults


def fault_when_there_is_room(
    case: Case, place: Path, ended: Ended, expected: Any, names: set[str], world: World
) -> str:
    """Of the same command, where it has not succeeded before. Empty where nothing is wrong."""
    if ended.code != 0:
        if case.name == "cache rm":
            return "is refused"
        ended = call(case.command.action, place, world.streams)
        if ended.code != 0:
            return f"with room it ends with {ended.code}: {ended.err.strip()[-300:]}"
    if left := names_in(place) ^ names:
        return f"left over or missing: {', '.join(sorted(left)[:3])}"
    return "" if case.command.made(place, ended) == expected else "another result when there is room"


def lay_out(state: str, world: World) -> Path:
    """The small disk with a copy of this state on it and nothing else."""
    for entry in world.arena.iterdir():
        shutil.rmtree(entry) if entry.is_dir() and not entry.is_symlink() else entry.unlink()
    shutil.copytree(world.states[state], world.arena, symlinks=True, dirs_exist_ok=True)
    (world.arena / "data").symlink_to(world.base / "data")
    return world.arena


def load(case: Case, place: Path, world: World) -> str:
    """What the encoder of a finished run makes of a waveform."""
    return call(load_and_apply("run"), place, world.streams).out if case.state == "finished" else ""


def fill(place: Path, free: int) -> None:
    """Leaves so many free blocks on the disk."""
    with (place / "ballast").open("wb") as file:
        os.posix_fallocate(file.fileno(), 0, (os.statvfs(place).f_bavail - free) * BLOCK)
    assert os.statvfs(place).f_bavail == free, os.statvfs(place)


if __name__ == "__main__":
    main()
