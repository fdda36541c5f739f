"""Imports that may fail: a function of the user's own, which an option names as package.module:function; torchvision."""

import contextlib
import importlib
import inspect
import os
import sys
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

from layerwise.errors import ConfigError, LayerwiseError, did_you_mean


def versions_beside(torch_version: str) -> dict[str, str]:
    """The torchvision and torchaudio that belong to a torch: "2.12.1" to {"torchvision": "0.27.*", "torchaudio": "2.11.*"}.

    torchvision counts its own versions, one for each torch. torchaudio 2.11 is its last one so far, and runs on newer ones.
    """
    minor = int(torch_version.split(".")[1])
    return {"torchvision": f"0.{minor + 15}.*", "torchaudio": f"2.{min(minor, 11)}.*"}


def install_beside(name: str, torch_version: str) -> str:
    """The command that installs the version of torchvision or torchaudio that belongs to this torch."""
    return f"pip install '{name}=={versions_beside(torch_version)[name]}', from where torch was installed"


def import_torchvision(raises: type[LayerwiseError]) -> Any:
    """The module. Raises an error of this type where it does not load beside torch."""
    import torch

    try:
        import torchvision
    except (ImportError, OSError, RuntimeError) as error:
        raise raises(
            f"torchvision cannot be imported beside torch {torch.__version__} ({error}); install the version that belongs "
            f"to it: {install_beside('torchvision', torch.__version__)}."
        ) from error
    return torchvision


def named_function(text: str, flag: str, others: Iterable[str]) -> Callable[..., Any]:
    """What `package.module:function` names, with the present folder searched last.

    flag: the option that names it; others: what else may stand before its colon. Raises ConfigError where there is no such
    thing, or the module cannot be imported.
    """
    module_name, _, name = text.partition(":")
    if os.getcwd() not in sys.path:  # notebooks search it, a command that was installed does not
        sys.path.append(os.getcwd())
    try:
        module = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        if error.name is None or not f"{module_name}.".startswith(f"{error.name}."):
            raise ConfigError(f"{flag} {text}: {module_name} needs {error.name}, which is not installed.") from None
        raise ConfigError(
            f"{flag} {text}: there is no module {error.name}; it is looked for in {os.getcwd()} and among what is installed."
            f"{did_you_mean(module_name, others)}"
        ) from None
    except Exception as error:
        raise ConfigError(
            f"{flag} {text}: {module_name} cannot be imported ({type(error).__name__}: {error}); mend it first."
        ) from error
    found = getattr(module, name, None)
    if not callable(found):
        known = [each for each, value in vars(module).items() if callable(value) and not each.startswith("_")]
        # The name may well be that of a file in the present folder and of an installed package, which is found first.
        place = f"; it was found at {module.__file__}" if getattr(module, "__file__", None) else ""
        raise ConfigError(f"{flag} {text}: {module_name} has no function {name}{place}.{did_you_mean(name, known)}")
    return found


def python_module(name: str) -> list[str]:
    """`python -m NAME` for a module of this package, in a process that does not search the present folder first.

    Where the package itself lies there, it is searched, but behind all others: see layerwise/__init__.py.
    """
    here = Path(__file__).resolve().parents[1] == Path.cwd()
    return [sys.executable, *([] if here else ["-P"]), "-m", name]


@contextlib.contextmanager
def children_search_no_folder() -> Iterator[None]:
    """Inside, Python processes that libraries start do not search the present folder: a json.py there is not Python's own."""
    before = os.environ.get("PYTHONSAFEPATH")
    os.environ["PYTHONSAFEPATH"] = "1"
    try:
        yield
    finally:
        if before is None:
            del os.environ["PYTHONSAFEPATH"]
        else:
            os.environ["PYTHONSAFEPATH"] = before


def called(text: str, flag: str, others: Iterable[str], *arguments: Any) -> Any:
    """What the function named gives; of the arguments, as many as it asks for without a default. Raises ConfigError where it
    fails."""
    function = named_function(text, flag, others)
    try:
        asked = [each for each in inspect.signature(function).parameters.values() if each.default is each.empty]
        positional = [each for each in asked if each.kind in (each.POSITIONAL_ONLY, each.POSITIONAL_OR_KEYWORD)]
        return function(*arguments[: len(positional)])
    except Exception as error:
        raise ConfigError(f"{flag} {text}: the function failed ({type(error).__name__}: {error}); mend it.") from error
