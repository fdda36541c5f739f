"""`python -m module` as a fork of this process, which has imported torch already: a new interpreter takes seconds for it."""

import gc
import os
import runpy
import subprocess
import sys
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch._dynamo  # torch itself imports this at the first step

# A process whose first backward pass is one on fake tensors cannot be forked any more: torch prepares for GPUs then.
torch.zeros(1, requires_grad=True).sum().backward()


class ForkedPython(subprocess.Popen):
    """A Popen that forks this process where it is to start `python -m module` or `python script.py`.

    It is a process of its own in every other way: it has its own folder, environment and streams, takes signals, is killed.
    What it starts is forked, too. All other commands are started as ever; so is everything where there is a GPU, for what
    torch has of it does not survive a fork.
    """

    def __init__(self, args: Sequence[str], *, env: dict[str, str] | None = None, **options: Any) -> None:
        words = [str(word) for word in args] if not isinstance(args, str) else []
        arguments = _without_flags(words[1:])
        safe = words[1:2] == ["-P"]
        if words[:1] == [sys.executable] and _is_program(arguments) and not torch.cuda.is_available():
            environment = dict(os.environ if env is None else env)
            options["preexec_fn"] = lambda: _become(arguments, safe, environment, options.get("pass_fds", ()))
            options["restore_signals"] = False  # an interpreter that starts would ignore SIGPIPE again
        super().__init__(args, env=env, **options)


def _without_flags(arguments: list[str]) -> list[str]:
    """Without -u, for standard streams are unbuffered anyway, and -P, without which the present folder is searched first."""
    return _without_flags(arguments[1:]) if arguments[:1] in (["-u"], ["-P"]) else arguments


def _is_program(arguments: list[str]) -> bool:
    return arguments[:1] == ["-m"] or (len(arguments) > 0 and arguments[0].endswith(".py"))


def _become(arguments: list[str], safe: bool, environment: dict[str, str], passed: Sequence[int]) -> None:
    """In the child, whose standard streams and folder are set: runs the program, and never returns."""
    _let_go_of_other_files(passed)
    _forget_modules_of_tests()
    subprocess.Popen = ForkedPython  # type: ignore[misc]
    gc.enable()  # subprocess switches it off around a fork
    os.environ.clear()
    os.environ.update(environment)
    sys.stdin = os.fdopen(0, closefd=False)
    sys.stdout, sys.stderr = (os.fdopen(number, "w", buffering=1, closefd=False) for number in (1, 2))
    code: object = 1
    try:
        if arguments[0] == "-m":
            _, module, *rest = arguments
            sys.argv, sys.path[:0] = [module, *rest], [] if safe else [os.getcwd()]
            runpy.run_module(module, run_name="__main__", alter_sys=True)
        else:
            sys.argv, sys.path[:0] = arguments, [os.path.dirname(arguments[0])]
            runpy.run_path(arguments[0], run_name="__main__")
        code = 0
    except SystemExit as ended:
        code = ended.code or 0
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        os._exit(code if isinstance(code, int) else 1)


def _forget_modules_of_tests() -> None:
    """A new interpreter finds those of its own folder, whatever an earlier test has imported under the same name."""
    installed = (sys.prefix, sys.base_prefix, str(Path(__file__).resolve().parents[1]))
    for name, module in list(sys.modules.items()):
        file = getattr(module, "__file__", None)
        if file and not file.startswith(installed):
            del sys.modules[name]


def _let_go_of_other_files(passed: Sequence[int]) -> None:
    """Whoever waits for the end of a pipe must not wait for this process.

    The numbers stay taken: objects that came along with the fork may still close theirs.
    """
    nowhere = os.open(os.devnull, os.O_RDWR)
    for descriptor in map(int, os.listdir("/proc/self/fd")):
        if descriptor > 2 and descriptor not in (nowhere, *passed):
            os.dup2(nowhere, descriptor, inheritable=False)
