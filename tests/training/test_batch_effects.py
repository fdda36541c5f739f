"""What a stage does to a batch that is sliced is found out, whatever its parts are called."""

import re
from collections.abc import Callable
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

from layerwise.config import Config
from layerwise.memory.meter import Meter
from layerwise.nets import batch_effects as module_under_test
from layerwise.nets.layer import Layer
from layerwise.nets.network import Network
from layerwise.nets.traced import traced_network
from layerwise.training.budget import allowed_plans, fit_stage
from layerwise.training.spec import StageSpec, batch_effects

Planned = Callable[..., tuple[Config, list[StageSpec]]]


class Flow(nn.Module):
    """A convolution, and a function of its pictures."""

    def __init__(self, flow: Callable[[torch.Tensor], torch.Tensor]) -> None:
        super().__init__()
        self.conv, self.flow = conv(), flow

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.flow(self.conv(x))


class Tokens(nn.Module):
    """A transformer on the pixels of a picture."""

    def __init__(self, dropout: float, batch_first: bool = True) -> None:
        super().__init__()
        self.conv = conv()
        self.block = nn.TransformerEncoderLayer(4, 2, 8, dropout, batch_first=batch_first)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.block(self.conv(x).flatten(2).transpose(1, 2))


def conv() -> nn.Module:
    return nn.Conv2d(3, 4, 3, padding=1)


def attention(dropout: float) -> nn.Module:
    def attend(x: torch.Tensor) -> torch.Tensor:
        tokens = x.flatten(2).transpose(1, 2)
        return F.scaled_dot_product_attention(tokens, tokens, tokens, dropout_p=dropout)

    return Flow(attend)


RANDOM: dict[str, Callable[[], nn.Module]] = {
    "dropout": lambda: nn.Sequential(conv(), nn.Dropout(0.1)),
    "RReLU": lambda: nn.Sequential(conv(), nn.RReLU()),
    "RReLU twice": lambda: nn.Sequential(conv(), nn.RReLU(), nn.AvgPool2d(2), nn.RReLU(), nn.Dropout(0.1)),
    "attention": lambda: attention(0.1),
    "transformer": lambda: Tokens(0.1),
    "noise": lambda: Flow(lambda x: x + torch.randn_like(x)),
}
PLAIN: dict[str, Callable[[], nn.Module]] = {
    "attention without dropout": lambda: attention(0.0),
    "transformer without dropout": lambda: Tokens(0.0),
    "group norm": lambda: nn.Sequential(conv(), nn.GroupNorm(2, 4), nn.InstanceNorm2d(4)),
    "a power called p": lambda: nn.Sequential(conv(), nn.LPPool2d(2, 2)),
    "weight norm": lambda: nn.utils.parametrizations.weight_norm(conv()),
}
CHANGING: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "spectral norm": (
        lambda: nn.Sequential(nn.utils.parametrizations.spectral_norm(conv())),
        r"layers\.0\.unit\.0\.parametrizations\.weight\.0 \(_SpectralNorm\) changes its '_u' at every forward pass",
    ),
    "the former spectral norm": (
        lambda: nn.Sequential(nn.utils.spectral_norm(conv())),
        r"layers\.0\.unit\.0 \(Conv2d\) changes its 'weight_u' at every forward pass",
    ),
}
TYING: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "batch norm": (lambda: nn.Sequential(conv(), nn.BatchNorm2d(4)), r"layers\.1\.unit\.1 \(BatchNorm2d\)"),
    "running instance norm": (
        lambda: nn.Sequential(conv(), nn.InstanceNorm2d(4, track_running_stats=True)),
        r"layers\.0\.unit\.1 \(InstanceNorm2d\)",
    ),
    "samples taken for tokens": (
        lambda: Tokens(0.1, batch_first=False),
        r"layers\.1\.unit\.block\.self_attn \(MultiheadAttention\)",
    ),
    "a mean over samples": (lambda: Flow(lambda x: x - x.mean(0)), r"layers\.0\.unit \(GraphModule\)"),
    "a part of the batch": (lambda: Flow(lambda x: x / x.shape[0]), r"layers\.0 \(FrameUnit\)"),
}


