"""The simulated GPU refuses what CUDA refuses, counts what it would do, holds real values, and leaves nothing behind."""

import gc
from collections.abc import Callable

import numpy as np
import pytest
import torch
from simulated_gpu import CUBLAS_WORKSPACE, Counts, MixedDevices, SimulatedGPU
from torch import nn
from torch.utils.checkpoint import checkpoint
from torch_cuda import installed

T = torch.Tensor


@pytest.mark.parametrize(
    "mix",
    [
        lambda here, there: here + there,
        lambda here, there: torch.cat([here, there]),
        lambda here, there: here @ there,
        lambda here, there: here.add_(there),
        lambda here, there: there.add_(here),
        lambda here, there: torch.where(here > 0, here, there),
        lambda here, there: there[here > 0],
        lambda here, there: nn.functional.linear(here, there),
        lambda here, there: nn.GRU(3, 3)(here[None]),
        lambda here, there: torch.add(here, 1, out=there),
    ],
)
def test_tensors_of_the_host_beside_those_of_the_device_are_refused(
    gpu: SimulatedGPU, mix: Callable[[T, T], object]
) -> None:
    with pytest.raises(MixedDevices):
        mix(torch.ones(3, 3, device="cuda"), torch.ones(3, 3))


@pytest.mark.parametrize(
    "read",
    [lambda here: here.numpy(), lambda here: np.asarray(here), lambda here: setattr(torch.ones(3), "grad", here)],
)
def test_the_host_reads_nothing_of_the_device_by_itself(gpu: SimulatedGPU, read: Callable[[T], object]) -> None:
    with pytest.raises((TypeError, RuntimeError), match=r"cuda:0|different device"):
        read(torch.ones(3, device="cuda"))


def test_what_cuda_lets_through_is_let_through(gpu: SimulatedGPU) -> None:
    here, there = torch.arange(6.0, device="cuda"), torch.arange(6.0)
    assert (here * torch.tensor(2.0)).tolist() == [0, 2, 4, 6, 8, 10]
    assert here[torch.tensor([1, 3])].tolist() == [1, 3]
    here.copy_(there + 1)
    there.copy_(here)
    assert there.tolist() == [1, 2, 3, 4, 5, 6]


@pytest.mark.parametrize(
    "make",
    [
        lambda: torch.zeros(3, device="cuda"),
        lambda: torch.tensor([1.0, 2.0], device="cuda"),
        lambda: torch.as_tensor(np.arange(3), device=torch.device("cuda", 0)),
        lambda: torch.arange(3).to("cuda"),
        lambda: torch.arange(3).cuda(),
        lambda: torch.randn(3, device="cuda:0"),
        lambda: nn.Linear(2, 2, device="cuda").weight,
        lambda: nn.Linear(2, 2).to("cuda").weight,
        lambda: torch.empty(0, device="cuda"),
        lambda: torch.ones(2).to(torch.zeros(1, device="cuda")),
        lambda: torch.ones(2, device="cuda").to(torch.float16).t().new_zeros(3),
        lambda: torch.zeros_like(torch.ones(2, device="cuda")[1:]),
    ],
)
def test_tensors_say_that_they_lie_on_the_device(gpu: SimulatedGPU, make: Callable[[], T]) -> None:
    made = make()
    assert (made.device, made.is_cuda, made.get_device()) == (torch.device("cuda:0"), True, 0)
    assert made.cpu().device == made.to("cpu").device == torch.device("cpu")
    assert made.to("cuda") is made
    assert made.cpu().untyped_storage().data_ptr() != made.untyped_storage().data_ptr() or not made.numel()


def test_data_may_be_exchanged_between_the_places_as_parameters_do(gpu: SimulatedGPU) -> None:
    parameter = nn.Parameter(torch.arange(4.0))
    on_host = parameter.data
    parameter.data = on_host.to("cuda")
    assert parameter.is_cuda
    parameter.square().sum().backward()
    assert parameter.grad is not None and parameter.grad.is_cuda
    parameter.grad, parameter.data = None, on_host
    assert not parameter.is_cuda
    gc.collect()
    assert gpu.live == 0


