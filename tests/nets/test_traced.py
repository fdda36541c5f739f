"""Cutting any module into units: what they compute, what they hold, and the sentence where it cannot be done."""

import copy
import subprocess
import sys
from collections.abc import Callable

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import fx, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torchvision.models import VisionTransformer, resnet18, resnet50

from layerwise.errors import ConfigError
from layerwise.memory.meter import Meter
from layerwise.nets.batch_effects import find_batch_norm
from layerwise.nets.network import copied
from layerwise.nets.traced import FrameUnit, identity, traced_network
from layerwise.nets.tracing import trace, why_uncut

PICTURES = torch.rand(3, 3, 32, 32, generator=torch.Generator().manual_seed(0))
SOUNDS = torch.rand(3, 2, 40, generator=torch.Generator().manual_seed(0))
VECTORS = torch.rand(3, 4, generator=torch.Generator().manual_seed(0))


class Recurrent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv1d(2, 8, 5, stride=2)
        self.gru = nn.GRU(8, 6, batch_first=True)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.conv(x).transpose(1, 2)
        return self.gru(x)[0]


class FunctionalDropout(nn.Module):
    """What differs between training and evaluation is an argument, not a module."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm, self.second = nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Linear(8, 2)
        self.register_buffer("scale", torch.full((8,), 0.5), persistent=False)

    def forward(self, x: torch.Tensor, gain: float = 2.0) -> torch.Tensor:
        torch._assert(x.shape[1] == 4, "four features")
        x = F.dropout(self.first(x), 0.5, self.training) * self.scale
        x += gain
        return self.second(self.norm(x))


def sequential() -> nn.Module:
    return nn.Sequential(
        nn.Dropout(0.1), nn.Flatten(), nn.Linear(4, 8), nn.ReLU(inplace=True), nn.Dropout(0.5), nn.Linear(8, 2)
    )


def transformer() -> nn.Module:
    net = VisionTransformer(32, 8, num_layers=3, num_heads=2, hidden_dim=16, mlp_dim=32, dropout=0.1, num_classes=10)
    nn.init.normal_(net.class_token)
    nn.init.normal_(net.heads.head.weight)
    return net


NETWORKS: dict[str, tuple[Callable[[], nn.Module], torch.Tensor, int]] = {
    "sequential": (sequential, VECTORS, 2),
    "resnet18": (lambda: resnet18(num_classes=10), PICTURES, 11),
    "resnet50": (lambda: resnet50(num_classes=10, width_per_group=4), PICTURES, 19),
    "transformer": (transformer, PICTURES, 11),
    "recurrent": (Recurrent, SOUNDS, 2),
    "functional dropout": (FunctionalDropout, VECTORS, 3),
}
"""Name to how it is built, samples for it, and the number of units that it has."""


@pytest.fixture(params=NETWORKS)
def network(request: pytest.FixtureRequest) -> tuple[nn.Module, torch.Tensor, int]:
    build, samples, count = NETWORKS[request.param]
    torch.manual_seed(3)
    return build(), samples, count


def one_after_another(units: list[fx.GraphModule], x: torch.Tensor) -> torch.Tensor:
    for unit in units:
        x = unit(x)
    return x


def trained_step(forward: Callable[[torch.Tensor], torch.Tensor], x: torch.Tensor) -> torch.Tensor:
    torch.manual_seed(11)
    y = forward(x)
    y.square().sum().backward()
    return y


def test_a_network_has_this_many_units(network: tuple[nn.Module, torch.Tensor, int]) -> None:
    model, samples, count = network
    assert len(trace(model, samples)) == count


def test_units_one_after_another_train_to_the_same_bits(network: tuple[nn.Module, torch.Tensor, int]) -> None:
    model, samples, _ = network
    whole = copy.deepcopy(model)
    units = trace(model, samples)
    assert torch.equal(
        trained_step(lambda x: one_after_another(units, x), samples.clone()), trained_step(whole, samples.clone())
    )
    for (name, found), expected in zip(model.named_parameters(), whole.parameters(), strict=True):
        assert torch.equal(found.grad, expected.grad), name
    for (name, found), expected in zip(model.named_buffers(), whole.buffers(), strict=True):
        assert torch.equal(found, expected), name


def test_units_in_evaluation_give_the_same_bits_whatever_the_mode_they_were_traced_in(
    network: tuple[nn.Module, torch.Tensor, int],
) -> None:
    model, samples, _ = network
    units = [unit.eval() for unit in trace(model, samples)]
    with torch.no_grad():
        assert torch.equal(one_after_another(units, samples), model.eval()(samples))
        assert torch.equal(one_after_another(trace(model, samples), samples), model(samples))


def test_units_together_hold_the_weights_of_the_network_under_its_names(
    network: tuple[nn.Module, torch.Tensor, int],
) -> None:
    model, samples, _ = network
    units = trace(model, samples)
    held = [unit.state_dict(keep_vars=True) for unit in units]
    assert sum(len(state) for state in held) == len(model.state_dict())
    expected = model.state_dict(keep_vars=True)
    assert all(tensor is expected[name] for state in held for name, tensor in state.items())
    assert all(list(unit.parameters()) for unit in units)


def test_tracing_changes_neither_the_network_nor_the_random_state(
    network: tuple[nn.Module, torch.Tensor, int],
) -> None:
    model, samples, _ = network
    next(model.children()).eval()
    before = copy.deepcopy(model)
    state = torch.get_rng_state()
    trace(model, samples)
    assert torch.equal(torch.get_rng_state(), state)
    assert [module.training for module in model.modules()] == [module.training for module in before.modules()]
    assert vars(model).keys() == vars(before).keys()
    for name, tensor in before.state_dict().items():
        assert torch.equal(model.state_dict()[name], tensor), name


def test_units_hold_only_the_modules_that_they_use() -> None:
    units = trace(resnet18(num_classes=10), PICTURES)
    assert [name for name, _ in units[0].named_children()] == ["conv1"]
    assert list(units[-1].state_dict()) == ["fc.weight", "fc.bias"]


class Flow(nn.Module):
    """A network given by a function of its modules and its input."""

    def __init__(self, flow: Callable[[nn.Module, torch.Tensor], torch.Tensor], width: int = 4) -> None:
        super().__init__()
        self.a, self.b, self.c, self.d = (nn.Linear(width, width) for _ in range(4))
        self.flow = flow

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.flow(self, x)


def weights_of_units(model: nn.Module, example: torch.Tensor = VECTORS) -> list[str]:
    """The modules whose weights each unit holds, as in ["ab", "c"]."""
    return ["".join(name for name, _ in unit.named_children()) for unit in trace(model, example)]


def test_the_size_of_the_batch_forbids_no_cut_wherever_it_is_used() -> None:
    def flow(net: Flow, x: torch.Tensor) -> torch.Tensor:
        x = net.a(x)
        samples, count = x.shape[0], x.shape[0] * 2
        x = net.c(net.b(x))
        x = torch.cat([x.reshape(samples, -1), x]).reshape(count, 4)[: len(x)]
        return net.d(x * torch.ones(samples, 1))

    model = Flow(flow)
    assert weights_of_units(model) == ["a", "b", "c", "d"]
    for samples in (VECTORS, VECTORS[:1]):
        assert torch.equal(one_after_another(trace(model, VECTORS), samples), model(samples))


def test_a_forward_may_loop_and_decide_by_the_shape_of_a_frame() -> None:
    def flow(net: Flow, x: torch.Tensor) -> torch.Tensor:
        for layer in [net.a, net.b, net.c, net.d][: x.shape[1] - 1]:
            x = layer(x) if x.dim() == 2 else x
        return x

    model = Flow(flow)
    assert weights_of_units(model) == ["a", "b", "c"]
    assert torch.equal(one_after_another(trace(model, VECTORS), VECTORS), model(VECTORS))


def test_constants_are_made_again_in_each_unit() -> None:
    def flow(net: Flow, x: torch.Tensor) -> torch.Tensor:
        mask = torch.arange(4, device=x.device).unsqueeze(0).expand(len(x), 4) < 2
        for layer in (net.a, net.b, net.c, net.d):
            x = layer(x).masked_fill(mask, 0.0)
        return x

    model = Flow(flow)
    assert weights_of_units(model) == ["a", "b", "c", "d"]
    assert torch.equal(one_after_another(trace(model, VECTORS), VECTORS), model(VECTORS))


def test_numbers_that_a_forward_draws_are_drawn_at_every_call() -> None:
    model = Flow(lambda net, x: net.b(net.a(x) + torch.rand(4)) * torch.randn(len(x), 1))
    units = trace(model, VECTORS)
    torch.manual_seed(5)
    expected = model(VECTORS)
    torch.manual_seed(5)
    assert torch.equal(one_after_another(units, VECTORS), expected)
    assert not torch.equal(one_after_another(units, VECTORS), expected)


def test_what_nothing_comes_of_is_left_out() -> None:
    def flow(net: Flow, x: torch.Tensor) -> torch.Tensor:
        net.d(net.a(x))
        return net.c(net.b(net.a(x)))

    model = Flow(flow)
    assert weights_of_units(model) == ["a", "b", "c"]
    assert len(traced_network(model, (4,)).layers) == 3


class Dropped(nn.Module):
    """Does in training what it does not in evaluation, as stochastic depth does."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if not self.training:
            return self.linear(x)
        kept = torch.rand(len(x), 1) < 0.5
        return torch.where(kept, self.linear(x), x)


