"""Lets torch take a simulated GPU for cuda:0, for as long as a block lasts."""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import pytest
import torch
import torch._dynamo  # torch 2.9 cannot import it where attributes of tensors are ours
from recurrent_layers import use_recurrent_layers
from simulated_gpu import CPU, GPU, MixedDevices, SimulatedGPU
from streams import Event, Stream
from torch.utils._device import _device_constructors

from layerwise.memory import driver, meter, rates

T = torch.Tensor


class Properties:
    """What torch.cuda.get_device_properties gives."""

    name = "Simulated GPU"
    uuid = "00000000-0000-0000-0000-000000000000"
    multi_processor_count = 1

    def __init__(self, gpu: SimulatedGPU) -> None:
        self.total_memory = gpu.total
        self.major, self.minor = gpu.capability


@contextmanager
def installed(gpu: SimulatedGPU) -> Iterator[SimulatedGPU]:
    """Inside, the GPU is torch's cuda:0. Behind the block all is as it was; tensors that outlive it lie on the host."""
    with pytest.MonkeyPatch.context() as patch:
        _use_tensors(gpu, patch)
        _use_device(gpu, patch)
        use_recurrent_layers(gpu, patch)
        # What the package does beside its meter the device still sees: on a real one no mode is in between.
        patch.setattr(meter, "_disable_current_modes", gpu.alone)
        patch.setattr(driver, "CARDS", {})
        patch.setattr(rates, "RATES", {})
        with gpu:
            yield gpu
        gpu.raise_faults()


def _use_tensors(gpu: SimulatedGPU, patch: pytest.MonkeyPatch) -> None:
    """What tensors say of themselves, and how they get from one place to the other."""
    holds = gpu.holds
    own = {name: getattr(T, name) for name in ("device", "grad", "is_cuda", "is_cpu")}
    to, numpy, as_array, to_list = T.to, T.numpy, T.__array__, T.tolist
    get_device, set_grad = T.get_device, own["grad"].__set__

    def set_gradient(tensor: T, gradient: T | None) -> None:
        if gradient is not None and holds(gradient) != holds(tensor):
            raise MixedDevices("assigned grad has data located on a different device")
        set_grad(tensor, gradient)

    def moved(tensor: T, *args: Any, **kwargs: Any) -> T:
        place, how = _place_of(args, kwargs)
        if place is None:
            return to(tensor, *args, **kwargs)
        here = holds(tensor)
        if place.type == "cuda":
            return to(tensor, **how) if here else to(tensor, GPU, **how)
        if here and place.type == "cpu":
            with gpu.copying_to_host():
                return to(tensor, CPU, **{**how, "copy": True})
        return to(tensor, place, **how)

    def pinned(tensor: T, *args: object) -> T:
        if holds(tensor):
            raise RuntimeError("cannot pin 'torch.cuda.FloatTensor' only dense CPU tensors can be pinned")
        copy = tensor.clone()
        gpu.pin(copy)
        return copy

    def unreadable(read: Callable[..., Any]) -> Callable[..., Any]:
        def checked(tensor: T, *args: Any, **kwargs: Any) -> Any:
            if holds(tensor):
                raise TypeError(
                    "can't convert cuda:0 device type tensor to numpy. Use Tensor.cpu() to copy the tensor to host memory "
                    "first."
                )
            gpu.check_seen(tensor)
            return read(tensor, *args, **kwargs)

        return checked

    def as_list(tensor: T) -> Any:
        gpu.check_seen(tensor)
        return to_list(moved(tensor, CPU))

    replaced = {
        "device": property(lambda tensor: GPU if holds(tensor) else own["device"].__get__(tensor)),
        "is_cuda": property(lambda tensor: holds(tensor) or own["is_cuda"].__get__(tensor)),
        "is_cpu": property(lambda tensor: not holds(tensor) and own["is_cpu"].__get__(tensor)),
        "grad": property(own["grad"].__get__, set_gradient, own["grad"].__delete__),
        "get_device": lambda tensor: 0 if holds(tensor) else get_device(tensor),
        "to": moved,
        "cuda": lambda tensor, *_, non_blocking=False: moved(tensor, GPU, non_blocking=non_blocking),
        "cpu": lambda tensor: moved(tensor, CPU),
        "type_as": lambda tensor, other: moved(tensor, other),
        "numpy": unreadable(numpy),
        "__array__": unreadable(as_array),
        "tolist": as_list,
        "pin_memory": pinned,
        "is_pinned": lambda tensor, *_: gpu.is_pinned(tensor),
    }
    for name, value in replaced.items():
        patch.setattr(T, name, value, raising=False)
    for name in ("tensor", "as_tensor"):  # both copy past all modes
        patch.setattr(torch, name, _copied_afterwards(getattr(torch, name)))
    _device_constructors()  # torch looks for them once, and is to find its own
    patch.setattr(torch, "empty", _pinned_by(gpu, torch.empty))


