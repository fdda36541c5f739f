"""Sizes, times and rates as a person reads them."""


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
