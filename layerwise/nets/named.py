"""Networks that are no options of ours but a name: torchvision's, and what a function of the user's makes."""

from typing import Any

import torch
from torch import nn

from layerwise.config import TORCHVISION
from layerwise.errors import ConfigError, did_you_mean
from layerwise.importing import called, import_torchvision
from layerwise.nets.network import Network
from layerwise.nets.traced import traced_network


def named_network(name: str, frame_shape: tuple[int, ...], seed: int) -> Network:
    """The network of --net torchvision:NAME or package.module:function, with one stage per unit that it can be cut into.

    Its first weights are those that it is made with after this seed. A function may take the frame shape, channels first, and
    gives an nn.Module, or the Network that `layerwise.cut` makes of one. Raises ConfigError.
    """
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        model = (
            _torchvision_model(name, frame_shape)
            if name.startswith(TORCHVISION)
            else called(name, "--net", [TORCHVISION[:-1]], frame_shape)
        )
    if isinstance(model, Network):
        return model
    if not isinstance(model, nn.Module):
        raise ConfigError(f"--net {name} gives a {type(model).__name__}; let it return an nn.Module.")
    return traced_network(model, frame_shape)


def _torchvision_model(name: str, frame_shape: tuple[int, ...]) -> nn.Module:
    """With random weights, and without the linear layer that would name the classes of ImageNet."""
    models = import_torchvision(ConfigError).models
    wanted, known = name.removeprefix(TORCHVISION), models.list_models(module=models)
    if wanted not in known:
        raise ConfigError(f"--net {name}: torchvision has no such model.{did_you_mean(wanted, known)}")
    if len(frame_shape) != 3 or frame_shape[0] != 3 or frame_shape[1] != frame_shape[2]:
        shape = " x ".join(map(str, frame_shape))
        raise ConfigError(
            f"--net {name} reads square colour pictures, and frames are of {shape}; give --data images:DIR and "
            "--set data.gray=false."
        )
    sized = {"image_size": frame_shape[1]} if wanted.startswith("vit_") else {}
    model = models.get_model(wanted, weights=None, **sized)
    _without_classifier(model)
    return model


def _without_classifier(model: nn.Module) -> None:
    head: Any = next((name for name in ("fc", "classifier", "head", "heads") if hasattr(model, name)), None)
    linear = [
        path for path, part in model.named_modules() if isinstance(part, nn.Linear) and path.split(".")[0] == head
    ]
    if linear:
        *path, last = linear[-1].split(".")
        setattr(model.get_submodule(".".join(path)), last, nn.Identity())
