"""Layers that compute the same from weights of the same shapes are alike, and no others."""

from collections.abc import Callable
from functools import partial

import pytest
import torch
from torch import nn

from layerwise.config import Config, with_options
from layerwise.memory.plan import MemoryPlan
from layerwise.nets.alike import layer_traits
from layerwise.nets.layer import Layer
from layerwise.nets.network import Network
from layerwise.nets.traced import traced_network
from layerwise.training.budget import allowed_plans
from layerwise.training.spec import StageSpec
from layerwise.training.training_peak import training_peak
from layerwise.training.work import step_moved

Planned = Callable[..., tuple[Config, list[StageSpec]]]


class Block(nn.Module):
    """A residual block whose repr hides how it scales."""

    def __init__(self, scale: float = 1.0, **options: object) -> None:
        super().__init__()
        self.inside = nn.Sequential(nn.Conv2d(4, 4, 3, padding="same", **options), nn.ReLU(), nn.Dropout(0.1))
        self.scale = scale

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.scale * self.inside(x)


def hooked() -> nn.Module:
    block = Block()
    block.inside[0].register_forward_hook(lambda _, __, outputs: outputs * 2)
    return block


def frozen() -> nn.Module:
    block = Block()
    block.inside[0].bias.requires_grad_(False)
    return block


def dropping(rate: float) -> nn.Module:
    block = Block()
    block.inside[2].p = rate
    return block


def tied(convolutions: int) -> nn.Module:
    """Two convolutions of one weight, or of two."""
    block = nn.Sequential(nn.Conv2d(4, 4, 1), nn.Conv2d(4, 4, 1))
    if convolutions == 1:
        block[1].weight = block[0].weight
    return block


UNLIKE: dict[str, tuple[Callable[[], nn.Module], Callable[[], nn.Module]]] = {
    "an attribute of its own": (Block, partial(Block, scale=0.5)),
    "dilation": (Block, partial(Block, dilation=2)),
    "groups": (Block, partial(Block, groups=2)),
    "dropout rate": (Block, partial(dropping, 0.2)),
    "a hook": (Block, hooked),
    "two hooks": (hooked, hooked),
    "what is trained": (Block, frozen),
    "a shared weight": (partial(tied, 1), partial(tied, 2)),
    "the function that is called": (nn.ReLU, nn.Sigmoid),
    "an argument of it": (partial(nn.LeakyReLU, 0.1), partial(nn.LeakyReLU, 0.2)),
}


class Wrapped(Layer):
    """Pictures, frame by frame, without being traced."""

    def __init__(self, build: Callable[[], nn.Module]) -> None:
        super().__init__()
        self.block, self.weight = build(), nn.Parameter(torch.ones(4, 1, 1))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.weight * self.block(x.flatten(0, 1)).unflatten(0, x.shape[:2])


def as_layers(*builds: Callable[[], nn.Module]) -> Network:
    return Network([partial(Wrapped, build) for build in builds], (1,) * len(builds))


def as_traced(*builds: Callable[[], nn.Module]) -> Network:
    """Behind a convolution, for the unit that reads the input is like no other."""
    model = nn.Sequential(nn.Conv2d(4, 4, 1), *(build() for build in builds))
    return traced_network(model, (4, 8, 8))


def traits(network: Network) -> list[str]:
    return [layer_traits(network, index) for index in range(len(network.layers))]


@pytest.mark.parametrize("make", [as_layers, as_traced])
@pytest.mark.parametrize("build", [Block, partial(Block, 0.5, dilation=2), partial(tied, 2), partial(dropping, 0.3)])
def test_equal_blocks_are_alike(make: Callable[..., Network], build: Callable[[], nn.Module]) -> None:
    found = traits(make(build, build))
    units = len(found) // 2  # a block may be several
    assert found[-2 * units : -units] == found[-units:]


@pytest.mark.parametrize("make", [as_layers, as_traced])
@pytest.mark.parametrize("name", UNLIKE)
def test_blocks_that_differ_where_repr_does_not_show_it_are_not_alike(make: Callable[..., Network], name: str) -> None:
    found = traits(make(*UNLIKE[name]))
    units = len(found) // 2
    assert found[-2 * units : -units] != found[-units:]


