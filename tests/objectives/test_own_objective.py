"""The objective of docs/objectives.md works as it is written there."""

import re
from collections.abc import Callable
from pathlib import Path

import torch

from layerwise.config import Config
from layerwise.engines.run import run
from layerwise.events import EpochDone, Event

DOCS = Path(__file__).resolve().parents[2] / "docs" / "objectives.md"


def test_the_documented_objective_trains(tiny_speech: Callable[..., Config], digits: Path) -> None:
    (code,) = re.findall(r"```python\n(.*?)```", DOCS.read_text(), re.DOTALL)
    names: dict[str, object] = {}
    exec(code, names)

    scores = torch.randn(6, 4, 3, dtype=torch.double, requires_grad=True)
    loss, gradient = names["Logistic"].of_scores(scores, torch.rand(6, 3, dtype=torch.double))
    torch.testing.assert_close(gradient, torch.autograd.grad(loss, scores)[0])

    events: list[Event] = []
    run(tiny_speech(f"fsdd:{digits}", **{"objective.name": "logistic", "training.lr": 1e-2}), notify=events.append)
    losses = [event.loss for event in events if isinstance(event, EpochDone) and event.stage == 1]
    assert losses[-1] < losses[0]
