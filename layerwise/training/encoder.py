"""The stitched encoder as one file: all weights, and in its header everything else that it takes to use them.

No data set and no run directory are needed to load it, and loading runs no code: weights as safetensors, the rest as text. It
does not say where it was made: the same training gives the same bytes, whatever its folders, its engine and its device.
"""

import json
import math
from dataclasses import asdict, dataclass, field
from pathlib import Path

from layerwise.config import Config, parsed, result_toml, without_places
from layerwise.errors import ConfigError, RunError
from layerwise.training.checkpoint import Arrays, digest_of_file, load_arrays, load_stages, save_arrays
from layerwise.training.forward import OutputFormat
from layerwise.training.run import Run
from layerwise.version import __version__


@dataclass(frozen=True, slots=True)
class Origin:
    """What an encoder comes from."""

    config: Config
    """Of the run, without places."""
    cut: list[int]
    """Layers in each stage."""
    handings: list[OutputFormat]
    """How each of them hands its outputs on."""
    level: float
    """What recordings were divided by; 1 for pictures."""
    takes: str
    """What it is given: waveforms, pictures or arrays."""
    frame_shape: list[int]
    """Of its input, as the network reads it."""
    samples: int
    """In the data set."""
    network: str = ""
    """Structure of a network that is none of the paper's; empty where options say all about it."""
    version: str = field(default=__version__)
    """Of the layerwise that trained it."""


def stitch(run: Run) -> None:
    """Writes encoder.safetensors, on the host: the weights of all layers under their names in the whole network."""
    data, specs, cut, handings = run.data, run.specs, [], []
    state = run.store.load_state()
    for spec in specs:
        trained_with = state.record(spec.stage).trained_with
        for _ in spec.parts[:-1]:  # which nothing lay between
            handings.append(OutputFormat(trained_with.training.precision, None))
        handings.append(OutputFormat.of(trained_with))
        cut += [len(part.layers) for part in spec.parts or (spec,)]
    structure, shape = specs[0].network.structure, list(data.frame_shape)
    origin = Origin(without_places(run.config), cut, handings, data.level, data.takes, shape, len(data.ids), structure)
    weights, header = load_stages(run.store, state.stages), encoder_header(origin)
    state.encoder, state.from_stage = digest_of_file(weights, header), None
    run.store.save_state(state)
    save_arrays(run.store.encoder, weights, header)


def save_encoder(path: Path, weights: Arrays, origin: Origin) -> None:
    """Replaces the file atomically. Raises RunError."""
    save_arrays(path, weights, encoder_header(origin))


def encoder_header(origin: Origin) -> dict[str, str]:
    """What an encoder's file says beside its weights."""
    described = {name: value for name, value in asdict(origin).items() if name != "config"}
    return {"config": result_toml(origin.config), "origin": json.dumps(described)}


def load_encoder(path: Path, expected: str | None = None) -> tuple[Arrays, Origin]:
    """Weights and origin. expected: the digest that a run has recorded of it.

    Raises RunError where the file is missing, damaged, another run's, or of a layerwise that wrote no origin.
    """
    way_out = "start its run again with the same command, which writes it anew and trains nothing."
    weights, header = load_arrays(path, way_out)
    if expected not in (None, digest_of_file(weights, header)):
        raise RunError(f"{path} is not the encoder that its run has written; {way_out}")
    try:
        described = json.loads(header["origin"])
        handings = [OutputFormat(**each) for each in described.pop("handings")]
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise RunError(
            f"{path} does not say how it is to be used ({error!r}): it is damaged, or an earlier layerwise wrote it; {way_out}"
        ) from None
    try:
        origin = Origin(without_places(parsed(header["config"])), handings=handings, **described)
        sizes = [*origin.cut, *origin.frame_shape]
        if not (all(isinstance(size, int) and size > 0 for size in sizes) and 0 < origin.level < math.inf):
            raise ValueError("cut, frame shape or level")
        if len(handings) != len(origin.cut):
            raise ValueError("handings")
    except (ValueError, KeyError, TypeError, ConfigError) as error:
        raise RunError(f"The header of {path} is damaged ({error}); restore the file, or {way_out}") from None
    return weights, origin
