"""From a run directory, or an exported folder, to the encoder; neither the data set nor the caches are needed."""

from collections.abc import Mapping
from pathlib import Path
from typing import TypeVar

import torch
from torch import nn

from layerwise.config import refuse_function, refuse_other_network
from layerwise.encoder.entry import Entry, Pictures, Steps, Waveforms, Whole
from layerwise.encoder.model import Encoder
from layerwise.errors import ConfigError, RunError
from layerwise.memory.device import keep_recurrence_in_float32
from layerwise.nets import build_network
from layerwise.nets.network import Network, ranges
from layerwise.nets.traced import by_own_names, traced_network
from layerwise.training.checkpoint import Arrays, load_weights
from layerwise.training.encoder import Origin, check_shapes, encoder_file, load_encoder
from layerwise.training.forward import InferenceStage

T = TypeVar("T")

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
    weights, origin, built_of = _read(place, network)
    stages = len(origin.cut)
    if stage is not None and not 1 <= stage <= stages:
        raise ConfigError(f"--stage {stage}: the encoder in {place} has stages 1 to {stages}.")
    cut = ranges(origin.cut)
    built = []
    for number, (layers, output_format) in enumerate(zip(cut[:stage], origin.handings, strict=False), start=1):
        module = built_of.build(layers, 0, "cpu").eval()
        keep_recurrence_in_float32(module)  # as in training: what is extracted is to be what was cached
        load_weights(module, {name: weights[name] for name in module.state_dict()})
        built.append(InferenceStage(number, module, output_format))
    return origin, built


def state_dict(place: str | Path, *, network: Given = None) -> dict[str, torch.Tensor]:
    """The trained weights of a finished run by the names of the network's own module, for its `load_state_dict`.

    place, network and errors as in `load`. A weight of several names stands under each of them; what the cut does not reach,
    such as a head that the forward does not call, is not in it. Of the paper's networks the module is the encoder that `load`
    gives.
    """
    weights, _, given = _read(Path(place), network)
    return {name: torch.from_numpy(value) for name, value in own_weights(given, weights).items()}


def own_weights(network: Network, weights: Mapping[str, T]) -> dict[str, T]:
    """An encoder's weights by the names of the network's own module; where it has none, by those of the encoder."""
    return dict(weights) if network.model is None else by_own_names(network.model, weights)


def _read(place: Path, given: Given) -> tuple[Arrays, Origin, Network]:
    """What `load` is about: weights, what they come from, and the network that they fit."""
    path, expected = encoder_file(place)
    weights, origin = load_encoder(path, expected)
    network = network_of(origin, given, path)
    check_shapes(network.build(range(sum(origin.cut)), 0, "meta"), weights, path)
    return weights, origin, network


def entry_of(origin: Origin) -> Entry:
    """The way into the encoder."""
    data, frame_shape = origin.config.data, tuple(origin.frame_shape)
    if origin.takes == "pictures":
        return Pictures(data)
    if origin.takes == "waveforms":
        return Waveforms(data, origin.level, frame_shape)
    return Whole(origin.level, frame_shape) if data.frames == "whole" else Steps(data, origin.level, frame_shape)


def network_of(origin: Origin, given: Given, path: Path) -> Network:
    """The network that the weights in path belong to. Raises ConfigError, and RunError where the file is damaged."""
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
