"""Networks for pictures from torchvision and timm, without their classifiers, with random weights or those of a file."""

from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import nn

from layerwise.config import TIMM, TORCHVISION, NetOptions
from layerwise.errors import ConfigError, did_you_mean
from layerwise.importing import import_library, import_torchvision

HEADS = ("fc", "classifier", "head", "heads", "head_dist", "aux_logits", "AuxLogits", "aux1", "aux2")
"""Parts that name the classes of ImageNet, or help to."""


def torchvision_model(net: NetOptions, frame_shape: tuple[int, ...]) -> nn.Module:
    """The model of --net torchvision:NAME. Raises ConfigError where there is none, or it does not read such frames."""
    models = import_torchvision(ConfigError).models
    wanted, known = net.name.removeprefix(TORCHVISION), models.list_models(module=models)
    if wanted not in known:
        raise ConfigError(f"--net {net.name}: torchvision has no such model.{did_you_mean(wanted, known)}")
    _check_pictures(net.name, frame_shape, colours=True)
    sized = {"image_size": frame_shape[1]} if wanted.startswith("vit_") else {}
    model: nn.Module = models.get_model(wanted, weights=None, **sized)
    _without_classifier(model)
    _load_weights(model, net.weights)
    return model


def timm_model(net: NetOptions, frame_shape: tuple[int, ...]) -> nn.Module:
    """The model of --net timm:NAME, made for pictures of this size and so many channels. Raises ConfigError as above."""
    timm = import_library("timm")
    wanted, known = net.name.removeprefix(TIMM), timm.list_models()
    if wanted.partition(".")[0] not in known:
        raise ConfigError(f"--net {net.name}: timm has no such model.{did_you_mean(wanted, known)}")
    _check_pictures(net.name, frame_shape)
    channels, *size = frame_shape
    made = {"pretrained": False, "num_classes": 0, "in_chans": channels}
    try:
        try:
            model: nn.Module = timm.create_model(wanted, img_size=tuple(size), **made)
        except TypeError:  # models that take pictures of any size have no such argument
            model = timm.create_model(wanted, **made)
    except (AssertionError, TypeError, ValueError, RuntimeError) as error:
        raise ConfigError(
            f"--net {net.name} cannot be made for pictures of {size[0]} x {size[1]} ({error}); set data.picture, or the patch, "
            "to a size that it takes."
        ) from error
    _load_weights(model, net.weights)
    return model


def _check_pictures(name: str, frame_shape: tuple[int, ...], colours: bool = False) -> None:
    if len(frame_shape) != 3 or frame_shape[1] != frame_shape[2] or (colours and frame_shape[0] != 3):
        shape = " x ".join(map(str, frame_shape))
        raise ConfigError(
            f"--net {name} reads square {'colour ' if colours else ''}pictures, and frames are of {shape}; give --data "
            f"images:DIR{' and --set data.gray=false' if colours else ''}."
        )


def _without_classifier(model: nn.Module) -> None:
    head: Any = next((name for name in ("fc", "classifier", "head", "heads") if hasattr(model, name)), None)
    linear = [
        path for path, part in model.named_modules() if isinstance(part, nn.Linear) and path.split(".")[0] == head
    ]
    if linear:
        *path, last = linear[-1].split(".")
        setattr(model.get_submodule(".".join(path)), last, nn.Identity())


def _load_weights(model: nn.Module, file: str) -> None:
    """Raises ConfigError where the file holds no weights of the model; a classifier in it is left out."""
    if not file:
        return
    path = Path(file).expanduser()
    if not path.is_file():
        raise ConfigError(f"--weights {file}: there is no such file; nothing is downloaded, so fetch it first.")
    if path.suffix != ".safetensors":
        raise ConfigError(
            f"--weights {file}: weights are read from .safetensors alone, which cannot hold code; write one with "
            f"safetensors.torch.save_file(torch.load('{file}', weights_only=True), 'weights.safetensors')."
        )
    try:
        found = model.load_state_dict(load_file(path), strict=False)
    except (OSError, RuntimeError, SafetensorError) as error:
        reason = str(error).strip().partition("\n")[0]
        raise ConfigError(f"--weights {file} is no state dict of this network: {reason}") from error
    strange = [*found.missing_keys, *(name for name in found.unexpected_keys if name.split(".")[0] not in HEADS)]
    if strange:
        raise ConfigError(f"--weights {file} is of another network: {strange[0]} is in one of the two alone.")