@pytest.fixture(scope="module")
def stages(planned_stages: Planned) -> Callable[[nn.Module], list[StageSpec]]:
    """stages(model): those of a model of pictures, one per unit."""

    def plan(model: nn.Module) -> list[StageSpec]:
        return planned_stages("vision", traced_network(model, (3, 8, 8)))[1]

    return plan


@pytest.fixture(scope="module")
def stage(planned_stages: Planned) -> Callable[..., StageSpec]:
    """stage(layer, ...): the stage of the layers that these functions build; of sounds."""

    def plan(*layers: Callable[[], Layer]) -> StageSpec:
        return planned_stages("speech", Network(layers, (len(layers),)), **{"data.window": 400})[1][0]

    return plan


@pytest.fixture(params=["cheap", "dear"])
def cost(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Whether layers are cheap enough to be run, or run on fake tensors alone."""
    if request.param == "dear":
        monkeypatch.setattr(module_under_test, "MOST_OPERATIONS", -1)
    return request.param


@pytest.mark.parametrize("name", RANDOM)
def test_random_numbers_are_found(stages: Callable[[nn.Module], list[StageSpec]], cost: str, name: str) -> None:
    found = [batch_effects(plan) for plan in stages(RANDOM[name]())]
    assert any(each.uses_randomness for each in found)
    assert all(each.why_unsliceable is None for each in found)


@pytest.mark.parametrize("name", PLAIN)
def test_what_does_not_draw_and_can_be_sliced_is_not_suspected(
    stages: Callable[[nn.Module], list[StageSpec]], cost: str, name: str
) -> None:
    for plan in stages(PLAIN[name]()):
        assert not batch_effects(plan).uses_randomness
        assert batch_effects(plan).why_unsliceable is None


@pytest.mark.parametrize("name", CHANGING)
def test_what_changes_at_every_pass_is_named(
    stages: Callable[[nn.Module], list[StageSpec]], cost: str, name: str
) -> None:
    make, sentence = CHANGING[name]
    found = batch_effects(stages(make())[0])
    assert not found.uses_randomness
    assert found.repeatable  # from the old values of its buffers
    assert re.fullmatch(sentence, found.why_unsliceable or "")


@pytest.mark.parametrize("name", TYING)
def test_what_ties_samples_together_is_named(stages: Callable[[nn.Module], list[StageSpec]], name: str) -> None:
    make, part = TYING[name]
    (found,) = [effects for plan in stages(make()) if (effects := batch_effects(plan)).why_unsliceable]
    assert re.fullmatch(f"{part} ties the samples of a batch together", found.why_unsliceable)
    assert found.repeatable


class Linear(Layer):
    """Frames of one number to frames of `channels`."""

    def __init__(self, channels: int = 4) -> None:
        super().__init__()
        self.linear = nn.Linear(1, channels)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.linear(x)


class Counting(Linear):
    """Changes with every pass, where no tensor shows it."""

    passes = 0

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.passes += 1
        return super().forward(x) * self.passes


class Rectified(Linear):
    """Draws for negative values alone."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(F.rrelu(x, training=self.training))


class Decaying(Linear):
    """Changes its weight at every pass."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        with torch.no_grad():
            self.linear.weight.mul_(0.9)
        return super().forward(x)


class Averaging(Linear):
    """Has other tensors for buffers after every pass; the first is changed in place."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("count", torch.zeros(()))
        self.register_buffer("mean", torch.zeros(4))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.count += 1
        self.mean = 0.9 * self.mean + 0.1
        return super().forward(x) - self.mean


class Moody(Linear):
    """Cannot be run in training."""

    def __init__(self) -> None:
        super().__init__()
        self.dropout = nn.Dropout(0.1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.training:
            raise ValueError("not today")
        return super().forward(x)


class Company(Linear):
    """Gives nothing for a sample alone."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if len(x) == 1 and self.training:
            raise ValueError("more than 1 sample")
        return super().forward(x)


def test_a_state_that_no_tensor_shows_is_seen_in_the_outputs(stage: Callable[..., StageSpec]) -> None:
    found = batch_effects(stage(Counting))
    assert found.why_unsliceable == "layers.0 (Counting) gives other outputs at every forward pass"
    assert not found.repeatable


def test_what_cannot_be_repeated_goes_through_its_module_once_under_every_plan(
    stage: Callable[..., StageSpec], planned_stages: Planned
) -> None:
    config, (tied,) = planned_stages("speech", Network([Company], (1,)), **{"data.window": 400})
    assert any(plan.parts for family in allowed_plans(config, tied) for plan in family)
    every = [plan for family in allowed_plans(config, stage(Counting)) for plan in family]
    assert all(plan.whole and not plan.recompute for plan in every)
    assert {plan.optimizer_on_host for plan in every} == {False, True}


def test_a_layer_that_gives_nothing_for_a_sample_alone_is_not_sliced(stage: Callable[..., StageSpec]) -> None:
    assert batch_effects(stage(Company)).why_unsliceable == "layers.0 (Company) ties the samples of a batch together"


@pytest.mark.parametrize(
    ("layer", "changed"), [(Decaying, "linear (Linear) changes its 'weight'"), (Averaging, "'count'")]
)
def test_what_a_step_cannot_put_back_is_not_repeated(
    stage: Callable[..., StageSpec], cost: str, layer: type[Layer], changed: str
) -> None:
    found = batch_effects(stage(layer))
    assert changed in found.why_unsliceable
    assert not found.repeatable


def test_samples_of_both_signs_are_run(stage: Callable[..., StageSpec]) -> None:
    assert batch_effects(stage(Rectified)).uses_randomness


def test_a_layer_that_cannot_be_run_may_do_anything(stage: Callable[..., StageSpec]) -> None:
    found = batch_effects(stage(Moody))
    assert found.uses_randomness
    assert found.why_unsliceable == "layer 0 of the network cannot be tried without values"
    assert not found.repeatable


def test_a_stage_does_what_any_of_its_layers_does(stage: Callable[..., StageSpec]) -> None:
    found = batch_effects(stage(partial(Linear, 1), partial(Rectified, 1), partial(Counting, 1)))
    assert found.uses_randomness
    assert not found.repeatable
    assert found.why_unsliceable == "layers.2 (Counting) gives other outputs at every forward pass"


def test_finding_out_changes_no_generator_and_is_seen_by_no_meter(
    stages: Callable[[nn.Module], list[StageSpec]], planned_stages: Planned
) -> None:
    plans = stages(RANDOM["transformer"]())
    state = torch.get_rng_state()
    with FakeTensorMode(), Meter(torch.device("cpu"), limit=0) as meter:
        found = [batch_effects(plan).uses_randomness for plan in plans]
    assert found == [False, True]
    assert meter.peak == 0
    assert torch.equal(torch.get_rng_state(), state)


def test_each_layer_is_run_once_whatever_is_asked_of_whichever_cut(planned_stages: Planned) -> None:
    built: list[int] = []

    def build(layer: int) -> Layer:
        made = Linear(1)
        if made.linear.weight.device.type == "cpu" and not isinstance(made.linear.weight, FakeTensor):
            built.append(layer)
        return made

    network = Network([partial(build, layer) for layer in range(3)], (3,))
    for stages in (1, 2, 3):
        config, plans = planned_stages("speech", network, **{"data.window": 400, "training.stages": stages})
        for plan in plans:
            batch_effects(plan)
            fit_stage(config, plan, torch.device("cpu"))
    assert sorted(built) == [0, 1, 2]


def test_a_huge_layer_is_never_given_values(stage: Callable[..., StageSpec]) -> None:
    class Huge(Layer):
        def __init__(self) -> None:
            super().__init__()
            self.linear, self.dropout = nn.Linear(1, 2**26), nn.Dropout(0.1)
            assert self.linear.weight.is_meta or isinstance(self.linear.weight, FakeTensor)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.dropout(self.linear(x))

    assert batch_effects(stage(Huge)).uses_randomness