def _of_cpu(ask: Callable[[str], Any]) -> Callable[[str], Any]:
    return lambda kind: ask("cpu" if kind == "cuda" else kind)


def _copied_afterwards(make: Callable[..., T]) -> Callable[..., T]:
    def made(data: Any, *args: Any, device: Any = None, **kwargs: Any) -> T:
        if device is None or torch.device(device).type != "cuda":
            return make(data, *args, **kwargs, device=device)
        needs_gradient = kwargs.pop("requires_grad", False)
        on_host = data if isinstance(data, T) else make(data, *args, **kwargs)
        return on_host.to(device, kwargs.get("dtype")).requires_grad_(needs_gradient)

    return made


def _pinned_by(gpu: SimulatedGPU, empty: Callable[..., T]) -> Callable[..., T]:
    def made(*args: Any, pin_memory: bool = False, **kwargs: Any) -> T:
        tensor = empty(*args, **kwargs)
        if pin_memory:
            gpu.pin(tensor)
        return tensor

    return made


def _place_of(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[torch.device | None, dict[str, Any]]:
    """Where `Tensor.to` is to go with these arguments, None: nowhere; and its other arguments by name."""
    how, flags = dict(kwargs), ["non_blocking", "copy"]
    place = how.pop("device", None)
    for value in (*args, how.pop("other", None)):
        if isinstance(value, T):
            place, how["dtype"] = value.device, value.dtype
        elif isinstance(value, str | torch.device | int) and not isinstance(value, bool):
            place = value
        elif isinstance(value, torch.dtype):
            how["dtype"] = value
        elif isinstance(value, bool):
            how[flags.pop(0)] = value
    if isinstance(place, int):
        place = f"cuda:{place}"
    return (None if place is None else torch.device(place)), how


def _use_device(gpu: SimulatedGPU, patch: pytest.MonkeyPatch) -> None:
    """torch.cuda and what it asks of C++."""
    allocator = gpu.allocator

    def set_fraction(fraction: float, _: int) -> None:
        allocator.allowed = min(int(fraction * gpu.total), allocator.most)

    def set_allocator(settings: str) -> None:
        allocator.expandable = settings == "expandable_segments:True"

    def statistics(_: int) -> dict[str, Any]:
        figures = allocator.figures
        nested: dict[str, Any] = {
            name: {"all": {"current": figure.current, "peak": figure.peak}} for name, figure in figures.each().items()
        }
        return {**nested, "num_alloc_retries": figures.num_alloc_retries, "num_ooms": figures.num_ooms}

    def use_stream(stream: Stream | None) -> AbstractContextManager[None]:
        return nullcontext() if stream is None else gpu.streams.using(stream)

    class Autocast(torch.autocast):
        """The CPU's lists of operations stand for those of CUDA."""

        def __init__(self, device_type: str, *args: Any, **kwargs: Any) -> None:
            super().__init__("cpu" if device_type == "cuda" else device_type, *args, **kwargs)

    for name, value in {
        "_initialized": True,
        "is_available": lambda: True,
        "device_count": lambda: 1,
        "init": lambda: None,
        "synchronize": lambda _=None: gpu.streams.wait(),
        "Stream": lambda *_, **__: Stream(gpu.streams),
        "Event": lambda **how: Event(gpu.streams, **how),
        "stream": use_stream,
        "current_stream": lambda _=None: gpu.streams.current,
        "default_stream": lambda _=None: gpu.streams.default,
        "mem_get_info": lambda _=None: (gpu.free, gpu.total),
        "_get_device_properties": lambda _: Properties(gpu),
        "default_generators": (gpu.generator,),
        "_exchange_device": lambda _: 0,
        "_maybe_exchange_device": lambda _: 0,
        "is_current_stream_capturing": lambda: False,
    }.items():
        patch.setattr(torch.cuda, name, value, raising=False)
    for name, value in {
        "getDevice": lambda: 0,
        "setDevice": lambda _: None,
        "memoryStats": statistics,
        "resetPeakMemoryStats": lambda _: allocator.reset_peak(),
        "emptyCache": allocator.release,
        "setMemoryFraction": set_fraction,
        "getMemoryFraction": lambda _: allocator.allowed / gpu.total,
        "clearCublasWorkspaces": gpu.clear_workspaces,
    }.items():
        patch.setattr(torch._C, f"_cuda_{name}", value, raising=False)
    patch.setattr(torch._C, "_accelerator_setAllocatorSettings", set_allocator, raising=False)
    patch.setattr(torch.cuda.random, "device_count", lambda: 1)
    patch.setattr(torch.accelerator, "is_available", lambda: True)
    for name in ("is_autocast_enabled", "get_autocast_dtype"):
        patch.setattr(torch, name, _of_cpu(getattr(torch, name)))
    patch.setattr(torch, "autocast", Autocast)
    patch.setattr(torch.amp, "autocast", Autocast)
