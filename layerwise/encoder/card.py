"""The model card of an export: README.md, written from what the run has recorded of itself."""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from layerwise.encoder.agreement import inputs_of_the_run
from layerwise.encoder.model import Encoder
from layerwise.nets.network import ranges
from layerwise.run_store import RunState, RunStore
from layerwise.training.encoder import Origin
from layerwise.units import percent, size


@dataclass(frozen=True, slots=True)
class Exported:
    """An export that was checked."""

    folder: Path
    format: str
    difference: float
    """The largest one found between its output and the encoder's own, in units of the largest feature."""
    fixed: str
    """Sizes of the input that cannot be changed; empty where all can."""


def model_card(encoder: Encoder, origin: Origin, store: RunStore, state: RunState, exported: Exported) -> str:
    """Markdown. The paths of the run's machine are not in it."""
    parts = [
        _front_matter(encoder),
        f"# {exported.folder.name}",
        _what_it_is(encoder, origin),
        "## Use",
        _use(encoder, origin, exported),
        "## Input and output",
        _input(encoder, origin, exported),
        "## Data",
        _data(origin),
        "## Training",
        _training(origin, state),
        _stages(encoder, origin, state),
        "## Results",
        *_results(store),
        "## Limits",
        _limits(origin, exported),
        "## Licence",
        "None was chosen: whoever publishes this encoder writes one here that the licence of the data allows.",
    ]
    return "\n\n".join(parts) + "\n"


def _front_matter(encoder: Encoder) -> str:
    domain = {"waveforms": "audio-feature-extraction", "pictures": "image-feature-extraction"}
    return f"---\nlibrary_name: layerwise\npipeline_tag: {domain.get(encoder.entry.takes, 'feature-extraction')}\n---"


def _what_it_is(encoder: Encoder, origin: Origin) -> str:
    net, parameters = origin.config.net, sum(parameter.numel() for parameter in encoder.parameters())
    if origin.network and ":" in net.name:
        name = f"The network `{net.name}`"
    elif origin.network:
        name = "A network of its author's own"
    elif net.name == "speech":
        recurrent = f" and a GRU of width {net.context}" if net.context else ""
        name = f"A speech network of {len(net.kernels)} convolutions of {net.width} channels{recurrent}"
    else:
        name = f"A vision network of {len(net.blocks)} modules of {', '.join(map(str, net.blocks))} residual blocks on patches"
    order = "one after another" if origin.config.training.schedule == "sequential" else "all at once"
    stages = (
        f"in {len(origin.cut)} gradient-isolated stages, {order}, as in Greedy InfoMax (Löwe, O'Connor, Veeling, "
        "NeurIPS 2019, arXiv 1905.11786)"
        if len(origin.cut) > 1
        else "end to end"
    )
    return f"{name}, {parameters:,} parameters, trained {stages}, with layerwise {origin.version}."


def _use(encoder: Encoder, origin: Origin, exported: Exported) -> str:
    shape = tuple(inputs_of_the_run(encoder, origin)[0].shape)
    takes, draw = encoder.entry.takes, "rand" if encoder.entry.takes == "pictures" else "randn"
    lines = {"safetensors": _load_safetensors, "pt2": _load_pt2, "onnx": _load_onnx}[exported.format](takes, origin)
    code = [*lines[:-1], f"{takes} = torch.{draw}{shape}  # yours", lines[-1], "print(features.shape)"]
    return "In this folder:\n\n```python\n" + "\n".join(code) + "\n```"


def _load_safetensors(takes: str, origin: Origin) -> list[str]:
    name = origin.config.net.name
    of_function = ":" in name and not name.startswith("torchvision:")
    own = f', network="{name}"' if of_function else ", network=network"
    network = own if origin.network and not name.startswith("torchvision:") else ""
    return [
        *("import torch", "import layerwise", ""),
        f'encoder = layerwise.load("."{network})',
        f"features = encoder({takes})",
    ]


def _load_pt2(takes: str, origin: Origin) -> list[str]:
    return [
        *("import torch", ""),
        'encoder = torch.export.load("encoder.pt2").module()',
        f"features = encoder({takes})",
    ]


def _load_onnx(takes: str, origin: Origin) -> list[str]:
    return [
        *("import onnxruntime", "import torch", ""),
        'encoder = onnxruntime.InferenceSession("encoder.onnx")',
        f'(features,) = encoder.run(None, {{"{takes}": {takes}.numpy()}})',
    ]