def test_attributes_go_by_their_names_whatever_their_order() -> None:
    class Two(nn.Module):
        def __init__(self, **settings: int) -> None:
            super().__init__()
            for name, value in settings.items():
                setattr(self, name, value)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x * self.a + self.b

    same, swapped = partial(Two, b=2, a=1), partial(Two, b=1, a=2)
    first, second, third = traits(as_layers(partial(Two, a=1, b=2), same, swapped))
    assert first == second != third


def test_classes_of_one_name_are_not_one_class() -> None:
    def made(factor: int) -> type[nn.Module]:
        class Scaled(nn.Module):
            def forward(self, x: torch.Tensor) -> torch.Tensor:
                return torch.cat([x] * factor, 1).flatten(1)[:, : x[0].numel()].view_as(x)

        return Scaled

    one, other = made(1), made(2)
    assert len(set(traits(as_layers(one, one, other)))) == 2


def test_blocks_with_normalised_weights_are_alike_too() -> None:
    def normalised() -> nn.Module:
        return nn.utils.parametrizations.weight_norm(nn.Conv2d(4, 4, 3, padding=1))

    first, second, third = traits(as_layers(normalised, normalised, partial(nn.Conv2d, 4, 4, 3, padding=1)))
    assert first == second != third


def test_stages_of_equal_blocks_share_what_is_predicted_for_one_of_them(planned_stages: Planned) -> None:
    def stages_of() -> tuple[Config, list[StageSpec]]:
        blocks = [Block(), Block(), Block(dilation=2)]
        network = traced_network(nn.Sequential(nn.Conv2d(3, 4, 1), *blocks), (3, 8, 8))
        return planned_stages("vision", network, **{"training.batch_size": 2, "memory.recompute": "never"})

    config, stages = stages_of()
    first, one, equal, other = (spec.alike for spec in stages)
    assert one is equal
    assert len({first, one, other}) == 3
    # By itself, in a network of its own, the second of the equal ones takes what is predicted for the first of them.
    alone = stages_of()[1][2]
    assert alone.alike is not equal
    for plan in (MemoryPlan(2, 2), MemoryPlan(2, 1, optimizer_on_host=True, predictors=1, parts=2)):
        assert training_peak(config, alone, plan) == training_peak(config, stages[1], plan)
        assert training_peak(config, stages[2], plan) is training_peak(config, stages[1], plan)


def test_runs_with_other_budgets_seeds_and_places_share_what_is_predicted(planned_stages: Planned) -> None:
    config, stages = planned_stages("speech")
    elsewhere = {"out": "elsewhere", "cache.dir": "elsewhere", "memory.gpu_mem": "1GB", "training.stages": 4}
    other, same = planned_stages("speech", **elsewhere, **{"training.seed": 1, "training.max_epochs": 9})
    for one, another in zip(stages, same, strict=True):
        assert training_peak(config, one, MemoryPlan(4, 4)) is training_peak(other, another, MemoryPlan(4, 4))


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("training.precision", "bfloat16"),
        ("cache.dtype", "float32"),
        ("objective.steps", 2),
        ("objective.negatives", 8),
        ("objective.projection", 2),
    ],
)
def test_a_run_whose_stages_take_something_else_is_predicted_by_itself(
    planned_stages: Planned, option: str, value: object
) -> None:
    config, (_, stage, *_) = planned_stages("speech")

    def predicted(asked: Config) -> tuple[int, int]:
        return training_peak(asked, stage, MemoryPlan(4, 4)).bytes, step_moved(asked, stage, MemoryPlan(4, 4))

    assert predicted(config) != predicted(with_options(config, {option: value}))


@pytest.mark.parametrize(("option", "value"), [("micro_batch", 2), ("recompute", "never"), ("optimizer", "device")])
def test_a_run_that_allows_other_plans_has_them(planned_stages: Planned, option: str, value: object) -> None:
    config, (*_, stage) = planned_stages("speech", **{"training.stages": 2})
    other = with_options(config, {f"memory.{option}": value})
    assert allowed_plans(config, stage) != allowed_plans(other, stage)
