"""The model card of an export: README.md, written from what the run has recorded of itself."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined

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
    """The text of card.md.jinja, filled in: Markdown."""
    environment = Environment(
        loader=PackageLoader("layerwise.encoder", "."),
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
        undefined=StrictUndefined,
    )
    environment.filters |= {"size": size, "percent": percent}
    return environment.get_template("card.md.jinja").render(
        encoder=encoder,
        origin=origin,
        config=origin.config,
        state=state,
        exported=exported,
        example=encoder.entry.sizes(encoder.shortest, encoder.geometry.hop)[0],
        parameters=sum(parameter.numel() for parameter in encoder.parameters()),
        stages=_stages(encoder, origin, state),
        probes=[json.loads(path.read_text(encoding="utf-8")) for path in sorted(store.probes.glob("*.json"))],
    )


def _stages(encoder: Encoder, origin: Origin, state: RunState) -> list[dict[str, Any]]:
    """Rows of the table of stages."""
    layers = list(encoder.layers.values())
    # Trained all at once, the stages share one record.
    records = state.stages if len(state.stages) == len(origin.cut) else state.stages * len(origin.cut)
    return [
        {
            "layers": len(cut),
            "parameters": sum(weight.numel() for index in cut for weight in layers[index].parameters()),
            "record": record,
        }
        for cut, record in zip(ranges(origin.cut), records, strict=True)
    ]
