"""layerwise trains deep networks that do not fit on the GPU, one gradient-isolated module at a time.

The public API, in the words of the command line:

    config = layerwise.resolve(overrides={"data.source": "speech:recordings", "memory.gpu_mem": "4GB"})
    result = layerwise.run(config)
    layerwise.probe(result.paths.out, "speaker")
"""

from layerwise.config import Config, resolve
from layerwise.engines.run import RunResult, run
from layerwise.errors import LayerwiseError
from layerwise.evaluate.probe import ProbeResult, probe
from layerwise.run_directory import RunState, open_run
from layerwise.version import __version__

__all__ = [
    "Config",
    "LayerwiseError",
    "ProbeResult",
    "RunResult",
    "RunState",
    "__version__",
    "open_run",
    "probe",
    "resolve",
    "run",
]