def test_a_module_that_does_more_in_training_is_kept_whole() -> None:
    model = nn.Sequential(nn.Linear(4, 4), Dropped(), nn.Linear(4, 4))
    units = trace(model, VECTORS)
    assert [[name for name, _ in unit.named_children()] for unit in units] == [["0"], ["1"], ["2"]]
    for training in (True, False):
        torch.manual_seed(5)
        expected = model.train(training)(VECTORS)
        torch.manual_seed(5)
        assert torch.equal(one_after_another([unit.train(training) for unit in units], VECTORS), expected)


def test_a_weight_that_is_used_again_forbids_the_cuts_in_between() -> None:
    assert weights_of_units(Flow(lambda net, x: net.d(net.b(net.c(net.b(net.a(x))))))) == ["a", "bc", "d"]


def test_a_parameter_under_two_names_forbids_the_cuts_in_between_and_stays_one() -> None:
    model = Flow(lambda net, x: net.d(net.c(net.b(net.a(x)))))
    model.c.weight = model.a.weight
    assert weights_of_units(model) == ["abc", "d"]
    unit = FrameUnit(trace(model, VECTORS)[0]).unit
    assert unit.a.weight is unit.c.weight is not model.a.weight


def test_a_value_with_another_axis_in_front_of_the_batch_is_not_cut_at() -> None:
    model = Flow(lambda net, x: net.d(net.c(net.b(net.a(x).transpose(0, 1))).transpose(0, 1)))
    assert weights_of_units(model, torch.rand(3, 3, 4)) == ["a", "bc", "d"]


