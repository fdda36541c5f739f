"""Commands of layerwise as forks of this process, which has imported everything: a new interpreter takes seconds for it."""

import contextlib
import ctypes
import gc
import importlib
import os
import resource
import select
import signal
import sys
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import h5py
import torch

# A process whose first backward pass is one on fake tensors cannot be forked any more: torch prepares for GPUs then.
torch.zeros(1, requires_grad=True).sum().backward()

STILL_SECONDS = 4.0
"""A process that has slept for so long, without any work, hangs: commands wait half a second for a lock."""

LONGEST_SECONDS = 120.0
"""A command takes a second or two, on a busy machine some more."""

MOST_BYTES = 3 * 2**30
"""What a command may take beyond what it is forked with, so that one that asks for a terabyte cannot hurt the machine."""


@dataclass(frozen=True, slots=True)
class Ended:
    """A command that is over."""

    code: int | None
    """Its exit code; below 0 the signal that ended it; None where it hung and was killed."""
    out: str
    err: str


def layerwise(*arguments: str) -> Callable[[], None]:
    """What the command line does for these arguments."""

    def call() -> None:
        from layerwise.commands import main

        main(arguments)

    return call


def begin(action: Callable[[], object], folder: Path, streams: Path) -> int:
    """The process id of the action, which has begun in the folder; what it prints goes to the files out and err of streams."""
    sys.stdout.flush()
    child = os.fork()
    if child == 0:
        _act(action, folder, streams)
    return child


def end(child: int, streams: Path, longest: float = LONGEST_SECONDS) -> Ended:
    """Waits for the process, and kills it where it hangs."""
    deadline, worked, since = time.monotonic() + longest, -1, time.monotonic()
    handle, killed = os.pidfd_open(child), False
    while not select.select([handle], [], [], 0.05)[0]:
        state, work = _state(child)
        if work != worked or state == "R":
            worked, since = work, time.monotonic()
        if time.monotonic() > min(deadline, since + STILL_SECONDS):
            os.kill(child, signal.SIGKILL)
            killed = True
    os.close(handle)
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    out, err = ((streams / name).read_text(errors="replace") for name in ("out", "err"))
    return Ended(None if killed else code, out, err)


def call(action: Callable[[], object], folder: Path, streams: Path) -> Ended:
    """Begins the action and waits for its end."""
    return end(begin(action, folder, streams), streams)


def import_what_commands_import(streams: Path) -> None:
    """Imports what forks have imported that ended by themselves, so that the next ones need not."""
    modules = streams / "modules"  # not there where nothing new was imported
    for name in modules.read_text().split() if modules.exists() else ():
        if name not in sys.modules:
            with contextlib.suppress(Exception):
                importlib.import_module(name)
    gc.collect()
    gc.freeze()


def _act(action: Callable[[], object], folder: Path, streams: Path) -> None:
    """In the child: never returns."""
    code: object = 1
    before = set(sys.modules)
    try:
        os.chdir(folder)
        for number, name in ((1, "out"), (2, "err")):
            file = os.open(streams / name, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
            os.dup2(file, number)
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        sys.stdin = os.fdopen(0, closefd=False)
        sys.stdout, sys.stderr = (os.fdopen(number, "w", buffering=1, closefd=False) for number in (1, 2))
        taken = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (taken + MOST_BYTES, taken + MOST_BYTES))
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        action()
        code = 0
    except SystemExit as ended:
        code = ended.code or 0
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        if imported := set(sys.modules) - before:
            with open(streams / "modules", "a") as file:
                print(*sorted(imported), file=file)
        gc.collect()
        # Not Python's end, which would clean up behind this process, nor that of torch, which takes long; HDF5 writes in its.
        ctypes.CDLL(h5py.h5.__file__).H5close()
        os._exit(code if isinstance(code, int) else 1)


def _state(child: int) -> tuple[str, int]:
    """State of its first thread (R: it runs), and clock ticks that all have worked."""
    fields = Path(f"/proc/{child}/stat").read_text().rpartition(")")[2].split()
    return fields[0], int(fields[11]) + int(fields[12])
