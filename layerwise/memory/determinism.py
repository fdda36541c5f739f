"""Whether a GPU gives the same bits for the same work, and how exact its float32 is."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from layerwise.errors import ConfigError

SAME_EVERY_TIME = ":4096:8"
"""Of CUBLAS_WORKSPACE_CONFIG: one of the two settings with which matrix products have the same bits every time."""

EXACT = "ieee"

NO_SUCH_FORM = "does not have a deterministic implementation"
"""What torch says of such an operation."""


def settle_products(deterministic: bool) -> None:
    """Has cuBLAS give the same bits every time, where that is wanted and the user has not chosen; before it is first used."""
    if deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", SAME_EVERY_TIME)


@contextmanager
def same_bits(deterministic: bool) -> Iterator[None]:
    """Inside, where that is wanted, the same work gives the same bits, and float32 is exact, without TF32.

    Raises ConfigError where an operation has no such form.
    """
    if not deterministic:
        yield
        return
    places = _float32_settings().values()
    precisions = [place.fp32_precision for place in places]
    settings: Any = torch.utils.deterministic
    before, fills = torch.are_deterministic_algorithms_enabled(), settings.fill_uninitialized_memory
    warns = torch.is_deterministic_algorithms_warn_only_enabled()
    settle_products(deterministic)
    torch.use_deterministic_algorithms(True)
    settings.fill_uninitialized_memory = False  # a kernel for every tensor, and nothing reads it
    for place in places:
        place.fp32_precision = EXACT
    try:
        yield
    except RuntimeError as error:
        if NO_SUCH_FORM not in str(error):
            raise
        raise ConfigError(
            f"--deterministic: {str(error).partition(NO_SUCH_FORM)[0]}{NO_SUCH_FORM}; leave it out."
        ) from error
    finally:
        torch.use_deterministic_algorithms(before, warn_only=warns)
        settings.fill_uninitialized_memory = fills
        for place, precision in zip(places, precisions, strict=True):
            place.fp32_precision = precision


def said_of_float32(device: torch.device, precision: str, deterministic: bool) -> str:
    """A sentence on what float32 is on a GPU that has TF32, for whoever trains in it; elsewhere nothing."""
    if device.type != "cuda" or precision != "float32" or torch.cuda.get_device_capability(device) < (8, 0):
        return ""
    rounded = [name for name, place in _float32_settings().items() if place.fp32_precision == "tf32"]
    if deterministic or not rounded:
        return f"float32 on {device} is exact"
    return (
        f"float32 on {device}: {' and '.join(rounded)} round their inputs to TF32, 10 bits, as torch has it; with "
        "--deterministic they do not"
    )


def _float32_settings() -> dict[str, Any]:
    backends: Any = torch.backends
    # In torch 2.9 it lies in the class, and a module of the same name hides it as soon as anything imports that.
    recurrent = getattr(type(backends.cudnn), "rnn", None) or backends.cudnn.rnn
    return {
        "convolutions": backends.cudnn.conv,
        "recurrent layers": recurrent,
        "matrix products": backends.cuda.matmul,
    }
