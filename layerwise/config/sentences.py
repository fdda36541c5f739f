"""What is wrong with an option, in one sentence."""

import difflib

from pydantic import ValidationError

from layerwise.config.listing import options

_PLAIN_WORDS = {
    "int_parsing": "must be a whole number",
    "int_type": "must be a whole number",
    "int_from_float": "must be a whole number",
    "float_parsing": "must be a number",
    "float_type": "must be a number",
}


_PATTERNS = {
    "training.device": "must be auto, cpu, cuda or cuda:N",
    "net.name": "must be speech, vision, torchvision:NAME or package.module:function",
}


def sentence(error: ValidationError) -> str:
    """The first thing that is wrong, with the option, the value and what would be right."""
    first = error.errors()[0]
    key = ".".join(str(part) for part in first["loc"])
    if first["type"] == "extra_forbidden":
        return f"There is no option {key!r}; did you mean {' or '.join(_near(key))}?"
    flag = next((option.flag for option in options() if option.key == key), None)
    plain = _PATTERNS.get(key) if first["type"] == "string_pattern_mismatch" else _PLAIN_WORDS.get(first["type"])
    message = plain or first["msg"].removeprefix("Value error, ")
    shown = "" if first["type"] == "value_error" else f", got {first['input']!r}"
    return f"{flag or key}: {message[0].lower() + message[1:]}{shown}."


def _near(key: str) -> list[str]:
    """Options with a like name: whole, or behind their section."""
    known = [option.key for option in options()]
    same_ending = [name for name in known if name.split(".")[-1] == key.split(".")[-1]]
    return same_ending or difflib.get_close_matches(key, known, n=3, cutoff=0.0)