def test_a_unit_never_changes_its_input_in_place() -> None:
    def flow(net: Flow, x: torch.Tensor) -> torch.Tensor:
        x = net.a(x)
        x += net.b.weight[0]
        return net.c(x)

    units = trace(Flow(flow), VECTORS)
    assert [list(unit.state_dict()) for unit in units] == [
        ["a.weight", "a.bias", "b.weight"],
        ["c.weight", "c.bias"],
    ]


def test_what_is_changed_in_place_changes_for_all_that_share_it() -> None:
    def flow(net: Flow, x: torch.Tensor) -> torch.Tensor:
        x = same = net.a(x)
        samples, size = x.shape
        x += 1
        size += 1
        return net.b(x + same) * size + samples + x.shape[1]

    model = Flow(flow)
    assert torch.equal(one_after_another(trace(model, VECTORS), VECTORS), model(VECTORS))


def test_constants_that_the_forward_makes_are_no_weights() -> None:
    def flow(net: Flow, x: torch.Tensor) -> torch.Tensor:
        return net.b(net.a(x) * torch.arange(4.0))

    units = trace(Flow(flow), VECTORS)
    assert list(units[0].state_dict()) == list(FrameUnit(units[0]).unit.state_dict()) == ["a.weight", "a.bias"]
    with torch.device("meta"):
        assert all(buffer.is_meta for buffer in FrameUnit(units[0]).buffers())


