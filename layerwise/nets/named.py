"""Networks that are no options of ours but a name: those of libraries, and what a function of the user's makes."""

from dataclasses import replace
from typing import Any

import torch
from torch import nn

from layerwise.config import HUGGING_FACE, LIBRARIES, TIMM, TORCHVISION, NetOptions
from layerwise.errors import ConfigError
from layerwise.importing import called
from layerwise.nets.hugging_face import hugging_face_model
from layerwise.nets.network import Network
from layerwise.nets.pictures import timm_model, torchvision_model
from layerwise.nets.traced import traced_network


def named_network(net: NetOptions, frame_shape: tuple[int, ...], seed: int) -> Network:
    """The network of --net torchvision:NAME, timm:NAME, hf:PATH or package.module:function, with one stage per unit that it
    can be cut into, or those of --at. Of a library's, normalisations are no stages of their own, see `_mixing_sizes`.

    Its first weights are those that it is made with after this seed, or given ones. A function may take the frame shape,
    channels first, and gives an nn.Module, or the Network that `layerwise.cut` makes of one. Raises ConfigError.
    """
    if net.weights and not net.name.startswith((TORCHVISION, TIMM)):
        raise ConfigError(
            f"--weights {net.weights} is for torchvision: and timm:; hf: reads those of its folder, and a function its own."
        )
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        model = _model(net, frame_shape)
    if isinstance(model, Network):
        if net.at:
            raise ConfigError(f"--net {net.name} gives a network that is cut already; leave --at out, or cut there.")
        return model
    if not isinstance(model, nn.Module):
        raise ConfigError(f"--net {net.name} gives a {type(model).__name__}; let it return an nn.Module.")
    network = traced_network(model, frame_shape, net.at)
    if net.at or not net.name.startswith(LIBRARIES):
        return network
    return replace(network, natural_cut=_mixing_sizes(network))


def _mixing_sizes(network: Network) -> tuple[int, ...]:
    """Layers in each stage, so that each can learn to mix channels or places.

    A layer whose parameters are all vectors, a LayerNorm say, or a token that is put in front, goes with the one before it.
    """
    sizes, mixes_already = list[int](), False
    for index in range(len(network.layers)):
        parameters = network.build(range(index, index + 1), 0, "meta").parameters()
        mixes = any(parameter.numel() > max(parameter.shape, default=1) for parameter in parameters)
        if not sizes or (mixes and mixes_already):
            sizes.append(1)
            mixes_already = mixes
        else:
            sizes[-1] += 1
            mixes_already = mixes_already or mixes
    return tuple(sizes)


def _model(net: NetOptions, frame_shape: tuple[int, ...]) -> Any:
    if net.name.startswith(TORCHVISION):
        return torchvision_model(net, frame_shape)
    if net.name.startswith(TIMM):
        return timm_model(net, frame_shape)
    if net.name.startswith(HUGGING_FACE):
        return hugging_face_model(net.name, frame_shape)
    return called(net.name, "--net", [library[:-1] for library in LIBRARIES], frame_shape)
