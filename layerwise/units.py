"""Sizes, times and rates as a person reads them, and times as a person writes them."""

import re

_WITH_UNITS = re.compile(
    r"(?:(?P<d>[\d.]+) *d)? *(?:(?P<h>[\d.]+) *h)? *(?:(?P<min>[\d.]+) *min)? *(?:(?P<s>[\d.]+) *s)?"
)
_WITH_COLONS = re.compile(r"(?P<h>\d+):(?P<min>[0-5]?\d):(?P<s>[0-5]?\d)")
_WITH_DAYS = re.compile(r"(?P<d>\d+)-(?P<h>\d+)(?::(?P<min>[0-5]?\d)(?::(?P<s>[0-5]?\d))?)?")
_SECONDS = {"d": 86_400, "h": 3600, "min": 60, "s": 1}


def size(count: int | None) -> str:
    """Bytes in decimal units, as in --gpu-mem: 343 MB, 4 GB."""
    if count is None:
        return "-"
    value, unit = float(count), "B"
    for larger in ("kB", "MB", "GB", "TB"):
        if value < 999.5:
            break
        value, unit = value / 1000, larger
    return f"{value:.3g} {unit}" if value < 100 else f"{value:.0f} {unit}"


def duration(seconds: float) -> str:
    """Seconds as 42 s, 3 min 20 s or 2 h 05 min."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    return f"{whole // 3600} h {whole % 3600 // 60:02d} min"


def percent(rate: float) -> str:
    """A rate from 0 to 1 as 4.3 %."""
    return f"{100 * rate:.1f} %"


def seconds(text: str) -> float:
    """The seconds of 2h, 1h 30min, 90min, 3600s, 1:30:00, 1-12:00:00 or 1-12. Raises ValueError."""
    found = next(
        (match for form in (_WITH_COLONS, _WITH_DAYS, _WITH_UNITS) if (match := form.fullmatch(text.strip()))), None
    )
    try:
        total = sum(float(count) * _SECONDS[unit] for unit, count in found.groupdict().items() if count) if found else 0
    except ValueError:
        total = 0
    if not total:
        raise ValueError(f"{text!r} is no length of time; write it like 2h, 90min, 3600s, 1:30:00 or 1-12:00:00")
    return total
