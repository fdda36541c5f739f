"""The stitched encoder as one file: all weights, and in its header everything else that it takes to use them.

No data set and no run directory are needed to load it, and loading runs no code: weights as safetensors, the rest as text. It
does not say where it was made: the same training gives the same bytes, whatever its folders, its engine and its device.
"""

import json
import math
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Annotated, Any, get_type_hints

from pydantic import ConfigDict, Field, create_model

from layerwise.config import Config, parsed, result_toml, without_places
from layerwise.errors import ConfigError, RunError
from layerwise.nets.module import Module
from layerwise.nets.network import Network
from layerwise.records import finding
from layerwise.run_store import RunStore
from layerwise.training.checkpoint import Arrays, digest_of_file, load_arrays, load_stages, save_arrays
from layerwise.training.forward import OutputFormat
from layerwise.training.run import Run
from layerwise.version import __version__

MOST_LAYERS = 10_000

MOST_VALUES = 2**30
"""In a window of an encoder's input."""


@dataclass(frozen=True, slots=True)
class Origin:
    """What an encoder comes from."""

    config: Config
    """Of the run, without places."""
    cut: Annotated[list[Annotated[int, Field(ge=1, le=MOST_LAYERS)]], Field(min_length=1, max_length=MOST_LAYERS)]
    """Layers in each stage."""
    handings: list[OutputFormat]
    """How each of them hands its outputs on."""
    level: Annotated[float, Field(gt=0, allow_inf_nan=False)]
    """What recordings were divided by; 1 for pictures."""
    takes: Annotated[str, Field(pattern="^(waveforms|pictures|arrays)$")]
    """What it is given: waveforms, pictures or arrays."""
    frame_shape: Annotated[list[Annotated[int, Field(ge=1, le=MOST_VALUES)]], Field(min_length=1, max_length=8)]
    """Of its input, as the network reads it."""
    samples: Annotated[int, Field(ge=0)]
    """In the data set."""
    network: str = ""
    """Structure of a network that is none of the paper's; empty where options say all about it."""
    version: str = field(default=__version__)
    """Of the layerwise that trained it."""


_Described: Any = create_model(
    "_Described",
    __config__=ConfigDict(strict=True, extra="forbid"),
    **{name: kind for name, kind in get_type_hints(Origin, include_extras=True).items() if name != "config"},
)
"""Of an origin, what stands in the header beside the configuration."""


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
    state.encoder = digest_of_file(weights, header)
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
        origin = Origin(
            without_places(parsed(header["config"])), **dict(_Described.model_validate_json(header["origin"]))
        )
        _check_sizes(origin)
    except KeyError as error:
        raise RunError(
            f"{path} does not say how it is to be used (it has no {error}): it is damaged, or an earlier layerwise wrote it; "
            f"{way_out}"
        ) from None
    except (ValueError, ConfigError) as error:
        raise RunError(f"The header of {path} is damaged ({finding(error)}); restore the file, or {way_out}") from None
    return weights, origin


def _check_sizes(origin: Origin) -> None:
    """Raises ValueError where what is made of the header alone would take more memory than any network that can be trained."""
    data = origin.config.data
    if len(origin.handings) != len(origin.cut) or sum(origin.cut) > MOST_LAYERS:
        raise ValueError("cut or handings")
    # Of steps that lie between two frames, the entry is given those too.
    steps = max(-(-(data.frame_step or 1) // data.frame_length), 1)
    window = data.window * steps if data.frames == "steps" else 1
    if math.prod(origin.frame_shape) * window > MOST_VALUES:
        raise ValueError("frame shape or window")


def encoder_file(place: Path) -> tuple[Path, str | None]:
    """With the digest that a run has recorded of it."""
    if not place.exists():
        raise RunError(f"There is no {place}; name a run directory, or a folder made by layerwise export.")
    if not place.is_dir():
        return place, None
    store = RunStore(place, place)
    state = store.load_state() if store.exists else None
    recorded = state.encoder if state else None
    if store.encoder.exists() and (recorded or state is None):
        return store.encoder, recorded
    if state is None:
        raise RunError(
            f"{place} holds no encoder.safetensors; name a run directory, or a folder made by layerwise export."
        )
    unfinished = [record.stage for record in state.stages if record.status != "done"]
    why = f": stage {unfinished[0]} is not done" if unfinished else ""
    raise RunError(f"{place} has no encoder yet{why}; go on with the run first.")


def check_shapes(described: Module, weights: Arrays, path: Path) -> None:
    """Raises RunError where weights are missing, left over or of another shape; before any memory is taken for them."""
    expected = {name: tuple(tensor.shape) for name, tensor in described.state_dict().items()}
    found = {name: value.shape for name, value in weights.items()}
    for name in sorted(expected.keys() | found.keys()):
        if expected.get(name) != found.get(name):
            raise RunError(
                f"{path} does not fit its network: the shape of {name} is {found.get(name, 'missing')} and should be "
                f"{expected.get(name, 'missing')}; restore the file, or start its run again. Other versions of layerwise may "
                "have built the network otherwise."
            )


def warm_start(place: Path, network: Network) -> Arrays:
    """The weights of a finished run, or of an exported folder, for another run of the same network.

    Raises RunError where there is no encoder, ConfigError where it is another network's.
    """
    path, expected = encoder_file(place)
    weights, origin = load_encoder(path, expected)
    described = network.build(range(len(network.layers)), 0, "meta")
    same_shapes = {name: tuple(tensor.shape) for name, tensor in described.state_dict().items()} == {
        name: value.shape for name, value in weights.items()
    }
    if origin.network != network.structure or not same_shapes:
        raise ConfigError(
            f"--warm-start {place}: its network is not the one of this run; give the same --net and its options."
        )
    return weights