def test_a_network_with_a_long_connection_is_one_unit_and_the_sentence_names_it() -> None:
    model = Flow(lambda net, x: x + net.d(net.c(net.b(net.a(x)))))
    assert len(trace(model, VECTORS)) == 1
    assert "the network's input is needed across 4 of the 4 operations" in why_uncut(model, VECTORS)


def test_the_sentence_names_the_module_whose_output_a_unet_keeps() -> None:
    def flow(net: Flow, x: torch.Tensor) -> torch.Tensor:
        down = net.a(x)
        deeper = net.b(down)
        return net.d(net.c(deeper) + deeper) + down

    sentence = why_uncut(Flow(flow), VECTORS)
    assert "'a' (test_traced.py, line" in sentence
    assert "`down = net.a(x)`) is needed across 3 of the 4 operations" in sentence


def test_the_sentence_names_the_weight_that_is_used_again() -> None:
    model = Flow(lambda net, x: net.a(net.c(net.b(net.a(x)))))
    assert "the weight 'a.weight' is needed across 4 of the 4 operations" in why_uncut(model, VECTORS)


def frozen(model: nn.Module, *names: str) -> nn.Module:
    for name in names:
        model.get_submodule(name).requires_grad_(False)
    return model


FROZEN = {"a": ["ab", "c", "d"], "abc": ["abcd"], "b": ["a", "bc", "d"], "d": ["a", "b", "cd"], "bcd": ["abcd"]}
"""Frozen modules of four, one after another, to the units."""


@pytest.mark.parametrize("modules", FROZEN)
def test_what_is_frozen_goes_with_what_is_trained_next(modules: str) -> None:
    model = frozen(Flow(lambda net, x: net.d(net.c(net.b(net.a(x))).relu())), *modules)
    assert weights_of_units(model) == FROZEN[modules]
    assert torch.equal(one_after_another(trace(model, VECTORS), VECTORS), model(VECTORS))


@pytest.mark.parametrize("model", [frozen(nn.Linear(4, 4), ""), nn.Sequential(nn.ReLU(), nn.Flatten())])
def test_a_network_with_nothing_to_train_is_refused(model: nn.Module) -> None:
    with pytest.raises(ConfigError, match="nothing to train: it has no parameters, or all of them are frozen"):
        traced_network(model, (4,))


def test_the_sentence_says_where_every_cut_is_taken_already() -> None:
    assert "already" in why_uncut(nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)), VECTORS)


def decides(net: Flow, x: torch.Tensor) -> torch.Tensor:
    return net.a(x) if x.sum() > 0 else net.b(x)


def loops(net: Flow, x: torch.Tensor) -> torch.Tensor:
    for row in x:
        x = net.a(x) + row
    return x


