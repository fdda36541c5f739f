"""Contrastive objectives whose targets and contexts are projected first, against plain autograd in float64."""

import numpy as np
import pytest
import torch
from torch import nn

from layerwise.config import ObjectiveOptions, resolve
from layerwise.data.open import open_data
from layerwise.errors import ConfigError
from layerwise.nets import build_network, shortest_sample
from layerwise.nets.network import ranges
from layerwise.objectives import Scored, build_objective
from layerwise.objectives.contrastive import Contrastive, Hinge, InfoNCE
from layerwise.training.spec import stage_specs

WIDE = 2**30
CHANNELS, CONTEXT, STEPS, NEGATIVES = 7, 6, 3, 4
LENGTHS, FRAMES = np.array([14, 9, 11]), 14


def made(kind: type[Contrastive], projection: int, shared: bool) -> tuple[Contrastive, torch.Tensor, torch.Tensor]:
    """The objective, targets and contexts; these are one tensor where they are shared."""
    torch.manual_seed(0)
    z = torch.randn(3 * FRAMES, CHANNELS, dtype=torch.double)
    c = z if shared else torch.randn(3 * FRAMES, CONTEXT, dtype=torch.double)
    sizes = {"negatives": NEGATIVES, "anchors": 9, "projection": projection, "shared": shared}
    return kind(CHANNELS, c.shape[1], STEPS, **sizes).double(), z, c


def outcome(kind: type[Contrastive], projection: int, shared: bool, passes: int, room: int) -> list[torch.Tensor]:
    """Loss and gradients of targets and contexts, where they are two, and of the objective's parameters in their order."""
    objective, z, c = made(kind, projection, shared)
    frames = [z.requires_grad_()] if shared else [z.requires_grad_(), c.requires_grad_()]
    draws = objective.draw(LENGTHS, FRAMES, 1, np.random.default_rng(0), passes)
    loss = sum(objective(*_scored(frames, draw.rows), draw, room).loss for draw in draws)
    return [loss.detach(), *torch.autograd.grad(loss, [*frames, *objective.parameters()])]


def _scored(frames: list[torch.Tensor], rows: np.ndarray) -> tuple[torch.Tensor, torch.Tensor]:
    scored = [tensor[rows] for tensor in frames]
    return scored[0], scored[-1]


def plain_outcome(kind: type[Contrastive], projection: int, shared: bool) -> list[torch.Tensor]:
    """The same by the formula, pair by pair."""
    objective, z, c = made(kind, projection, shared)
    frames = [z.requires_grad_()] if shared else [z.requires_grad_(), c.requires_grad_()]
    of_targets = objective.project.weight
    of_contexts = of_targets if shared else objective.project_contexts.weight
    (draw,) = objective.draw(LENGTHS, FRAMES, 1, np.random.default_rng(0))
    per_step = []
    for step, predictor in enumerate(objective.predictors):
        losses = []
        for target in np.flatnonzero(draw.weights[:, step]).tolist():
            context = of_contexts @ c[draw.rows[draw.contexts[target + step * draw.apart]]]
            scores = (z[draw.rows] @ of_targets.T) @ (predictor @ context)
            ahead, others = scores[draw.candidates[0, target, 0]], scores[draw.candidates[0, target, 1:]]
            if kind is Hinge:
                losses.append((1 - ahead).clamp(min=0) + (1 + others).clamp(min=0).mean())
            else:
                losses.append(torch.cat([ahead[None], others]).logsumexp(0) - ahead)
        per_step.append(torch.stack(losses).mean())
    loss = torch.stack(per_step).mean()
    return [loss.detach(), *torch.autograd.grad(loss, [*frames, *objective.parameters()])]


