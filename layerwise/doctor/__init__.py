"""Examines the installation and the machine; works where torch does not import."""

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True, slots=True)
class Finding:
    """What a check gives: one line of `layerwise doctor`."""

    check: str
    """What was looked at, in a word or two."""
    verdict: Literal["ok", "note", "fix"]
    """fix: layerwise does not work until something is done; note: it does, but there is something to know."""
    found: str
    advice: str = ""
    """What to do; always there with fix."""