def without_gradients(net: Flow, x: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        x = net.a(x)
    return net.b(x)


def other_in_training(net: Flow, x: torch.Tensor) -> torch.Tensor:
    return net.b(x) if net.training else net.a(x)


REFUSED = {
    decides: (
        r"decides or loops by the value .* \(test_traced.py, line \d+: `return net.a\(x\) if x.sum",
        "torch.where",
    ),
    loops: (r"sample by sample \(test_traced.py, line \d+: `for row in x:`\)", "torch.where"),
    without_gradients: (r"torch.no_grad.* \(test_traced.py, line \d+: `x = net.a\(x\)`\)", "nn.Module of its own"),
    other_in_training: (r"in training than in evaluation, from 'b' \(test_traced.py, line", "nn.Module of its own"),
    lambda net, x: {"features": net.a(x)}: ("gives a dict", "wrap the network"),
    lambda net, x: (net.a(x), net.b(x)): ("gives a tuple", "wrap the network"),
    lambda net, x: net.a(x).sum(): (r"gives \(\) for N samples", "batch comes first"),
    lambda net, x: net.a(x).transpose(0, 1): (r"gives \(4, N\) for N samples", "batch comes first"),
    lambda net, x: net.a(x["image"]): (r"fails at 'getitem' \(test_traced.py, line", "frames of the shape"),
    lambda net, x: net.a(x[x > 0]): (r"fails at 'getitem' \(test_traced.py, line", "do not depend on values"),
    lambda net, x: net.a(x.relu_()): (r"changes its input in place at 'relu_' \(test_traced.py, line", "a new tensor"),
}
"""What a forward does, to what the sentence says of it and of the way out."""


@pytest.mark.filterwarnings("ignore:Using a non-tuple sequence")
@pytest.mark.parametrize("flow", REFUSED)
def test_a_network_that_cannot_be_recorded_is_refused_with_a_place_and_a_way_out(
    flow: Callable[[Flow, torch.Tensor], torch.Tensor],
) -> None:
    what, way_out = REFUSED[flow]
    with pytest.raises(ConfigError, match=f"{what}.*{way_out}"):
        trace(Flow(flow), VECTORS)


def test_several_inputs_are_refused_by_name() -> None:
    with pytest.raises(ConfigError, match=r"several inputs \(input1, input2\)"):
        trace(nn.Bilinear(4, 4, 2), VECTORS)


def test_an_input_that_is_no_tensor_is_refused() -> None:
    with pytest.raises(ConfigError, match="input is a dict"):
        trace(nn.Linear(4, 4), {"image": VECTORS})


def test_pictures_of_another_size_are_refused_where_the_network_checks_it() -> None:
    with pytest.raises(ConfigError, match=r"fails at '_assert' \(vision_transformer.py, line .*Wrong image height"):
        trace(transformer(), torch.zeros(2, 3, 40, 40))


def test_a_traced_network_computes_what_the_model_does_on_every_frame(
    network: tuple[nn.Module, torch.Tensor, int],
) -> None:
    model, samples, count = network
    module = traced_network(model, samples.shape[1:]).build(range(count), 0, "cpu")
    frames = torch.stack([samples, samples.flip(0)], dim=0)
    with torch.no_grad():
        torch.backends.mha.set_fastpath_enabled(False)  # the other way rounds differently
        expected = model.eval()(frames.flatten(0, 1))
        torch.backends.mha.set_fastpath_enabled(True)
        _, found = module.eval()(frames, np.array([3, 3]))
    assert torch.backends.mha.get_fastpath_enabled()  # whatever the module has set for itself
    if expected.dim() == 3:
        expected = expected.transpose(1, 2)
    assert torch.equal(found, expected.unflatten(0, (2, 3)))


class Constant(nn.Module):
    """Adds to the outputs of a linear layer what no state holds."""

    def __init__(self, buffer: float = 0.5, constant: float = 0.5) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)
        self.register_buffer("buffer", torch.full((4,), buffer), persistent=False)
        self.constant = torch.full((4,), constant)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.linear(x) * self.buffer + self.constant