@pytest.mark.parametrize("kind", [InfoNCE, Hinge])
@pytest.mark.parametrize("shared", [True, False])
@pytest.mark.parametrize(("passes", "room"), [(1, WIDE), (3, WIDE), (1, 1)])
def test_loss_and_all_gradients_are_those_of_the_formula(
    kind: type[Contrastive], shared: bool, passes: int, room: int
) -> None:
    found, expected = outcome(kind, 4, shared, passes, room), plain_outcome(kind, 4, shared)
    assert len(found) == 1 + (3 if shared else 5)
    for lean, plain in zip(found, expected, strict=True):
        assert plain.any()
        torch.testing.assert_close(lean, plain, rtol=1e-6, atol=1e-9)  # weights are float32


@pytest.mark.parametrize("shared", [True, False])
@pytest.mark.parametrize("projection", [0, CHANNELS, 99])
def test_without_fewer_channels_it_is_the_form_of_the_paper_to_the_bit(shared: bool, projection: int) -> None:
    torch.manual_seed(0)
    z = torch.randn(3 * FRAMES, CHANNELS, dtype=torch.double)
    context = CHANNELS if shared else CONTEXT
    c = z if shared else torch.randn(3 * FRAMES, CONTEXT, dtype=torch.double)
    bound = context**-0.5
    predictors = torch.empty(STEPS, CHANNELS, context).uniform_(-bound, bound).double()
    objective, _, _ = made(InfoNCE, projection, shared)
    assert [name for name, _ in objective.named_parameters()] == ["predictors"]
    assert torch.equal(objective.predictors, predictors)
    (draw,) = objective.draw(LENGTHS, FRAMES, 1, np.random.default_rng(0))
    papers = InfoNCE(CHANNELS, context, STEPS, negatives=NEGATIVES, anchors=9)
    papers.predictors = nn.Parameter(predictors)
    assert torch.equal(
        objective(z[draw.rows], c[draw.rows], draw, WIDE).loss, papers(z[draw.rows], c[draw.rows], draw, WIDE).loss
    )


def test_only_what_has_more_channels_is_projected() -> None:
    objective = InfoNCE(8, 3, STEPS, projection=5)
    assert objective.predictors.shape == (STEPS, 5, 3)
    assert {name: tuple(value.shape) for name, value in objective.named_parameters() if name != "predictors"} == {
        "project.weight": (5, 8)
    }


def test_without_gradients_the_score_is_the_same() -> None:
    objective, z, c = made(InfoNCE, 4, shared=False)
    (draw,) = objective.draw(LENGTHS, FRAMES, 1, np.random.default_rng(0))
    scored = objective(z[draw.rows], c[draw.rows], draw, WIDE)
    with torch.no_grad():
        score = objective(z[draw.rows], c[draw.rows], draw, WIDE)
    assert not score.loss.requires_grad
    assert score.loss == pytest.approx(scored.loss.item(), rel=1e-12)
    assert score.accuracy == scored.accuracy


def test_a_recurrent_stage_has_a_matrix_for_its_contexts_and_others_share_one() -> None:
    config = resolve("demo", overrides={"net.width": 16, "net.context": 16, "objective.projection": 4})
    data = open_data(config.data, shortest_sample(config))
    network = build_network(config.net, data.frame_shape)
    specs = stage_specs(config, data, network, ranges([6, 1]))
    names = [dict(spec.build_objective(config, torch.device("cpu")).named_parameters()).keys() for spec in specs]
    assert names == [{"project.weight", "predictors"}, {"project.weight", "project_contexts.weight", "predictors"}]


def test_each_objective_has_a_width_of_its_own_where_none_is_given() -> None:
    scored = Scored(512, 512, 0, shared=True)
    assert build_objective(ObjectiveOptions(steps=2), scored).predictors.shape == (2, 512, 512)
    assert build_objective(ObjectiveOptions(name="ntxent"), scored).project[-1].out_features == 128
    assert build_objective(ObjectiveOptions(name="ntxent", projection=9), scored).project[-1].out_features == 9


def test_ntxent_cannot_go_without() -> None:
    with pytest.raises(ConfigError, match="projection 0: ntxent always projects"):
        resolve(overrides={"objective.name": "ntxent", "objective.projection": 0})
