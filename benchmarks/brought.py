"""Networks that people bring: those of tests/bring from the cut to the features, and many more that are only cut.

python benchmarks/brought.py [--only WORD] [--cut-only]      prints the tables of docs/own-network.md
"""

import argparse
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

import layerwise
from layerwise.config import NetOptions
from layerwise.errors import LayerwiseError
from layerwise.nets.pictures import timm_model

sys.path.append(str(Path(__file__).resolve().parents[1] / "tests" / "bring"))

TIMM = (
    *(
        "beit_base_patch16_224",
        "cait_xxs24_224",
        "coat_tiny",
        "coatnet_nano_rw_224",
        "convmixer_768_32",
        "convnextv2_atto",
    ),
    *("crossvit_9_240", "davit_tiny", "deit3_small_patch16_224", "densenet121", "dla34", "edgenext_xx_small"),
    *(
        "efficientformer_l1",
        "efficientvit_b0",
        "eva02_tiny_patch14_224",
        "fastvit_t8",
        "focalnet_tiny_srf",
        "gcvit_xxtiny",
    ),
    *(
        "ghostnet_050",
        "hgnetv2_b0",
        "hrnet_w18_small",
        "inception_v4",
        "levit_128s",
        "mambaout_femto",
        "maxvit_nano_rw_256",
    ),
    *("mixer_s16_224", "mixnet_s", "mobilenetv3_small_050", "mobilenetv4_conv_small", "mobileone_s0", "mobilevit_xxs"),
    *(
        "mvitv2_tiny",
        "nest_tiny",
        "nfnet_l0",
        "nf_resnet26",
        "pit_ti_224",
        "poolformer_s12",
        "pvt_v2_b0",
        "regnetx_002",
    ),
    *("repghostnet_050", "repvit_m0_9", "resmlp_12_224", "resnest14d", "rexnet_100", "seresnet18", "sequencer2d_s"),
    *("swinv2_tiny_window8_256", "tf_efficientnet_b0", "tiny_vit_5m_224", "tresnet_m", "twins_svt_small", "vgg11"),
    *("visformer_tiny", "vit_base_patch32_clip_224", "vit_relpos_small_patch16_224", "vit_srelpos_small_patch16_224"),
    *("volo_d1_224", "xception41", "xcit_nano_12_p16_224"),
)
"""One of each family."""

SIDES = {"crossvit_9_240": 240, "efficientformer_l1": 224, "inception_v4": 299}
"""Of pictures, where they cannot be of 64 pixels."""

WIDTH = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 48}
WORDS = WIDTH | {"vocab_size": 50, "max_position_embeddings": 32}
SMALL_PICTURE = {"image_size": 32, "patch_size": 8}
CONVOLUTIONS = {"conv_dim": (16, 16), "conv_kernel": (10, 4), "conv_stride": (5, 4), "num_feat_extract_layers": 2}
SOUND = WIDTH | CONVOLUTIONS | {"num_conv_pos_embeddings": 8, "num_conv_pos_embedding_groups": 2, "layerdrop": 0.0}
SOUND |= {"apply_spec_augment": False}
T5 = {"d_model": 32, "d_kv": 16, "d_ff": 48, "num_layers": 2, "num_heads": 2, "vocab_size": 50}
WHISPER = {"d_model": 32, "encoder_layers": 2, "encoder_attention_heads": 2, "encoder_ffn_dim": 48, "num_mel_bins": 16}
WHISPER |= {
    "decoder_layers": 1,
    "decoder_attention_heads": 2,
    "decoder_ffn_dim": 48,
    "vocab_size": 50,
    "pad_token_id": 0,
}

