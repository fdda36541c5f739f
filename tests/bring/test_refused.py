"""Networks that are refused: the sentence, and that what it advises works."""

import copy
import random
import types
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.utils.prune
from torch import nn

import layerwise
from layerwise.errors import ConfigError

EXAMPLE = torch.zeros(4, 6)


def plain() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 4))


class Forward(nn.Module):
    """A network given by what its forward does with its two layers."""

    def __init__(self, forward: Callable[["Forward", torch.Tensor], torch.Tensor]) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b, self.does, self.calls = nn.Linear(6, 8), nn.Linear(8, 4), forward, 0

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.does(self, x)


def changed(change: Callable[[nn.Module], object]) -> nn.Module:
    model = plain()
    change(model)
    return model


class Reversed(torch.autograd.Function):
    """The same forward; backward the gradient with another sign."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> torch.Tensor:
        return -gradient


class Reversal(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return Reversed.apply(x)


class WithoutGradients(nn.Module):
    def __init__(self, part: nn.Module) -> None:
        super().__init__()
        self.part = part

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        with torch.no_grad():
            return self.part(x)


class Complex(nn.Module):
    """A diagonal that is complex, as one parameter or as its two parts."""

    def __init__(self, parts: bool) -> None:
        super().__init__()
        self.a, self.parts = nn.Linear(6, 8), parts
        diagonal = torch.randn(8, 2)
        self.diagonal = nn.Parameter(diagonal if parts else torch.view_as_complex(diagonal))
        self.b = nn.Linear(8, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        diagonal = torch.view_as_complex(self.diagonal) if self.parts else self.diagonal
        return self.b((self.a(x) * diagonal).real)


def old_weight_norm() -> nn.Module:
    with pytest.warns(FutureWarning, match="deprecated"):
        return changed(lambda model: nn.utils.weight_norm(model[0]))


def new_weight_norm() -> nn.Module:
    model = old_weight_norm()
    nn.utils.remove_weight_norm(model[0])
    nn.utils.parametrizations.weight_norm(model[0])
    return model


def new_spectral_norm() -> nn.Module:
    model = changed(lambda model: nn.utils.spectral_norm(model[0]))
    nn.utils.remove_spectral_norm(model[0])
    nn.utils.parametrizations.spectral_norm(model[0])
    return model


def by_count(net: Forward, x: torch.Tensor) -> torch.Tensor:
    net.calls += 1
    return net.b(net.a(x) * net.calls)


def by_batch(net: Forward, x: torch.Tensor) -> torch.Tensor:
    return net.b(net.a(x) * (2.0 if len(x) > 100 else 1.0))


def by_one_more(net: Forward, x: torch.Tensor) -> torch.Tensor:
    return net.b(net.a(x) + torch.zeros(len(x) + 1, 8)[1:])


def only_for_many(net: Forward, x: torch.Tensor) -> torch.Tensor:
    if net.training and len(x) < 3:
        raise ValueError("too few")
    return net.b(net.a(x))


def sample_by_sample(net: Forward, x: torch.Tensor) -> torch.Tensor:
    return torch.stack([net.b(net.a(sample)) for sample in x])


def with_tensor_hook(net: Forward, x: torch.Tensor) -> torch.Tensor:
    x = net.a(x)
    if x.requires_grad:
        x.register_hook(lambda gradient: 3 * gradient)
    return net.b(x)


class Unlisted(nn.Module):
    def __init__(self, keep: Callable[[list[nn.Module]], Any]) -> None:
        super().__init__()
        self.first, self.others = nn.Linear(6, 6), keep([nn.Linear(6, 6), nn.Linear(6, 4)])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.first(x)
        for layer in self.others:
            x = layer(x)
        return x


def with_forward(forward: Callable[[nn.Module], Callable[..., Any]]) -> nn.Module:
    """With another forward for its first layer."""
    return changed(lambda model: setattr(model[0], "forward", forward(model[0])))


def doubled(old: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    return lambda x: 2 * old(x)


def doubled_linear(layer: nn.Module, x: torch.Tensor) -> torch.Tensor:
    return 2 * nn.functional.linear(x, layer.weight, layer.bias)


def with_sum_of_weights(model: nn.Module) -> None:
    weight = model[2].weight
    model[0].register_forward_hook(lambda module, inputs, output: output + weight.sum())


REFUSED: dict[str, tuple[Callable[[], nn.Module], str, Callable[[], nn.Module] | None]] = {
    "compiled": (lambda: torch.compile(plain()), r"is compiled.* give it as it was before torch\.compile", plain),
    "a part compiled": (lambda: nn.Sequential(torch.compile(plain())), r"'0' \(OptimizedModule\) is compiled", plain),
    "a part's forward compiled": (
        lambda: with_forward(lambda layer: torch.compile(layer.forward)),
        r"'0' \(Linear\) has a compiled forward.* before torch\.compile",
        plain,
    ),
    "its forward compiled": (
        lambda: changed(lambda model: setattr(model, "forward", torch.compile(model.forward))),
        r"The network \(Sequential\) has a compiled forward",
        plain,
    ),
    "a forward that holds on to the layer": (
        lambda: with_forward(lambda layer: doubled(layer.forward)),
        r"the gradient of '0.weight' differs\. A hook.* or a forward that was put in place of another",
        lambda: with_forward(lambda layer: types.MethodType(doubled_linear, layer)),
    ),
    "a hook with another layer's weight": (
        lambda: changed(with_sum_of_weights),
        r"the gradient of '2.weight' differs\. A hook",
        None,
    ),
    "a hook on a gradient": (
        lambda: changed(lambda model: model[0].weight.register_hook(lambda gradient: 3 * gradient)),
        r"the gradient of '0.weight' differs\. A hook",
        None,
    ),
    "scripted": (lambda: torch.jit.script(plain()), r"is scripted.* before torch\.jit\.script", plain),
    "traced": (lambda: torch.jit.trace(plain(), EXAMPLE), r"is scripted.* before .*torch\.jit\.trace", plain),
    "a part scripted": (lambda: nn.Sequential(torch.jit.script(plain())), r"'0' .*is scripted", plain),
    "for several devices": (lambda: nn.DataParallel(plain()), r"several devices; give the module inside", plain),
    "bfloat16": (
        lambda: plain().bfloat16(),
        r"'0.weight' is bfloat16.*network\.float\(\).*--precision bfloat16",
        plain,
    ),
    "float16": (lambda: plain().half(), r"is float16.*network\.float\(\).*--precision float16", plain),
    "float64": (lambda: plain().double(), r"is float64.*give network\.float\(\)\.$", lambda: plain().double().float()),
    "one layer in float64": (
        lambda: changed(lambda model: model[2].double()),
        r"'2.weight' is float64",
        lambda: changed(lambda model: model[2].double()).float(),
    ),
    "complex": (
        lambda: Complex(parts=False),
        r"'diagonal' is complex64.*torch\.view_as_complex",
        lambda: Complex(parts=True),
    ),
    "without values": (lambda: plain().to("meta"), r"has no values \(its device is meta\)", plain),
    "old weight_norm": (old_weight_norm, r"'0' \(Linear\) has the old weight_norm.*parametrizations", new_weight_norm),
    "old spectral_norm that was trained": (
        lambda: changed(lambda model: (nn.utils.spectral_norm(model[0]), model(EXAMPLE))),
        r"has the old spectral_norm.*parametrizations",
        new_spectral_norm,
    ),
    "old spectral_norm at the root": (
        lambda: nn.utils.spectral_norm(nn.Linear(6, 4)),
        r"network \(Linear\) has the old spectral_norm",
        lambda: nn.Sequential(nn.utils.parametrizations.spectral_norm(nn.Linear(6, 4))),
    ),
    "pruned": (
        lambda: changed(lambda model: nn.utils.prune.l1_unstructured(model[0], "weight", 0.5)),
        r"pruned weight.*torch\.nn\.utils\.prune\.remove",
        lambda: changed(
            lambda model: nn.utils.prune.remove(nn.utils.prune.l1_unstructured(model[0], "weight", 0.5), "weight")
        ),
    ),
    "a gradient of its own": (
        lambda: Forward(lambda net, x: net.b(Reversed.apply(net.a(x)))),
        r"torch\.autograd\.Function \(test_refused.py, line .*an nn\.Module of its own",
        lambda: nn.Sequential(nn.Linear(6, 8), Reversal(), nn.Linear(8, 4)),
    ),
    "without gradients": (
        lambda: Forward(lambda net, x: net.b(WithoutGradients.forward(Holder(net.a), x))),
        r"works without gradients.*an nn\.Module of its own",
        lambda: nn.Sequential(nn.Linear(6, 8), WithoutGradients(nn.Linear(8, 8)), nn.Linear(8, 4)),
    ),
    "a hook on a tensor": (
        lambda: Forward(with_tensor_hook),
        r"puts a hook on a tensor.*an nn\.Module of its own",
        None,
    ),
    "by how often it was called": (lambda: Forward(by_count), "in training than in evaluation|an earlier call", None),
    "by the size of the batch": (lambda: Forward(by_batch), r"from .*they differ.* the size of the batch", None),
    "by a size made of it": (
        lambda: Forward(by_one_more),
        r"(fail|differ).* the size of the batch",
        None,
    ),
    "only for many": (
        lambda: Forward(only_for_many),
        r"fails on 2 samples of noise in training \(ValueError: too few",
        None,
    ),
    "by Python's random numbers": (
        lambda: Forward(lambda net, x: net.b(net.a(x) * random.random())),
        "random numbers|in training than in evaluation",
        lambda: Forward(lambda net, x: net.b(net.a(x) * torch.rand(()))),
    ),
    "sample by sample": (
        lambda: Forward(sample_by_sample),
        r"sample by sample \(test_refused.py, line",
        lambda: Forward(lambda net, x: net.b(net.a(x))),
    ),
    "modules in a list": (lambda: Unlisted(list), r"does not list \(.*nn\.ModuleList", lambda: Unlisted(nn.ModuleList)),
}


def wav2vec2(**settings: Any) -> nn.Module:
    from networks import SOUND, of_transformers

    return of_transformers("Wav2Vec2", **SOUND | settings)()


@pytest.mark.parametrize(
    ("settings", "sentence", "mended"),
    [
        ({"layerdrop": 0.1, "apply_spec_augment": False}, r"set its config\.layerdrop to 0", {"layerdrop": 0.0}),
        ({"apply_spec_augment": True}, r"set its config\.apply_spec_augment to False", {"apply_spec_augment": False}),
    ],
)
def test_what_transformers_does_at_random_is_refused_with_the_setting_to_change(
    settings: dict[str, Any], sentence: str, mended: dict[str, Any]
) -> None:
    pytest.importorskip("transformers", reason="needs pip install -c constraints.txt 'layerwise[transformers]'")
    model, example = wav2vec2(**settings), torch.zeros(1, 1, 400)
    with pytest.raises(ConfigError, match=sentence):
        layerwise.cut(model, example)
    for name, value in mended.items():
        setattr(model.config, name, value)
    assert len(layerwise.cut(model, example).layers) == 19


class Holder:
    def __init__(self, part: nn.Module) -> None:
        self.part = part


@pytest.mark.parametrize("what", REFUSED)
def test_what_cannot_be_trained_is_refused_with_a_way_that_works(what: str) -> None:
    build, sentence, mended = REFUSED[what]
    model = build()
    with pytest.raises(ConfigError, match=sentence):
        layerwise.cut(model, EXAMPLE)
    if mended is not None:
        assert len(layerwise.cut(mended(), EXAMPLE).layers) >= 1


@torch.library.custom_op("test_refused::halved", mutates_args=())
def halved(x: torch.Tensor) -> torch.Tensor:
    return x / 2


@torch.library.custom_op("test_refused::gradient_of_halved", mutates_args=())
def gradient_of_halved(gradient: torch.Tensor) -> torch.Tensor:
    return gradient / 2


halved.register_fake(torch.empty_like)
halved.register_autograd(lambda context, gradient: gradient_of_halved(gradient))

library = torch.library.Library("test_refused", "FRAGMENT")
library.define("third(Tensor x) -> Tensor")
library.define("gradient_of_third(Tensor x) -> Tensor")
for name in ("third", "gradient_of_third"):
    library.impl(name, lambda x: x / 3, "CPU")
torch.library.register_fake("test_refused::third", torch.empty_like, lib=library)
torch.library.register_autograd(
    "test_refused::third",
    lambda context, gradient: torch.ops.test_refused.gradient_of_third(gradient),
    lib=library,
)


@pytest.mark.parametrize("name", ["halved", "third"])
def test_an_operation_whose_shapes_torch_does_not_know_is_refused_when_its_memory_is_planned(name: str) -> None:
    operation = getattr(torch.ops.test_refused, name)
    model, data = Forward(lambda net, x: net.b(operation(net.a(x)))), torch.randn(16, 6)
    with pytest.raises(ConfigError, match=rf"gradient_of_{name}.*a newer torch, or.* torch\.library\.register_fake"):
        layerwise.plan(model, data)
    torch.library.register_fake(f"test_refused::gradient_of_{name}", torch.empty_like, lib=library)
    assert layerwise.plan(model, data).stages


@pytest.mark.parametrize("where", ["compiled in place", "a hook at the root", "a parametrization at the root"])
def test_what_is_no_other_network_is_taken(where: str) -> None:
    model = plain()
    if where == "compiled in place":
        model.compile()
    if where == "a hook at the root":
        model.register_forward_hook(lambda module, inputs, output: 100 * output)
    if where == "a parametrization at the root":
        model = nn.utils.parametrizations.weight_norm(nn.Linear(6, 4))
    network = layerwise.cut(model, EXAMPLE)
    whole = network.build(range(len(network.layers)), 0, "cpu").eval()
    x = torch.randn(3, 6)
    found = whole(x[:, None], torch.ones(3).numpy())[1][:, 0]
    plain_model = copy.deepcopy(model).eval() if where != "compiled in place" else plain().eval()
    assert torch.allclose(found, plain_model(x), atol=1e-6)