class Attention(nn.Module):
    """A leaf of torch.fx, whose settings neither its state nor its words show."""

    def __init__(self, block: Callable[..., nn.Module], **settings: object) -> None:
        super().__init__()
        self.linear, self.block = nn.Linear(4, 8), block(8, batch_first=True, **settings)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.linear(x)[:, None]
        return self.block(x, x, x)[0] if isinstance(self.block, nn.MultiheadAttention) else self.block(x)


def encoder_layer(nhead: int = 2, **settings: object) -> nn.Module:
    return Attention(nn.TransformerEncoderLayer, dim_feedforward=8, nhead=nhead, **settings)


def frozen_bias() -> nn.Module:
    model = nn.Linear(4, 4)
    model.bias.requires_grad_(False)
    return model


DIFFERENT: dict[str, tuple[Callable[[], nn.Module], Callable[[], nn.Module]]] = {
    "heads": (
        lambda: Attention(nn.MultiheadAttention, num_heads=2),
        lambda: Attention(nn.MultiheadAttention, num_heads=4),
    ),
    "where the norm is": (encoder_layer, lambda: encoder_layer(norm_first=True)),
    "activation": (encoder_layer, lambda: encoder_layer(activation=F.silu)),
    "a buffer that is not saved": (Constant, lambda: Constant(buffer=0.25)),
    "a constant": (Constant, lambda: Constant(constant=0.25)),
    "a scale": (
        lambda: nn.Sequential(nn.Linear(4, 4), nn.ELU(1.0)),
        lambda: nn.Sequential(nn.Linear(4, 4), nn.ELU(2.0)),
    ),
    "what is frozen": (lambda: nn.Linear(4, 4), frozen_bias),
}


@pytest.mark.parametrize("what", DIFFERENT)
def test_networks_that_compute_otherwise_have_other_identities(what: str) -> None:
    def identity(make: Callable[[], nn.Module]) -> str:
        torch.manual_seed(0)
        return traced_network(make(), (4,)).identity

    one, other = DIFFERENT[what]
    assert identity(one) == identity(one)
    assert identity(one) != identity(other)


def test_the_mode_and_earlier_runs_are_no_part_of_an_identity() -> None:
    model = transformer()
    before = traced_network(model, (3, 32, 32)).identity
    model.eval()(PICTURES)
    assert traced_network(model, (3, 32, 32)).identity == before


def test_an_identity_is_the_same_in_another_process() -> None:
    code = (
        "import torch; from torch import nn; from layerwise.nets.traced import traced_network; torch.manual_seed(0);"
        "layer = nn.TransformerEncoderLayer(4, 2, 8, activation=torch.nn.functional.silu);"
        "print(traced_network(nn.Sequential(nn.Linear(4, 4), layer), (3, 4)).identity)"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, check=True, text=True).stdout.strip()
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(4, 2, 8, activation=F.silu)
    assert traced_network(nn.Sequential(nn.Linear(4, 4), layer), (3, 4)).identity == found


def test_a_copy_keeps_what_is_not_saved_and_moves_plain_tensors() -> None:
    unit = trace(Constant(), VECTORS)[0]
    for device in ("cpu", "meta"):
        layer = copied(FrameUnit(unit), torch.device(device))
        assert list(layer.state_dict()) == ["unit.linear.weight", "unit.linear.bias"]
    model = Constant()
    assert copied(model, torch.device("meta")).constant.is_meta
    assert torch.equal(copied(model).constant, model.constant)


def test_a_traced_network_has_a_stage_per_unit_and_the_models_names() -> None:
    model = transformer()
    network = traced_network(model, (3, 32, 32))
    assert network.natural_ranges == [range(index, index + 1) for index in range(11)]
    module = network.build(range(2, 4), 0, "cpu")
    assert set(module.layers["2"].state_dict()) == {"unit.encoder.pos_embedding"}
    assert "unit.encoder.layers.encoder_layer_0.ln_1.weight" in module.layers["3"].state_dict()


