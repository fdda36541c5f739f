"""A script: prints, line by line as JSON, what torch and its companions say, and before each part what it is at."""

import json
import sys
import warnings
from importlib import import_module
from typing import Any


def tell(**told: Any) -> None:
    print(json.dumps(told), flush=True)


def tell_versions() -> bool:
    """Whether torch itself imports."""
    for name in ("torch", "torchvision", "torchaudio"):
        tell(at=name)
        try:
            tell(versions={name: str(import_module(name).__version__)})
        except Exception as error:  # ImportError, OSError and RuntimeError are what a mismatch has given so far
            tell(errors={name: (str(error).strip().splitlines() or [type(error).__name__])[0]})
    return "torch" in sys.modules


def tell_gpus() -> None:
    import torch

    tell(at="CUDA", cuda=torch.version.cuda)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            torch.cuda.init()
        except Exception as error:  # torch was built without CUDA, or finds no driver
            said = str(caught[0].message) if caught else str(error)
            tell(gpu_error=said.strip().splitlines()[0])
            return
    gpus = []
    for number in range(torch.cuda.device_count()):
        free, total = torch.cuda.mem_get_info(number)
        gpus.append({"name": torch.cuda.get_device_name(number), "free": free, "total": total})
    tell(gpus=gpus)


if __name__ == "__main__" and tell_versions():
    tell_gpus()