def test_values_gradients_and_random_numbers_are_those_of_the_host(gpu: SimulatedGPU) -> None:
    layers = nn.Sequential(nn.Conv1d(2, 4, 3), nn.ReLU(), nn.Dropout(0.5), nn.Conv1d(4, 4, 3))
    recurrent, x = nn.GRU(4, 3, 2, batch_first=True), torch.randn(2, 2, 12)

    def step(device: str) -> list[np.ndarray]:
        modules = nn.ModuleList([layers, recurrent]).to(device)
        torch.manual_seed(3)  # both generators
        y = checkpoint(layers, x.to(device), use_reentrant=False)
        y = recurrent(y.transpose(1, 2))[0]
        y.square().mean().backward()
        found = [y, *(parameter.grad for parameter in modules.parameters())]
        modules.zero_grad()
        return [tensor.detach().cpu().numpy() for tensor in found]

    of_host, of_device = step("cpu"), step("cuda")
    for one, other in zip(of_host, of_device, strict=True):
        np.testing.assert_array_equal(one, other)


def test_the_device_draws_from_a_generator_of_its_own(gpu: SimulatedGPU) -> None:
    torch.default_generator.manual_seed(1)
    before = torch.default_generator.get_state()
    torch.cuda.default_generators[0].manual_seed(5)
    first = torch.rand(3, device="cuda").tolist()
    assert torch.equal(torch.default_generator.get_state(), before)
    state = torch.cuda.get_rng_state()
    with torch.random.fork_rng(devices=[torch.device("cuda", 0)]):
        torch.rand(7, device="cuda")
    assert torch.equal(torch.cuda.get_rng_state(), state)
    torch.cuda.manual_seed(5)
    assert torch.rand(3, device="cuda").tolist() == first


@pytest.mark.parametrize(
    ("work", "expected"),
    [
        (lambda here: here + 1, Counts(kernels=1)),
        (lambda here: here[1:].view(-1).detach(), Counts()),
        (lambda here: torch.empty_like(here), Counts()),
        (lambda here: here.sum().item(), Counts(kernels=1, to_host=1, waits=1)),
        (lambda here: bool((here > 0).all()), Counts(kernels=2, to_host=1, waits=1)),
        (lambda here: torch.ones(3).to("cuda"), Counts(to_device=1, waits=1)),
        (lambda here: torch.ones(3).to("cuda", non_blocking=True), Counts(to_device=1, waits=1)),
        (lambda here: torch.ones(3).pin_memory().to("cuda", non_blocking=True), Counts(to_device=1)),
        (lambda here: here.cpu(), Counts(to_host=1, waits=1)),
        (lambda here: here.to("cpu", non_blocking=True), Counts(to_host=1)),
        (lambda here: here.tolist(), Counts(to_host=1, waits=1)),
        (lambda here: here[torch.tensor([0])], Counts(kernels=1, to_device=1, waits=1)),
        (lambda here: here.nonzero(), Counts(kernels=1, waits=1)),
        (lambda here: torch.cuda.synchronize(), Counts(waits=1)),
    ],
)
def test_kernels_copies_and_waits_are_counted(gpu: SimulatedGPU, work: Callable[[T], object], expected: Counts) -> None:
    here = torch.arange(4.0, device="cuda")
    gpu.counts = Counts()
    work(here)
    assert gpu.counts == expected


def test_a_recurrent_layer_is_one_kernel_each_way(gpu: SimulatedGPU) -> None:
    gru, x = nn.GRU(4, 4, batch_first=True).to("cuda"), torch.randn(2, 50, 4, device="cuda")
    state = torch.zeros(1, 2, 4, device="cuda")
    gpu.counts = Counts()
    outputs, _ = gru(x, state)
    assert gpu.counts == Counts(kernels=1)
    gradient = torch.ones_like(outputs)
    gpu.counts = Counts()
    outputs.backward(gradient)
    assert gpu.counts.kernels <= 1 + len([*gru.parameters()])  # each gradient may be copied where it is kept
    assert len({parameter.untyped_storage()._cdata for parameter in gru.parameters()}) == 1


def test_cudnn_drops_out_by_a_state_of_its_own_that_stays(gpu: SimulatedGPU) -> None:
    lstm, x = nn.LSTM(4, 4, 2, dropout=0.5).to("cuda"), torch.randn(5, 2, 4, device="cuda")

    def output() -> T:
        return lstm(x)[0].detach()

    torch.cuda.manual_seed(1)
    before = torch.cuda.memory_allocated()
    first = output()
    assert torch.cuda.memory_allocated() > before + 2 * 2**20
    state = torch.cuda.get_rng_state()
    second = output()
    assert not torch.equal(first, second)
    torch.cuda.set_rng_state(state)
    assert not torch.equal(output(), second)  # though a generator of torch would draw the same
    torch.cuda.manual_seed(1)
    assert torch.equal(output(), first)
    with torch.backends.cudnn.flags(enabled=False):
        torch.cuda.set_rng_state(state)
        third = output()
        torch.cuda.set_rng_state(state)
        assert torch.equal(output(), third)