TRANSFORMERS: dict[str, tuple[dict[str, Any], tuple[int, ...]]] = {
    "Albert": (WORDS | {"embedding_size": 16}, (12,)),
    "ModernBert": (WORDS | {"pad_token_id": 0, "global_attn_every_n_layers": 1}, (12,)),
    "Roberta": (WORDS | {"pad_token_id": 1}, (12,)),
    "DistilBert": ({"dim": 32, "n_layers": 2, "n_heads": 2, "hidden_dim": 48, "vocab_size": 50}, (12,)),
    "Electra": (WORDS | {"embedding_size": 16}, (12,)),
    "DebertaV2": (WORDS, (12,)),
    "MPNet": (WORDS, (12,)),
    "Llama": (WORDS, (12,)),
    "Qwen2": (WORDS | {"num_key_value_heads": 2}, (12,)),
    "Mistral": (WORDS | {"num_key_value_heads": 2}, (12,)),
    "GPTNeoX": (WORDS, (12,)),
    "OPT": (WORDS | {"ffn_dim": 48, "word_embed_proj_dim": 32}, (12,)),
    "T5": (T5, (12,)),
    "Mamba": (WORDS | {"state_size": 4, "use_cache": False}, (12,)),
    "Dinov2": (WIDTH | SMALL_PICTURE, (3, 32, 32)),
    "Beit": (WIDTH | SMALL_PICTURE, (3, 32, 32)),
    "DeiT": (WIDTH | SMALL_PICTURE, (3, 32, 32)),
    "ViTMAE": (WIDTH | SMALL_PICTURE | {"mask_ratio": 0.0}, (3, 32, 32)),
    "Swin": (
        {"image_size": 32, "patch_size": 2, "embed_dim": 16, "depths": [2, 1], "num_heads": [1, 2], "window_size": 4},
        (3, 32, 32),
    ),
    "ConvNext": ({"hidden_sizes": [8, 8, 16, 16], "depths": [1, 1, 1, 1]}, (3, 32, 32)),
    "ResNet": ({"embedding_size": 8, "hidden_sizes": [16, 16, 32, 32], "depths": [1, 1, 1, 1]}, (3, 32, 32)),
    "Segformer": ({"hidden_sizes": [8, 16, 16, 32], "depths": [1, 1, 1, 1]}, (3, 64, 64)),
    "CLIPVision": (WIDTH | SMALL_PICTURE, (3, 32, 32)),
    "VideoMAE": (WIDTH | SMALL_PICTURE | {"num_frames": 4}, (4, 3, 32, 32)),
    "WavLM": (SOUND, (400,)),
    "Data2VecAudio": (SOUND | {"conv_pos_kernel_size": 3}, (400,)),
    "UniSpeech": (SOUND, (400,)),
    "ASTModel": (
        WIDTH | {"max_length": 64, "num_mel_bins": 16, "frequency_stride": 8, "time_stride": 8, "patch_size": 8},
        (64, 16),
    ),
    "Whisper": (WHISPER | {"max_source_positions": 20}, (16, 40)),
}


def of_timm(name: str, side: int) -> nn.Module:
    """As --net timm:NAME makes it for pictures of this size."""
    return timm_model(NetOptions(name=f"timm:{name}"), (3, side, side))


def of_transformers(name: str, settings: dict[str, Any]) -> Callable[[], nn.Module]:
    def build() -> nn.Module:
        import transformers

        kind = name.removesuffix("Model")
        model = getattr(transformers, f"{kind}Model")(getattr(transformers, f"{kind}Config")(**settings))
        return model.get_encoder() if model.config.is_encoder_decoder else model

    return build


def cut(build: Callable[[], nn.Module], shape: tuple[int, ...]) -> str:
    """How many units there are and the seconds to find them, or the sentence with which the network is refused."""
    torch.manual_seed(0)
    begun = time.perf_counter()
    try:
        model = build()
        units = len(layerwise.cut(model, torch.zeros(1, *shape)).layers)
    except LayerwiseError as error:
        return f"refused: {error}"
    return f"{units} units, {time.perf_counter() - begun:.1f} s"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", help="networks with this word in their name")
    parser.add_argument("--cut-only", action="store_true", help="leave out those that are trained")
    given = parser.parse_args()
    from networks import NETWORKS
    from rows import planned, trained

    for name in NETWORKS if not given.cut_only else ():
        if given.only in name:
            begun = time.perf_counter()
            with tempfile.TemporaryDirectory() as folder:
                planned(name, Path(folder))
                units = trained(name, Path(folder))
            print(
                f"| {name} | {sum(units)} | {' + '.join(map(str, units))} | {time.perf_counter() - begun:.0f} |",
                flush=True,
            )
    for name in TIMM:
        if given.only in f"timm {name}":
            side = SIDES.get(name, 64)
            print(f"| timm {name} | {cut(partial(of_timm, name, side), (3, side, side))} |", flush=True)
    for name, (settings, shape) in TRANSFORMERS.items():
        if given.only in f"transformers {name}":
            print(f"| transformers {name} | {cut(of_transformers(name, settings), shape)} |", flush=True)


if __name__ == "__main__":
    main()
