"""What is wrong with an option, in one sentence."""

import re

from pydantic import ValidationError

from layerwise.config.listing import options
from layerwise.near import did_you_mean, near

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
        return f"There is no option {key!r}{_instead(key)}"
    flag = next((option.flag for option in options() if option.key == key), None)
    plain = _PATTERNS.get(key) if first["type"] == "string_pattern_mismatch" else _PLAIN_WORDS.get(first["type"])
    message = plain or first["msg"].removeprefix("Value error, ")
    shown = "" if first["type"] == "value_error" else f", got {first['input']!r}"
    meant = re.findall("'(.+?)'", first["ctx"]["expected"]) if first["type"] == "literal_error" else []
    return f"{flag or key}: {message[0].lower() + message[1:]}{shown}.{did_you_mean(str(first['input']), meant)}"


def _instead(key: str) -> str:
    """Options with a like name: behind their section, or else whole."""
    known = [option.key for option in options()]
    endings = near(key.split(".")[-1].replace("-", "_"), {name.split(".")[-1] for name in known})
    meant = [name for name in known if name.split(".")[-1] in endings[:1]] or near(key, known)
    return f"; did you mean {' or '.join(meant)}?" if meant else "; `layerwise init` writes a file with all there are."