def _input(encoder: Encoder, origin: Origin, exported: Exported) -> str:
    data = origin.config.data
    if encoder.entry.takes == "waveforms":
        hop = encoder.geometry.hop
        text = (
            f"Waveforms (B, samples) of floats from -1 to 1 at {data.sample_rate} Hz, one channel, at least "
            f"{encoder.shortest} samples. They are divided by {origin.level:.4g}, the level of the recordings that it was "
            f"trained on, by the encoder itself. Features (B, frames, channels): one frame every {hop} samples "
            f"({1000 * hop / data.sample_rate:g} ms)."
        )
    elif encoder.entry.takes == "arrays":
        shape = ", ".join(map(str, inputs_of_the_run(encoder, origin)[0].shape[2 if encoder.entry.ragged else 1 :]))
        steps = "steps, " if encoder.entry.ragged else ""
        text = (
            f"Arrays of floats (B, {steps}{shape}), divided by {origin.level:.4g}, the level of the data that it was trained "
            "on, by the encoder itself. Features (B, frames, channels)."
        )
    else:
        kind = "grey" if data.gray else "colour"
        floats = ", as uint8 or as floats from 0 to 1" if exported.format == "safetensors" else " of floats from 0 to 1"
        text = (
            f"Pictures (B, {encoder.entry.frame_shape[0]}, H, W), {kind}{floats}; trained on {data.picture} x "
            f"{data.picture} pixels. The encoder normalises them and cuts them into patches of {data.patch} pixels every "
            f"{data.patch_stride}. Features (B, patches, channels): one frame per patch, row after row."
        )
    if exported.fixed:
        return f"{text} In this file the size of the input is fixed: {exported.fixed}."
    free = "Batch and length are" if encoder.entry.ragged else "Batch and size are"
    return f"{text} {'The batch is' if data.frames == 'whole' else free} free."


def _data(origin: Origin) -> str:
    return f"{origin.samples:,} samples of `{origin.config.data.source}`."


def _training(origin: Origin, state: RunState) -> str:
    training, objective = origin.config.training, origin.config.objective
    own = {"supervised": {"label"}, "ntxent": {"temperature", "projection"}}
    shown = own.get(objective.name, {"steps", "skip", "negatives", "anchors"})
    settings = ", ".join(f"{name} {value}" for name, value in objective.model_dump().items() if name in shown)
    read = (
        f" Each stage read the outputs of the one below as {origin.config.cache.dtype}."
        if len(state.stages) > 1
        else ""
    )
    budget = f"a device budget of {size(state.budget_bytes)}" if state.budget_bytes else "no device budget"
    return (
        f"Objective: {objective.name} ({settings}). Adam, learning rate {training.lr:g}, batches of {training.batch_size}, "
        f"at most {training.max_epochs} epochs a stage, {training.precision}, seed {training.seed}; {budget}, on "
        f"{state.device}.{read}"
    )


def _stages(encoder: Encoder, origin: Origin, state: RunState) -> str:
    rows = [
        "| stage | layers | parameters | epochs | held-out loss | device peak |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    layers = list(encoder.layers.values())
    # Trained all at once, the stages share one record.
    records = state.stages if len(state.stages) == len(origin.cut) else state.stages * len(origin.cut)
    for stage, (record, indices) in enumerate(zip(records, ranges(origin.cut), strict=True), start=1):
        parameters = sum(parameter.numel() for index in indices for parameter in layers[index].parameters())
        loss = "" if record.best_loss is None else f"{record.best_loss:.4f}"
        cells = (stage, len(indices), f"{parameters:,}", record.epochs, loss, size(record.peak_bytes))
        rows.append(f"| {' | '.join(map(str, cells))} |")
    return "\n".join(rows)


def _results(store: RunStore) -> Iterator[str]:
    probes = sorted(store.probes.glob("*.json"))
    if not probes:
        yield "No probe was run; `layerwise probe` measures how well each stage tells a label."
        return
    yield "Errors of probes on frozen features of test samples, beside the same network with random weights:"
    for path in probes:
        probe = json.loads(path.read_text())
        rows = [
            f"| stage | {probe['label']} error, {probe['classifier']} probe | random weights | test samples |",
            "| --- | --- | --- | --- |",
        ]
        rows += [
            f"| {s['stage']} | {percent(s['error'])} | {percent(s['untrained_error'])} | {s['test']} |"
            for s in probe["stages"]
        ]
        yield "\n".join(rows)


def _limits(origin: Origin, exported: Exported) -> str:
    what = {"waveforms": "recordings", "pictures": "pictures"}.get(origin.takes, "samples")
    return (
        f"- It has seen the {what} named above and no others; of other kinds of {what} nothing is known.\n"
        "- It gives features, not decisions, and was tested for nothing but what stands under Results.\n"
        f"- It computes in float32. The run rounded what it cached to {origin.config.cache.dtype}; its own caches, and "
        "`layerwise extract`, differ from the output of this encoder by that.\n"
        f"- The file was read back and compared with the encoder of the run: the largest difference was "
        f"{exported.difference:.1g} of the largest feature."
    )