def test_memory_is_what_the_allocator_has_for_tensors_that_live(gpu: SimulatedGPU) -> None:
    total = 4 * 2**30
    assert torch.cuda.mem_get_info() == (total - 400 * 2**20, total)
    x = torch.zeros(1000, device="cuda")
    view, large = x[10:], torch.empty(3 * 2**20, dtype=torch.uint8, device="cuda")
    del x
    assert torch.cuda.memory_allocated() == 4096 + 3 * 2**20
    assert torch.cuda.memory_reserved() == 22 * 2**20
    assert torch.cuda.mem_get_info()[0] == total - 422 * 2**20
    del view, large
    assert (torch.cuda.memory_allocated(), torch.cuda.max_memory_allocated()) == (0, 4096 + 3 * 2**20)
    torch.cuda.reset_peak_memory_stats()
    torch.cuda.empty_cache()
    assert (torch.cuda.memory_reserved(), torch.cuda.max_memory_allocated()) == (0, 0)
    assert torch.cuda.max_memory_reserved() == 22 * 2**20


def test_a_storage_that_grows_is_counted_anew(gpu: SimulatedGPU) -> None:
    x = torch.empty(0, device="cuda")
    torch.add(torch.ones(1000, device="cuda"), 1, out=x)
    assert torch.cuda.memory_allocated() == 4096
    x.resize_(2000)
    assert torch.cuda.memory_allocated() == 8192


def test_a_fraction_of_the_card_is_a_cap(gpu: SimulatedGPU) -> None:
    torch.cuda.set_per_process_memory_fraction(0.01, 0)
    held = torch.empty(20 * 2**20, dtype=torch.uint8, device="cuda")
    with pytest.raises(torch.OutOfMemoryError, match="CUDA out of memory"):
        torch.empty(22 * 2**20, dtype=torch.uint8, device="cuda")
    del held
    assert len(torch.empty(22 * 2**20, dtype=torch.uint8, device="cuda"))


def test_matrix_products_take_a_workspace_that_stays_until_it_is_cleared(gpu: SimulatedGPU) -> None:
    x = torch.ones(8, 8, device="cuda", requires_grad=True)
    before = torch.cuda.memory_allocated()
    loss = (x @ x).sum()
    del loss
    assert torch.cuda.memory_allocated() == before + CUBLAS_WORKSPACE
    (x @ x).sum().backward()
    x.grad = None
    assert torch.cuda.memory_allocated() == before + 2 * CUBLAS_WORKSPACE
    torch._C._cuda_clearCublasWorkspaces()
    assert torch.cuda.memory_allocated() == before


def test_nothing_is_left_behind() -> None:
    def state() -> dict[str, object]:
        places = {"Tensor": torch.Tensor, "cuda": torch.cuda, "C": torch._C, "torch": torch, "VF": torch._VF}
        found = {f"{name}.{key}": value for name, place in places.items() for key, value in vars(place).items()}
        return {key: value for key, value in found.items() if not key.startswith("cuda.__")}

    before = state()
    with installed(SimulatedGPU()):
        survivor = torch.ones(3, device="cuda")
        assert torch.cuda.is_available()
    assert not torch.cuda.is_available()
    assert not torch.cuda.is_initialized()
    after = state()
    assert [key for key in before | after if before.get(key) is not after.get(key)] == []
    assert survivor.device == torch.device("cpu")
    assert (survivor + torch.ones(3)).tolist() == [2, 2, 2]
    with pytest.raises((RuntimeError, AssertionError)):
        torch.zeros(1, device="cuda")


def test_the_next_one_begins_empty() -> None:
    for _ in range(2):
        with installed(SimulatedGPU()):
            assert torch.cuda.memory_allocated() == torch.cuda.max_memory_reserved() == 0
            torch.ones(3, 3, device="cuda").mm(torch.ones(3, 3, device="cuda"))
