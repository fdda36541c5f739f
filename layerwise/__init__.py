"""layerwise trains deep networks that do not fit on the GPU, one gradient-isolated module at a time.

The public API, in the words of the command line. A network of your own on data of your own, in a script or a notebook:

    stages = layerwise.cut(model, example, stages=6)
    layerwise.plan(stages, dataset, gpu_mem="4GB")
    result = layerwise.run(stages, dataset, gpu_mem="4GB", out="runs/mine")
    encoder = layerwise.load("runs/mine", network=stages)  # and the model has the trained weights

The paper's networks on folders, as the command line does it:

    result = layerwise.run(data="speech:recordings", gpu_mem="4GB", out="runs/mine")
    layerwise.probe("runs/mine", "speaker")
    layerwise.write_report("runs/mine")
    layerwise.extract("runs/mine", "new_recordings", "features.h5")
    layerwise.export("runs/mine", "my_encoder", "onnx")
"""

import sys

if sys.argv[:1] == ["-m"] and not sys.flags.safe_path and "layerwise" in {_.partition(".")[0] for _ in sys.orig_argv}:
    # `python -m layerwise` searches the present folder first; a json.py there must not be taken for Python's own.
    sys.path.append(sys.path.pop(0))

from importlib import import_module
from typing import TYPE_CHECKING, Any

from layerwise.version import __version__ as __version__

if TYPE_CHECKING:  # for type checkers and editors; "as" says that the name is public here
    from layerwise.api import cut as cut
    from layerwise.api import plan as plan
    from layerwise.api import run as run
    from layerwise.config import Config as Config
    from layerwise.config import resolve as resolve
    from layerwise.encoder.export import Exported as Exported
    from layerwise.encoder.export import export as export
    from layerwise.encoder.extract import Extracted as Extracted
    from layerwise.encoder.extract import extract as extract
    from layerwise.encoder.load import load as load
    from layerwise.encoder.load import state_dict as state_dict
    from layerwise.encoder.model import Encoder as Encoder
    from layerwise.engines.run import RunResult as RunResult
    from layerwise.errors import BudgetError as BudgetError
    from layerwise.errors import ConfigError as ConfigError
    from layerwise.errors import DataError as DataError
    from layerwise.errors import Interrupted as Interrupted
    from layerwise.errors import LayerwiseError as LayerwiseError
    from layerwise.evaluate.compare import compare as compare
    from layerwise.evaluate.probe import probe as probe
    from layerwise.evaluate.results import Comparison as Comparison
    from layerwise.events import EpochDone as EpochDone
    from layerwise.events import Event as Event
    from layerwise.events import StageDone as StageDone
    from layerwise.forecast import Forecast as Forecast
    from layerwise.nets.network import Network as Network
    from layerwise.objectives import register_objective as register_objective
    from layerwise.report.html import write_report as write_report
    from layerwise.run_store import ProbeResult as ProbeResult
    from layerwise.run_store import RunState as RunState
    from layerwise.run_store import open_run as open_run

_PUBLIC = {
    "layerwise.api": ("cut", "plan", "run"),
    "layerwise.config": ("Config", "resolve"),
    "layerwise.encoder.export": ("Exported", "export"),
    "layerwise.encoder.extract": ("Extracted", "extract"),
    "layerwise.encoder.load": ("load", "state_dict"),
    "layerwise.encoder.model": ("Encoder",),
    "layerwise.engines.run": ("RunResult",),
    "layerwise.errors": ("BudgetError", "ConfigError", "DataError", "Interrupted", "LayerwiseError"),
    "layerwise.evaluate.compare": ("compare",),
    "layerwise.evaluate.probe": ("probe",),
    "layerwise.evaluate.results": ("Comparison",),
    "layerwise.events": ("EpochDone", "Event", "StageDone"),
    "layerwise.forecast": ("Forecast",),
    "layerwise.nets.network": ("Network",),
    "layerwise.objectives": ("register_objective",),
    "layerwise.report.html": ("write_report",),
    "layerwise.run_store": ("ProbeResult", "RunState", "open_run"),
}
_MODULE_OF = {name: module for module, names in _PUBLIC.items() for name in names}
__all__ = sorted(["__version__", *_MODULE_OF])


def __getattr__(name: str) -> Any:
    # Looked up when first used: importing torch takes seconds, and `layerwise status` does without it.
    if name not in _MODULE_OF:
        raise AttributeError(f"module 'layerwise' has no attribute {name!r}; it has {', '.join(__all__)}")
    return getattr(import_module(_MODULE_OF[name]), name)
