"""layerwise trains deep networks that do not fit on the GPU, one gradient-isolated module at a time.

The public API, in the words of the command line. A network of your own on data of your own, in a script or a notebook:

    stages = layerwise.cut(model, example, stages=6)
    layerwise.plan(stages, dataset, gpu_mem="4GB")
    result = layerwise.run(stages, dataset, gpu_mem="4GB", out="runs/mine")
    encoder = layerwise.load("runs/mine", network=stages)

The paper's networks on folders, as the command line does it:

    result = layerwise.run(data="speech:recordings", gpu_mem="4GB", out="runs/mine")
    layerwise.probe("runs/mine", "speaker")
    layerwise.write_report("runs/mine")
    layerwise.extract("runs/mine", "new_recordings", "features.h5")
    layerwise.export("runs/mine", "my_encoder", "onnx")
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from layerwise.version import __version__

if TYPE_CHECKING:
    from layerwise.api import cut, plan, probe, run
    from layerwise.config import Config, resolve
    from layerwise.encoder.card import Exported
    from layerwise.encoder.export import export
    from layerwise.encoder.extract import Extracted, extract
    from layerwise.encoder.load import load
    from layerwise.encoder.model import Encoder
    from layerwise.engines.run import RunResult
    from layerwise.errors import BudgetError, ConfigError, DataError, Interrupted, LayerwiseError
    from layerwise.evaluate.compare import compare
    from layerwise.evaluate.results import Comparison, ProbeResult
    from layerwise.events import EpochDone, Event, StageDone
    from layerwise.forecast import Forecast
    from layerwise.nets.network import Network
    from layerwise.objectives import register_objective
    from layerwise.report.html import write_report
    from layerwise.run_store import RunState, open_run

__all__ = [
    "BudgetError",
    "Comparison",
    "Config",
    "ConfigError",
    "DataError",
    "Encoder",
    "EpochDone",
    "Event",
    "Exported",
    "Extracted",
    "Forecast",
    "Interrupted",
    "LayerwiseError",
    "Network",
    "ProbeResult",
    "RunResult",
    "RunState",
    "StageDone",
    "__version__",
    "compare",
    "cut",
    "export",
    "extract",
    "load",
    "open_run",
    "plan",
    "probe",
    "register_objective",
    "resolve",
    "run",
    "write_report",
]

_HOME = {
    "Config": "layerwise.config",
    "resolve": "layerwise.config",
    "Encoder": "layerwise.encoder.model",
    "Exported": "layerwise.encoder.card",
    "export": "layerwise.encoder.export",
    "Extracted": "layerwise.encoder.extract",
    "extract": "layerwise.encoder.extract",
    "load": "layerwise.encoder.load",
    "Forecast": "layerwise.forecast",
    "cut": "layerwise.api",
    "plan": "layerwise.api",
    "RunResult": "layerwise.engines.run",
    "run": "layerwise.api",
    "EpochDone": "layerwise.events",
    "Event": "layerwise.events",
    "StageDone": "layerwise.events",
    "Network": "layerwise.nets.network",
    "BudgetError": "layerwise.errors",
    "ConfigError": "layerwise.errors",
    "DataError": "layerwise.errors",
    "Interrupted": "layerwise.errors",
    "LayerwiseError": "layerwise.errors",
    "Comparison": "layerwise.evaluate.results",
    "compare": "layerwise.evaluate.compare",
    "register_objective": "layerwise.objectives",
    "ProbeResult": "layerwise.evaluate.results",
    "probe": "layerwise.api",
    "RunState": "layerwise.run_store",
    "open_run": "layerwise.run_store",
    "write_report": "layerwise.report.html",
}


def __getattr__(name: str) -> Any:
    # Looked up when first used: importing torch takes seconds, and `layerwise status` does without it.
    if name not in _HOME:
        raise AttributeError(f"module 'layerwise' has no attribute {name!r}; it has {', '.join(__all__)}")
    return getattr(import_module(_HOME[name]), name)
