"""Stitches the trained modules into one file, on the host."""

from layerwise.config import Config
from layerwise.run_directory import RunPaths
from layerwise.training.checkpoint import load_stage, save_arrays
from layerwise.training.plan import StagePlan


def stitch(config: Config, paths: RunPaths, plans: list[StagePlan]) -> None:
    """Writes encoder.safetensors: the weights of all layers under their names in the whole network."""
    arrays = {}
    for plan in plans:
        arrays |= load_stage(paths, plan.stage)
    save_arrays(paths.encoder, arrays, {"config": config.to_toml()})