def test_tokens_are_handed_on_with_their_channels_in_front() -> None:
    network = traced_network(transformer(), (3, 32, 32))
    _, tokens = network.build(range(4), 0, "meta")(torch.empty(2, 5, 3, 32, 32, device="meta"), np.array([5, 5]))
    assert tokens.shape == (2, 5, 16, 17)


def test_outputs_may_be_cached_between_units() -> None:
    network = traced_network(transformer().eval(), (3, 32, 32))
    x = PICTURES[None]
    with torch.no_grad():
        _, together = network.build(range(11), 0, "cpu").eval()(x, np.array([3]))
        for index in range(11):
            stage = network.build(range(index, index + 1), 0, "cpu").eval()
            x = stage(x.contiguous(), np.array([3]))[1]
    assert torch.equal(x, together)


def test_a_frame_unit_is_a_copy_in_training_mode() -> None:
    unit = trace(sequential().eval(), VECTORS)[0]
    copied = FrameUnit(unit)
    assert all(module.training for module in copied.modules())
    assert not unit.training
    for host, own in zip(unit.parameters(), copied.parameters(), strict=True):
        assert torch.equal(host, own)
        assert host.data_ptr() != own.data_ptr()


def test_a_frozen_parameter_stays_frozen() -> None:
    model = nn.Linear(4, 4)
    model.bias.requires_grad_(False)
    unit = FrameUnit(trace(model, VECTORS)[0]).unit
    assert unit.weight.requires_grad
    assert not unit.bias.requires_grad


def test_a_frame_unit_never_holds_its_parameters_twice(network: tuple[nn.Module, torch.Tensor, int]) -> None:
    model, samples, _ = network
    for unit in trace(model, samples):
        with Meter(torch.device("cpu")) as meter:
            copied = FrameUnit(unit)
        held = [*copied.parameters(), *copied.buffers()]
        assert meter.peak == sum(tensor.untyped_storage().nbytes() for tensor in held)


def test_a_stage_is_built_and_runs_without_values_to_predict_its_memory(
    network: tuple[nn.Module, torch.Tensor, int],
) -> None:
    model, samples, count = network
    traced = traced_network(model, samples.shape[1:])
    with FakeTensorMode():
        module = traced.build(range(count), 0, "cpu")
        assert all(isinstance(parameter, FakeTensor) for parameter in module.parameters())
        _, output = module(torch.empty(2, *samples.shape), np.array([3, 3]))
    assert output.shape[:2] == (2, 3)


def test_parts_with_batch_statistics_are_named() -> None:
    assert find_batch_norm(resnet18()) == "bn1 (BatchNorm2d)"
    assert find_batch_norm(nn.BatchNorm1d(3)) == "(BatchNorm1d)"
    assert find_batch_norm(nn.Sequential(nn.Linear(3, 3), nn.SyncBatchNorm(3))) == "1 (SyncBatchNorm)"
    assert find_batch_norm(nn.Sequential(nn.InstanceNorm1d(3, track_running_stats=True))) == "0 (InstanceNorm1d)"
    assert find_batch_norm(nn.Sequential(nn.InstanceNorm1d(3), nn.GroupNorm(1, 3))) is None
    assert find_batch_norm(transformer()) is None


def test_older_runs_and_encoders_know_their_network_by_the_same_hash() -> None:
    model = nn.Sequential(nn.Conv1d(2, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(24, 5))
    written = "0e15f9d859174dc5c6ecb317657ffae866fab7cb8aef1bcb22e918dde7e57313"  # in the files of earlier versions
    assert traced_network(model, (2, 8)).structure == written


def test_what_a_version_of_torch_keeps_of_a_graph_does_not_change_the_hash() -> None:
    units = [fx.symbolic_trace(nn.Linear(3, 2))]
    before = identity(units)
    units[0].kept_by_another_version = 1
    assert identity(units) == before
