"""The real names that a misspelt one may have meant. (Options and commands of the command line click finds by itself.)"""

import difflib
from collections.abc import Iterable


def near(word: str, known: Iterable[str]) -> list[str]:
    """At most three of the known names that look like the word, the nearest first; upper and lower case are the same."""
    by_lower = {name.lower(): name for name in known}
    return [by_lower[name] for name in difflib.get_close_matches(word.lower(), by_lower)]


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """A question that goes behind a sentence, with a space before it; empty where nothing is near."""
    names = near(word, known)
    return f" Did you mean {' or '.join(names)}?" if names else ""
