"""layerwise trains deep networks that do not fit on the GPU, one gradient-isolated module at a time.

The public API, in the words of the command line:

    config = layerwise.resolve(overrides={"data.source": "speech:recordings", "memory.gpu_mem": "4GB"})
    layerwise.plan(config)
    result = layerwise.run(config)
    layerwise.probe(result.paths.out, "speaker")
    layerwise.compare(config, "speaker", seeds=[0])
    layerwise.write_report(result.paths.out)
    encoder = layerwise.load(result.paths.out)
    layerwise.extract(result.paths.out, "new_recordings", "features.h5")
    layerwise.export(result.paths.out, "my_encoder", "onnx")
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from layerwise.version import __version__

if TYPE_CHECKING:
    from layerwise.config import Config, resolve
    from layerwise.encoder.card import Exported
    from layerwise.encoder.export import export
    from layerwise.encoder.extract import Extracted, extract
    from layerwise.encoder.load import load
    from layerwise.encoder.model import Encoder
    from layerwise.engines.plan import plan
    from layerwise.engines.run import RunResult, run
    from layerwise.errors import LayerwiseError
    from layerwise.evaluate.compare import Comparison, compare
    from layerwise.evaluate.probe import ProbeResult, probe
    from layerwise.forecast import Forecast
    from layerwise.objectives import register_objective
    from layerwise.report.html import write_report
    from layerwise.run_directory import RunState, open_run

__all__ = [
    "Comparison",
    "Config",
    "Encoder",
    "Exported",
    "Extracted",
    "Forecast",
    "LayerwiseError",
    "ProbeResult",
    "RunResult",
    "RunState",
    "__version__",
    "compare",
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
    "plan": "layerwise.engines.plan",
    "RunResult": "layerwise.engines.run",
    "run": "layerwise.engines.run",
    "LayerwiseError": "layerwise.errors",
    "Comparison": "layerwise.evaluate.compare",
    "compare": "layerwise.evaluate.compare",
    "register_objective": "layerwise.objectives",
    "ProbeResult": "layerwise.evaluate.probe",
    "probe": "layerwise.evaluate.probe",
    "RunState": "layerwise.run_directory",
    "open_run": "layerwise.run_directory",
    "write_report": "layerwise.report.html",
}


def __getattr__(name: str) -> Any:
    # Looked up when first used: importing torch takes seconds, and `layerwise status` does without it.
    if name not in _HOME:
        raise AttributeError(f"module 'layerwise' has no attribute {name!r}; it has {', '.join(__all__)}")
    return getattr(import_module(_HOME[name]), name)
