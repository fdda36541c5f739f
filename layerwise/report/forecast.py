"""The table of a plan, and what it comes to."""

from rich.table import Table

from layerwise.forecast import Forecast
from layerwise.report.summary import table
from layerwise.units import size


def forecast_table(forecast: Forecast) -> Table:
    """One row per stage, and one for all of them."""
    shown = table("stage", "parameters", "train peak", "cache peak", "layout", "input", "cache", "host", "")
    shown.collapse_padding = True
    for stage in forecast.stages:
        shown.add_row(
            str(stage.stage),
            f"{stage.parameters:,}",
            size(stage.train_peak_bytes),
            size(stage.cache_peak_bytes),
            stage.layout,
            stage.input,
            size(stage.cache_bytes) if stage.cached else f"({size(stage.cache_bytes)})",
            size(stage.host_bytes),
            "" if forecast.budget_bytes is None else "fits" if stage.fits else "too large",
        )
    shown.add_row(
        "all",
        f"{sum(stage.parameters for stage in forecast.stages):,}",
        size(max(stage.train_peak_bytes for stage in forecast.stages)),
        size(max(stage.cache_peak_bytes for stage in forecast.stages)),
        "",
        "",
        size(forecast.cache_bytes),
        size(forecast.host_bytes),
        "",
    )
    return shown


def reasons(forecast: Forecast) -> list[str]:
    """Why stages are not laid out in the cheapest way, and what is not cached."""
    return forecast.notes + [
        f"stage {stage.stage}: {stage.layout}, because {stage.why}" for stage in forecast.stages if stage.why
    ]


def verdict(forecast: Forecast) -> str:
    """Whether the budget holds, and the smallest that would."""
    smallest = f"the smallest budget for this cut is {exact(forecast.smallest_budget_bytes)}"
    peak = f"device peak {size(forecast.peak_bytes)} on {forecast.device}"
    if forecast.budget_bytes is None:
        return f"{peak}; {smallest}"
    if forecast.fits:
        return f"fits: {peak} of {size(forecast.budget_bytes)}; {smallest}"
    return f"--gpu-mem {size(forecast.budget_bytes)} is too small; {smallest}"


def disk(forecast: Forecast) -> str:
    """What the caches take."""
    of = "" if forecast.disk_budget_bytes is None else f" of {size(forecast.disk_budget_bytes)}"
    return f"caches take {size(forecast.disk_bytes)}{of} at once"


def exact(count: int) -> str:
    """Bytes as an option that is large enough: rounded up, never down."""
    for unit, name in ((10**9, "GB"), (10**6, "MB"), (10**3, "kB")):
        if count >= unit:
            return f"{-(-count * 100 // unit) / 100:g}{name}"
    return f"{count}B"
