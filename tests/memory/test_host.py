"""What waits in host memory comes to the device and goes back, and every byte that moves is counted."""

from collections.abc import Iterator

import pytest
import torch
from torch import nn

from layerwise.memory.host import HostMemory
from layerwise.memory.meter import Meter, uncounted

CPU = torch.device("cpu")


@pytest.fixture
def meter() -> Iterator[Meter]:
    with Meter(CPU) as meter:
        yield meter


def normalised() -> nn.Module:
    """On the host: two parameters and three buffers of a layer, and a frozen one."""
    with uncounted():
        torch.manual_seed(0)
        module = nn.Sequential(nn.BatchNorm1d(6), nn.Linear(6, 6, bias=False))
        module[1].weight.requires_grad_(False)
        return module


def tensors(module: nn.Module) -> list[torch.Tensor]:
    return [*module.parameters(), *module.buffers()]


def bytes_of(of: list[torch.Tensor]) -> int:
    return sum(tensor.nbytes for tensor in of)


def values(module: nn.Module) -> list[torch.Tensor]:
    with uncounted():
        return [tensor.detach().clone() for tensor in tensors(module)]


def backward(module: nn.Module, seed: int) -> None:
    x = torch.randn(5, 6, generator=torch.Generator().manual_seed(seed))
    module(x).square().sum().backward()


def expected_gradients(module: nn.Module, seeds: tuple[int, ...]) -> list[torch.Tensor]:
    twin = normalised()
    for seed in seeds:
        backward(twin, seed)
    return [parameter.grad for parameter in twin.parameters() if parameter.grad is not None]


def test_what_is_kept_and_brought_is_a_copy_and_counted(meter: Meter) -> None:
    host = HostMemory()
    with uncounted():
        waiting = torch.arange(12.0).reshape(6, 2)
    brought = [
        host.bring(waiting, CPU),
        host.bring(waiting, CPU, slice(1, 3)),
        host.bring(waiting, CPU, torch.tensor([5])),
    ]
    assert [tensor.tolist() for tensor in brought[1:]] == [[[2, 3], [4, 5]], [[10, 11]]]
    assert host.moved == 48 + 16 + 8
    live = meter.live
    kept = host.keep(brought[0])
    assert meter.live == live
    assert host.moved == 72 + 48
    brought[0].zero_()
    assert torch.equal(kept, waiting)
    assert waiting.any()


@pytest.mark.parametrize("gradients_at_once", [False, True])
def test_a_lent_module_is_on_the_device_in_the_block_alone(meter: Meter, gradients_at_once: bool) -> None:
    module, host = normalised(), HostMemory()
    storages = [tensor.data_ptr() for tensor in tensors(module)]
    expected = expected_gradients(module, seeds=(1, 2))
    before = meter.live
    with host.lend(tensors(module), CPU, gradients_at_once):
        assert meter.live == before + bytes_of(tensors(module))
        for seed in (1, 2):
            backward(module, seed)
            there = [parameter.grad is not None for parameter in module.parameters()]
            assert there == ([False] * 3 if gradients_at_once else [True, True, False])
    assert meter.live == before
    assert [tensor.data_ptr() for tensor in tensors(module)] == storages
    found = [parameter.grad for parameter in module.parameters() if parameter.grad is not None]
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other)
    buffers, gradients = bytes_of([*module.buffers()]), bytes_of(expected)
    assert host.moved == bytes_of(tensors(module)) + buffers + gradients * (2 if gradients_at_once else 1)


def test_what_the_block_does_to_buffers_and_parameters_stays_done(meter: Meter) -> None:
    module, twin, host = normalised(), normalised(), HostMemory()

    def change(changed: nn.Module) -> None:
        with torch.no_grad():
            changed(torch.arange(12.0).reshape(2, 6))
            changed[0].weight.mul_(0.5)

    with host.lend(tensors(module), CPU):
        change(module)
    change(twin)
    assert int(module[0].num_batches_tracked) == 1
    for found, expected in zip(values(module), values(twin), strict=True):
        assert torch.equal(found, expected)


@pytest.mark.parametrize("gradients_at_once", [False, True])
def test_a_block_that_fails_leaves_everything_as_it_was(meter: Meter, gradients_at_once: bool) -> None:
    module, host = normalised(), HostMemory()
    before, live = values(module), meter.live
    with pytest.raises(ZeroDivisionError), host.lend(tensors(module), CPU, gradients_at_once):
        backward(module, 1)
        raise ZeroDivisionError
    assert meter.live == live
    assert all(parameter.grad is None for parameter in module.parameters())
    assert all(map(torch.equal, values(module), before))
    # And no hook is left that would take gradients away.
    backward(module, 1)
    assert module[0].weight.grad is not None


@pytest.mark.parametrize(("at_once", "sizes"), [(1, [1] * 5), (2, [2, 2, 1]), (5, [5]), (9, [5])])
def test_a_parameter_visits_in_groups_whose_gradients_are_added_up(
    meter: Meter, at_once: int, sizes: list[int]
) -> None:
    host = HostMemory()
    with uncounted():
        parameter = nn.Parameter(torch.arange(10.0).reshape(5, 2))
    for visit in (1, 2):
        seen = []
        for rows, group, gradient in host.visits(parameter, at_once, CPU, graded=True):
            seen.append(len(group))
            assert meter.live == group.nbytes + gradient.nbytes
            with uncounted():
                assert torch.equal(group, parameter.detach()[rows])
            gradient += visit * group
            del group, gradient
        assert seen == sizes
    with uncounted():
        assert torch.equal(parameter.grad, 3 * parameter.detach())
    assert meter.live == 0
    assert host.moved == 2 * 2 * parameter.nbytes
    for _, _, gradient in host.visits(parameter, at_once, CPU, graded=False):
        assert gradient is None
    assert host.moved == 5 * parameter.nbytes
