"""--net timm:NAME and hf:PATH, weights from files, and --at: the names of the modules that begin a stage."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

import layerwise
from layerwise.config import NetOptions, resolve
from layerwise.errors import ConfigError
from layerwise.events import silent
from layerwise.nets.hugging_face import _without_foreign_code
from layerwise.nets.named import named_network
from layerwise.nets.network import Network

NEEDS = "needs pip install -c constraints.txt 'layerwise[dev]'"
PICTURE = (3, 32, 32)


def weights_of(network: Network) -> dict[str, torch.Tensor]:
    module = network.build(range(len(network.layers)), 0, "cpu")
    return {key.split(".unit.")[1]: value for key, value in module.state_dict().items()}


def test_timm_and_torchvision_start_from_the_weights_of_a_file(tmp_path: Path) -> None:
    timm = pytest.importorskip("timm", reason=NEEDS)
    model = timm.create_model("test_resnet", num_classes=5)  # with a classifier, as files that are shared have
    path, pickled = tmp_path / "weights.safetensors", tmp_path / "weights.pth"
    torch.save(model.state_dict(), pickled)
    with pytest.raises(ConfigError, match=r"save_file\(torch\.load\('.*weights\.pth', weights_only=True\)"):
        named_network(NetOptions(name="timm:test_resnet", weights=str(pickled)), PICTURE, seed=0)
    save_file(torch.load(pickled, weights_only=True), path)
    network = named_network(NetOptions(name="timm:test_resnet", weights=str(path)), PICTURE, seed=0)
    assert torch.equal(weights_of(network)["conv1.0.weight"], model.conv1[0].weight)
    drawn = named_network(NetOptions(name="timm:test_resnet"), PICTURE, seed=0)
    assert not torch.equal(weights_of(drawn)["conv1.0.weight"], model.conv1[0].weight)
    with pytest.raises(ConfigError, match="is of another network"):
        named_network(NetOptions(name="timm:test_vit", weights=str(path)), PICTURE, seed=0)


def test_the_encoder_does_not_say_where_first_weights_lay_and_the_run_goes_on_without_their_file(
    tmp_path: Path,
) -> None:
    timm = pytest.importorskip("timm", reason=NEEDS)
    path = tmp_path / "secret" / "weights.safetensors"
    path.parent.mkdir()
    save_file(timm.create_model("test_resnet", num_classes=0).state_dict(), path)
    np.save(tmp_path / "pictures.npy", np.random.default_rng(0).standard_normal((12, *PICTURE)).astype(np.float32))
    places = {
        "out": str(tmp_path / "run"),
        "cache_dir": str(tmp_path / "cache"),
        "data": f"npy:{tmp_path}/pictures.npy",
    }
    asked = {"frames": "whole", "batch_size": 4, "stages": 2, "weights": str(path), "notify": silent, **places}
    begun = layerwise.run("timm:test_resnet", **asked, max_epochs=1).state
    assert b"secret" not in (tmp_path / "run" / "encoder.safetensors").read_bytes()
    path.unlink()
    further = layerwise.run("timm:test_resnet", **asked, max_epochs=2).state
    assert further.first_weights == begun.first_weights is not None
    with pytest.raises(ConfigError, match="there is no such file; nothing is downloaded"):
        layerwise.run("timm:test_resnet", **asked, max_epochs=2, overwrite=True)


def test_timm_makes_a_network_for_the_frames_that_there_are() -> None:
    pytest.importorskip("timm", reason=NEEDS)
    grey = named_network(NetOptions(name="timm:test_vit", at=("blocks.2",)), (1, 48, 48), seed=0)
    weights = weights_of(grey)
    assert weights["patch_embed.proj.weight"].shape[1] == 1
    assert weights["pos_embed"].shape[1] == 10
    assert len(grey.natural_cut) == 2


def test_a_model_of_timm_that_cannot_be_made_without_a_size_either_is_refused_in_one_sentence(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    timm = pytest.importorskip("timm", reason=NEEDS)

    def create_model(name: str, **made: Any) -> nn.Module:
        raise TypeError("img_size") if "img_size" in made else RuntimeError("no such tag")

    monkeypatch.setattr(timm, "create_model", create_model)
    with pytest.raises(ConfigError, match=r"--net timm:test_resnet cannot be made .*\(no such tag\); set"):
        named_network(NetOptions(name="timm:test_resnet"), PICTURE, seed=0)


SMALL = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24}


@pytest.fixture
def bert(tmp_path: Path) -> Any:
    """A small BERT, saved with its weights in bert/, and as a configuration alone."""
    transformers = pytest.importorskip("transformers", reason=NEEDS)
    model = transformers.BertModel(transformers.BertConfig(**SMALL, vocab_size=40, hidden_dropout_prob=0.0))
    model.save_pretrained(tmp_path / "bert")
    return model


def test_a_folder_of_hugging_face_gives_its_weights_and_its_configuration_random_ones(
    bert: Any, tmp_path: Path
) -> None:
    ids = torch.randint(40, (3, 1, 8))
    network = named_network(NetOptions(name=f"hf:{tmp_path}/bert"), (1, 8), seed=0)
    assert network.reads_ids
    module = network.build(range(len(network.layers)), 0, "cpu").eval()
    with torch.no_grad():
        found = module(ids[:, None].float(), np.ones(3, dtype=np.int64))[1][:, 0]
        assert torch.allclose(found, bert.eval()(ids[:, 0]).last_hidden_state.transpose(1, 2), atol=1e-5)
    one, same, other = (
        named_network(NetOptions(name=f"hf:{tmp_path}/bert/config.json"), (1, 8), seed).identity for seed in (1, 1, 2)
    )
    assert one == same != other


def test_weights_of_hugging_face_s_networks_go_home(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers", reason=NEEDS)
    settings = transformers.ViTConfig(**SMALL, image_size=16, patch_size=8)
    settings.save_pretrained(tmp_path / "vit")
    pictures, options = torch.randn(12, 3, 16, 16), {"training.batch_size": 4}
    out = tmp_path / "run"
    layerwise.run(
        f"hf:{tmp_path}/vit",
        pictures,
        frames="whole",
        stages=2,
        max_epochs=1,
        out=str(out),
        cache_dir=str(tmp_path / "cache"),
        notify=silent,
        options=options,
    )
    exported = layerwise.export(out, tmp_path / "weights", "state-dict", network=f"hf:{tmp_path}/vit")
    assert exported.difference < 1e-4
    fresh = transformers.ViTModel(settings)
    loaded = fresh.load_state_dict(load_file(tmp_path / "weights" / "model.safetensors"), strict=False)
    assert not loaded.unexpected_keys
    assert all("pooler" in name for name in loaded.missing_keys)
    assert "patches" not in (tmp_path / "weights" / "README.md").read_text()


def test_what_is_no_network_of_a_library_is_refused_with_a_way_out(bert: Any, tmp_path: Path) -> None:
    pytest.importorskip("timm", reason=NEEDS)
    (tmp_path / "pickled").mkdir()
    (tmp_path / "pickled" / "config.json").write_bytes((tmp_path / "bert" / "config.json").read_bytes())
    (tmp_path / "pickled" / "pytorch_model.bin").write_bytes(b"")
    (tmp_path / "broken.json").write_text("{}")
    described = json.loads((tmp_path / "bert" / "config.json").read_text())
    (tmp_path / "foreign.json").write_text(json.dumps(described | {"attn_implementation": "somebody/kernels"}))
    refused = {
        "timm:resnet5": "no such model. Did you mean",
        "timm:xcit_nano_12_p16_224": "cannot be made for pictures of 33 x 33",
        f"hf:{tmp_path}/nowhere": "there is no .*nowhere; name a folder that holds config.json.*save_pretrained",
        f"hf:{tmp_path}/pickled": "pickled, which may run code.*safetensors",
        f"hf:{tmp_path}/foreign.json": "the attention of somebody/kernels, which is code from elsewhere",
        f"hf:{tmp_path}/broken.json": "cannot be made .*mend",
    }
    for name, sentence in refused.items():
        with pytest.raises(ConfigError, match=sentence):
            named_network(NetOptions(name=name), (3, 33, 33), seed=0)
    with pytest.raises(ConfigError, match=r"--weights gone\.pth: there is no such file; nothing is downloaded"):
        named_network(NetOptions(name="torchvision:resnet18", weights="gone.pth"), PICTURE, seed=0)
    with pytest.raises(ConfigError, match=r"--weights x\.pth is for torchvision: and timm:"):
        named_network(NetOptions(name=f"hf:{tmp_path}/bert", weights="x.pth"), (1, 8), seed=0)


@pytest.mark.parametrize("weights", ["config.json", "model.safetensors"])
def test_code_that_lies_in_a_folder_of_hugging_face_is_not_run_and_nobody_is_asked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, weights: str
) -> None:
    pytest.importorskip("transformers", reason=NEEDS)
    described = {"model_type": "chinese_clip_text_model", "auto_map": {"AutoModel": "evil.Evil"}}  # no AutoModel has it
    (tmp_path / "evil.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w').close()\nclass Evil: pass\n")
    if weights == "model.safetensors":
        save_file({"x": torch.zeros(1)}, tmp_path / weights, {"format": "pt"})
    (tmp_path / "config.json").write_text(json.dumps(described))
    asked: list[object] = []
    monkeypatch.setattr("builtins.input", lambda *question: asked.append(question) or "y")
    with pytest.raises(ConfigError, match="cannot be made") as refused:
        named_network(NetOptions(name=f"hf:{tmp_path}"), (1, 8), seed=0)
    assert "\n" not in str(refused.value)
    assert not asked
    assert not (tmp_path / "ran").exists()


def test_parts_of_a_configuration_name_no_code_and_nothing_is_downloaded_while_they_are_made(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    transformers = pytest.importorskip("transformers", reason=NEEDS)
    from huggingface_hub import constants

    part = {"model_type": "bert", "auto_map": {"AutoModel": "evil.Evil"}}
    inner = {"model_type": "llava", "text_config": part, "vision_config": {"model_type": "clip_vision_model"}}
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llava", "text_config": inner}))
    made: list[Any] = []

    def taken(config: Any, trust_remote_code: bool | None = None) -> nn.Module:
        made.append((config.text_config.text_config, constants.is_offline_mode(), trust_remote_code))
        raise ValueError("seen")

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(transformers.AutoModel, "from_config", taken)
    with pytest.raises(ConfigError, match="seen"):
        named_network(NetOptions(name=f"hf:{tmp_path}"), (1, 8), seed=0)
    config, offline, trusted = made[0]
    assert config.model_type == "bert"
    assert not hasattr(config, "auto_map")
    assert offline
    assert trusted is False
    assert not constants.is_offline_mode()
    nested = transformers.LlavaConfig(text_config=transformers.LlavaConfig(text_config=config))
    nested.text_config.text_config._attn_implementation = "somebody/kernels"
    with pytest.raises(ConfigError, match="the attention of somebody/kernels"):
        _without_foreign_code(nested)


def test_ids_reach_the_network_as_they_are_and_the_encoder_loads_where_its_folder_is_named_again(
    bert: Any, tmp_path: Path
) -> None:
    np.save(tmp_path / "ids.npy", np.random.default_rng(0).integers(0, 40, (12, 96)))
    framing = {"data.frame_length": 8, "data.window": 6, "objective.steps": 2, "objective.negatives": 4}
    places = {"out": str(tmp_path / "run"), "cache_dir": str(tmp_path / "cache"), "data": f"npy:{tmp_path}/ids.npy"}
    asked = {"frames": "steps", "batch_size": 4, "max_epochs": 1, "at": "encoder.layer.1", "options": framing}
    result = layerwise.run(f"hf:{tmp_path}/bert", **asked, **places, notify=silent)
    assert len(result.state.stages) == 2
    with pytest.raises(ConfigError, match=r"names a network that would be read, hf:.*; if you trust .* --net hf:"):
        layerwise.load(tmp_path / "run")
    encoder = layerwise.load(tmp_path / "run", network=f"hf:{tmp_path}/bert")
    assert encoder.entry.level == 1
    assert encoder(torch.randint(40, (2, 96, 1)).float()).shape == (2, 12, 16)
    with pytest.raises(ConfigError, match="cannot be rendered in several views"):
        layerwise.plan(f"hf:{tmp_path}/bert", data=places["data"], frames="whole", views=4, batch_size=4)


def test_no_stage_is_a_lone_normalisation(bert: Any, tmp_path: Path) -> None:
    pytest.importorskip("timm", reason=NEEDS)
    for name, shape in (
        ("timm:test_vit", PICTURE),
        ("timm:test_efficientnet", PICTURE),
        (f"hf:{tmp_path}/bert", (1, 8)),
    ):
        network = named_network(NetOptions(name=name), shape, seed=0)
        stages = [network.build(stage, 0, "meta") for stage in network.natural_ranges]
        assert 1 < len(stages) < len(network.layers)
        assert all(any(parameter.numel() > max(parameter.shape) for parameter in each.parameters()) for each in stages)
        finest = named_network(NetOptions(name=name, at=("blocks.1",)), shape, seed=0) if "vit" in name else None
        assert finest is None or len(finest.natural_cut) == 2


BLOCKS = nn.Sequential(*[nn.Sequential(nn.Linear(6, 6), nn.ReLU(), nn.Linear(6, 6)) for _ in range(3)])


def test_stages_begin_with_the_modules_that_are_named() -> None:
    assert layerwise.cut(BLOCKS, torch.zeros(4, 6), at=["1", "2.2"]).natural_cut == (2, 3, 1)
    assert layerwise.cut(BLOCKS, torch.zeros(4, 6), at=["0", "2"]).natural_cut == (4, 2)
    assert resolve(overrides={"net.at": "1, 2.2"}).net.at == ("1", "2.2")


@pytest.mark.parametrize(
    ("given", "sentence"),
    [
        ({"at": ["3"]}, "has no module '3' to begin a stage with"),
        ({"at": ["1.1"]}, r"cannot be cut before '1.1'.*stages can begin with 0, 0.0, 0.2, 1, 1.0"),
        ({"at": ["1"], "stages": 2}, "leave stages=2 out"),
    ],
)
def test_a_module_that_cannot_begin_a_stage_is_refused(given: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ConfigError, match=sentence):
        layerwise.cut(BLOCKS, torch.zeros(4, 6), **given)


def test_named_modules_and_a_number_of_stages_exclude_each_other(tmp_path: Path) -> None:
    values = np.random.default_rng(0).standard_normal((8, 6)).astype(np.float32)
    asked = {"frames": "whole", "views": 4, "batch_size": 4}
    with pytest.raises(ConfigError, match="--at 1 says where the stages begin, so leave --stages 2 out"):
        layerwise.plan(BLOCKS, values, **asked, at="1", stages=2)
    assert len(layerwise.plan(BLOCKS, values, **asked, at="1").stages) == 2
