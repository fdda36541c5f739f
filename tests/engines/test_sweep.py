"""What is predicted for several cuts, and what is said of end-to-end training."""

import io
import json
import re
from collections.abc import Callable
from pathlib import Path

import pytest
from click.testing import CliRunner
from rich.console import Console

from layerwise.commands.before_run import plan as plan_command
from layerwise.config import Config, resolve, with_options
from layerwise.engines.plan import plan, sweep
from layerwise.engines.run import run
from layerwise.errors import ConfigError
from layerwise.events import Message
from layerwise.forecast import END_TO_END
from layerwise.report.html import write_report
from layerwise.report.tables import cheapest_cut, forecast_lines, forecast_table, sweep_table

BUDGET = {"memory.flops_per_byte": 16, "training.batch_size": 2}
"""Few plans, in an order that does not depend on the machine."""


def test_a_sweep_has_a_row_for_each_of_several_cuts_and_names_the_one_of_the_least_time(
    tiny_speech: Callable[..., Config], digits: Path
) -> None:
    config = tiny_speech(f"fsdd:{digits}", **BUDGET, **{"memory.gpu_mem": "1MB"})
    forecasts = sweep(config)
    layers = sum(stage.layers for stage in forecasts[0].stages)
    assert [len(each.stages) for each in forecasts] == sorted({1, 2, 3, layers})
    assert next(iter(sweep_table(forecasts).columns[0].cells)) == "1, end to end"
    for each in forecasts:
        alone = plan(with_options(config, {"training.stages": len(each.stages)}))
        assert (each.peak_bytes, each.flops, each.moved_bytes) == (alone.peak_bytes, alone.flops, alone.moved_bytes)
        assert each.hours > 0
    fitting = [each for each in forecasts if each.fits]
    best = min(fitting, key=lambda each: each.hours)
    assert f"--stages {len(best.stages)})" in cheapest_cut(forecasts)


@pytest.mark.usefixtures("small_demo")
def test_tables_of_plans_are_whole_on_a_terminal_of_80_columns_and_layouts_stand_below() -> None:
    forecast = plan(resolve(overrides={**BUDGET, "net.context": 0, "memory.gpu_mem": "4MB"}))
    assert {stage.fits for stage in forecast.stages} == {True}
    for shown in (forecast_table(forecast), sweep_table([forecast])):
        console = Console(width=80, file=io.StringIO())
        with console.capture() as captured:
            console.print(shown)
        assert "…" not in captured.get()
        assert "fits" in captured.get().splitlines()[0]
    laid_out = [line for line in forecast_lines(forecast) if line.startswith("stage ")]
    assert [stage.why for stage in forecast.stages if stage.why]
    for stage in forecast.stages:
        assert (stage.layout == "whole batch") != (
            f"stage {stage.stage}: {stage.layout}, because {stage.why}" in laid_out
        )


def test_a_sweep_that_nothing_fits_says_what_would(tiny_speech: Callable[..., Config], digits: Path) -> None:
    two_layers = {"net.kernels": [10, 8], "net.strides": [5, 4], "net.paddings": [2, 2]}
    forecasts = sweep(tiny_speech(f"fsdd:{digits}", **BUDGET, **two_layers, **{"memory.gpu_mem": "10kB"}))
    assert re.search(
        r"No cut fits under --gpu-mem 10 kB; the smallest budget of all is [\d.]+kB", cheapest_cut(forecasts)
    )


def test_a_sweep_is_drawn_and_given_as_json(tiny_speech: Callable[..., Config], digits: Path, tmp_path: Path) -> None:
    file = tmp_path / "config.toml"
    file.write_text(tiny_speech(f"fsdd:{digits}", **BUDGET).to_toml())
    drawn = tmp_path / "sweep.svg"
    found = CliRunner().invoke(plan_command, ["--config", str(file), "--sweep", "--plot", str(drawn), "--json"])
    assert found.exit_code == 0, found.output
    cuts = json.loads(found.stdout)
    assert {"smallest_budget_bytes", "peak_bytes", "disk_bytes", "hours", "stages"} <= cuts[0].keys()
    assert {"flops", "moved_bytes"} <= cuts[0]["stages"][0].keys()
    assert "smallest budget" in drawn.read_text()
    refused = CliRunner().invoke(plan_command, ["--config", str(file), "--plot", str(drawn)])
    assert isinstance(refused.exception, ConfigError)


@pytest.mark.parametrize("stages", [1, 3])
def test_end_to_end_training_is_called_so(tiny_speech: Callable[..., Config], digits: Path, stages: int) -> None:
    messages: list[str] = []
    config = tiny_speech(f"fsdd:{digits}", **{"training.stages": stages, "training.max_epochs": 1})
    result = run(config, notify=lambda event: messages.append(event.text) if isinstance(event, Message) else None)
    said = (
        END_TO_END in messages,
        END_TO_END in plan(config).notes,
        END_TO_END in write_report(result.paths.out).read_text(),
    )
    assert said == ((stages == 1),) * 3


def test_a_start_without_a_budget_keeps_the_rates_of_an_earlier_one(
    tiny_speech: Callable[..., Config], digits: Path
) -> None:
    config = tiny_speech(f"fsdd:{digits}", **{"training.stages": 1, "training.max_epochs": 1})
    first = run(with_options(config, {"memory.gpu_mem": "1GB", "memory.flops_per_byte": 4096}))
    assert first.state.config.memory.flops_per_byte == 4096
    assert run(config).state.config.memory.flops_per_byte == 4096
