"""The supervised objective against cross entropy on the mean over real frames."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from layerwise.config import resolve
from layerwise.errors import ConfigError
from layerwise.objectives import Scored, build_objective, check_objective, register_objective
from layerwise.objectives.pooled import Supervised

LENGTHS = np.array([7, 4, 6])
FRAMES = 7


def representations() -> torch.Tensor:
    torch.manual_seed(1)
    return torch.randn(len(LENGTHS) * FRAMES, 5, dtype=torch.double, requires_grad=True)


def outcome(objective: Supervised, classes: np.ndarray, parts: int) -> tuple[float, float, torch.Tensor]:
    x = representations()
    draws = objective.draw(LENGTHS, FRAMES, 1, np.random.default_rng(0), parts, classes)
    scores = [objective(x[draw.rows], x[draw.rows], draw, 0) for draw in draws]
    loss = sum(score.loss for score in scores)
    loss.backward()
    return loss.item(), sum(score.accuracy.item() for score in scores), x.grad


@pytest.mark.parametrize("parts", [1, 2, 3])
def test_it_is_the_cross_entropy_of_the_means_of_real_frames(parts: int) -> None:
    objective = Supervised(5, 4).double()
    classes = np.array([3, 0, 1])
    x = representations()
    means = torch.stack([x[b * FRAMES : b * FRAMES + length].mean(0) for b, length in enumerate(LENGTHS.tolist())])
    logits = objective.classifier(means)
    loss = F.cross_entropy(logits, torch.from_numpy(classes))
    loss.backward()

    found, accuracy, gradient = outcome(objective, classes, parts)

    assert found == pytest.approx(loss.item(), rel=1e-6)
    assert accuracy == pytest.approx((logits.argmax(1).numpy() == classes).mean())
    torch.testing.assert_close(gradient, x.grad, rtol=1e-6, atol=1e-9)


def test_samples_without_a_label_are_passed_over() -> None:
    _, _, gradient = outcome(Supervised(5, 4).double(), np.array([2, -1, 1]), 1)
    assert not gradient[FRAMES : 2 * FRAMES].any()
    assert gradient[: LENGTHS[0]].all()


def test_a_batch_without_any_label_has_no_loss() -> None:
    loss, _, gradient = outcome(Supervised(5, 4).double(), np.array([-1, -1, -1]), 2)
    assert loss == 0
    assert not gradient.any()


def test_ones_own_objective_is_registered_and_built_by_its_name() -> None:
    register_objective("test-own", lambda options, scored: Supervised(scored.context_channels, options.steps))
    options = resolve(overrides={"objective.name": "test-own", "objective.steps": 9}).objective
    assert build_objective(options, Scored(3, 4, 0, shared=False)).classifier.weight.shape == (9, 4)
    with pytest.raises(ConfigError, match="already"):
        register_objective("infonce", lambda options, scored: Supervised(1, 1))


def test_an_unknown_objective_is_refused_with_those_that_there_are() -> None:
    with pytest.raises(ConfigError, match=r"infonec: .*infonce, hinge, ntxent, infonce\+ntxent, supervised"):
        check_objective("infonec")
