"""From a run directory, or an exported folder, to the encoder; neither the data set nor the caches are needed."""

from pathlib import Path

from torch import nn

from layerwise.config import refuse_function, refuse_other_network
from layerwise.encoder.entry import Entry, Pictures, Steps, Waveforms, Whole
from layerwise.encoder.model import Encoder
from layerwise.errors import ConfigError, RunError
from layerwise.nets import build_network
from layerwise.nets.module import Module
from layerwise.nets.network import Network, ranges
from layerwise.nets.traced import traced_network
from layerwise.run_store import RunStore
from layerwise.training.checkpoint import Arrays, load_weights
from layerwise.training.encoder import Origin, load_encoder
from layerwise.training.forward import InferenceStage

Given = Network | nn.Module | str | None
"""A network that the run was given as an object, or the package.module:function that made it."""


def load(place: str | Path, *, stage: int | None = None, network: Given = None) -> Encoder:
    """The trained encoder of a finished run, on the CPU and in eval mode.

    place: a run directory, a folder made by `export` as safetensors, or an encoder.safetensors. stage: the last stage to
    keep; default: all. network: the one that the run was given, where it is neither the paper's nor torchvision's: as an
    object, or as the package.module:function that the run was given. Nothing is unpickled, and nothing that a file names is
    called. Raises RunError where there is no encoder or its weights do not fit its network, ConfigError for stage and network.
    """
    origin, stages = load_stages(Path(place), stage, network)
    return Encoder(entry_of(origin), [each.module for each in stages]).eval()


def load_stages(place: Path, stage: int | None, network: Given) -> tuple[Origin, list[InferenceStage]]:
    """Stages 1 to `stage`, each by itself; see `load`."""
    path, expected = _encoder_file(place)
    weights, origin = load_encoder(path, expected)
    network = _network(origin, network, path)
    stages = len(origin.cut)
    if stage is not None and not 1 <= stage <= stages:
        raise ConfigError(f"--stage {stage}: the encoder in {place} has stages 1 to {stages}.")
    cut = ranges(origin.cut)
    _check_shapes(network.build(range(cut[-1].stop), 0, "meta"), weights, path)
    built = []
    for number, (layers, output_format) in enumerate(zip(cut[:stage], origin.handings, strict=False), start=1):
        module = network.build(layers, 0, "cpu").eval()
        load_weights(module, {name: weights[name] for name in module.state_dict()})
        built.append(InferenceStage(number, module, output_format))
    return origin, built


def entry_of(origin: Origin) -> Entry:
    """The way into the encoder."""
    data, frame_shape = origin.config.data, tuple(origin.frame_shape)
    if origin.takes == "pictures":
        return Pictures(data)
    if origin.takes == "waveforms":
        return Waveforms(data, origin.level, frame_shape)
    return Whole(origin.level, frame_shape) if data.frames == "whole" else Steps(data, origin.level, frame_shape)


def _encoder_file(place: Path) -> tuple[Path, str | None]:
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


def _network(origin: Origin, given: Given, path: Path) -> Network:
    """The network that the weights belong to."""
    name = origin.config.net.name
    if isinstance(given, nn.Module):
        given = traced_network(given, tuple(origin.frame_shape))
    if isinstance(given, str):
        refuse_other_network(origin.config, given, path)
        given = None
    elif given is None:
        refuse_function(origin.config, "net.name", path)
    if origin.network and given is None and ":" not in name:
        raise ConfigError(
            f"{path} belongs to a network of the user's own, which no option names; give it as network= in Python."
        )
    net = origin.config.net.model_copy(update={"weights": ""})  # those that it started from are not needed any more
    network: Network = given or build_network(net, tuple(origin.frame_shape), origin.config.training.seed)
    if network.structure != origin.network:
        raise ConfigError(f"The network given is not the one that {path} was trained with; give that one, as it was.")
    if sum(origin.cut) != len(network.layers):
        raise RunError(
            f"{path} is damaged: it is cut into {sum(origin.cut)} layers, and its network has {len(network.layers)}; "
            "restore it, or start its run again."
        )
    return network


def _check_shapes(described: Module, weights: Arrays, path: Path) -> None:
    """Raises RunError where weights are missing, left over or of another shape; before any memory is taken for them."""
    expected = {name: tuple(tensor.shape) for name, tensor in described.state_dict().items()}
    found = {name: value.shape for name, value in weights.items()}
    for name in sorted(expected.keys() | found.keys()):
        if expected.get(name) != found.get(name):
            raise RunError(
                f"{path} does not fit its network: the shape of {name} is {found.get(name, 'missing')} and should be "
                f"{expected.get(name, 'missing')}; restore the file, or start its run again."
            )
