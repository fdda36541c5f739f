"""Networks of Hugging Face's transformers, from a folder or a configuration on this machine; nothing is downloaded.

Only classes of the library are made: code that a folder brings along is not run, and weights are read from safetensors alone.
"""

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn

from layerwise.config import HUGGING_FACE
from layerwise.errors import ConfigError
from layerwise.importing import import_library

PLAIN_FORWARD = {"use_cache": False, "layerdrop": 0.0, "apply_spec_augment": False, "output_attentions": False}
"""Settings under which a layer is never skipped and an input never masked at random, and nothing is kept for generation."""


def hugging_face_model(name: str, frame_shape: tuple[int, ...]) -> nn.Module:
    """The base model, without a head, of --net hf:PATH: a folder with config.json, or such a file.

    With the weights of the folder where it holds model.safetensors, otherwise random ones; of an encoder and a decoder, the
    encoder. It gives the last hidden states (N, tokens, width). Frames (1, n) are read as (N, n) by models of sound and of
    words. Raises ConfigError.
    """
    transformers = import_library("transformers")
    transformers.logging.set_verbosity_error()  # what matters is said in sentences of ours
    transformers.logging.disable_progress_bar()
    path = Path(name.removeprefix(HUGGING_FACE)).expanduser()
    if not path.exists():
        raise ConfigError(
            f"--net {name}: there is no {path}; name a folder that holds config.json, or such a file. Nothing is downloaded: "
            "save_pretrained writes one."
        )
    has_weights = path.is_dir() and any(path.glob("model*.safetensors"))
    if path.is_dir() and not has_weights and any(path.glob("*.bin")):
        raise ConfigError(
            f"--net {name}: the weights there are pickled, which may run code; load them where you trust them, and write "
            "them as safetensors with save_pretrained, or name config.json alone for random ones."
        )
    try:
        with _offline_and_unasked():
            config = transformers.AutoConfig.from_pretrained(path, local_files_only=True, trust_remote_code=False)
            _without_foreign_code(config)
            for setting, value in PLAIN_FORWARD.items():
                if hasattr(config, setting):
                    setattr(config, setting, value)
            model: Any = (
                transformers.AutoModel.from_pretrained(
                    path, config=config, local_files_only=True, trust_remote_code=False, use_safetensors=True
                )
                if has_weights
                else transformers.AutoModel.from_config(config, trust_remote_code=False)
            )
    except ConfigError as error:
        raise ConfigError(f"--net {name}: {error}") from None
    except Exception as error:  # a configuration can be wrong in nearly any way
        reason = str(error).strip().partition("\n")[0].rstrip(".")
        raise ConfigError(f"--net {name} cannot be made ({type(error).__name__}: {reason}); mend {path}.") from error
    if getattr(config, "is_encoder_decoder", False):
        model = model.get_encoder()
    if model.main_input_name in ("input_values", "input_ids") and len(frame_shape) == 2 and frame_shape[0] == 1:
        model.register_forward_pre_hook(_without_channel)
    return model.to(torch.float32)


@contextlib.contextmanager
def _offline_and_unasked() -> Iterator[None]:
    """Inside, nothing is downloaded, and nobody is asked whether code of the folder may run, for the answer is no.

    The libraries read their environment once, when they are imported, and the user may have done that before.
    """
    hub: Any = import_library("huggingface_hub.constants")
    remote: Any = import_library("transformers.dynamic_module_utils")
    before = hub.HF_HUB_OFFLINE, remote.TIME_OUT_REMOTE_CODE
    hub.HF_HUB_OFFLINE, remote.TIME_OUT_REMOTE_CODE = True, 0  # no time to answer: the question becomes an error
    try:
        yield
    finally:
        hub.HF_HUB_OFFLINE, remote.TIME_OUT_REMOTE_CODE = before


def _without_foreign_code(config: Any) -> None:
    """Takes out of a configuration, at any depth, where code of the folder's own lies: parts are made by their own settings.

    Raises ConfigError where one asks for attention that is not the library's: it may be code from elsewhere.
    """
    for settings in _all_settings(config):
        settings.pop("auto_map", None)
        for name, wanted in settings.items():
            if (
                "attn_implementation" in str(name)
                and isinstance(wanted, str | dict)
                and wanted not in ("eager", "sdpa")
            ):
                raise ConfigError(
                    f"the configuration asks for the attention of {wanted}, which is code from elsewhere; take "
                    "attn_implementation out of it."
                )


def _all_settings(value: Any) -> Iterator[dict[str, Any]]:
    """Those of a configuration, and of all configurations in it."""
    if isinstance(value, list | tuple):
        for each in value:
            yield from _all_settings(each)
    elif isinstance(value, dict) or hasattr(value, "to_dict"):
        settings: dict[str, Any] = value if isinstance(value, dict) else vars(value)
        yield settings
        for each in list(settings.values()):
            yield from _all_settings(each)


def _without_channel(model: nn.Module, arguments: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
    return arguments[0].squeeze(1), *arguments[1:]
