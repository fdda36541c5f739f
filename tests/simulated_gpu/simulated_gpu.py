"""A CUDA device that is none: its tensors are ordinary ones of the CPU with real values, of which is noted that they lie there.

What is noted hangs on the storage, so views, parameters whose data are exchanged and what a backward pass makes need nothing
of their own. A dispatch mode sees each operation: it refuses tensors of the host beside those of the device, notes where
results lie, asks the model of the allocator for their bytes, and counts kernels, copies and waits. `torch_cuda.py` lets torch
say what lies where, and answer for the device.

Of several streams it says where one has not waited for another (`streams.py`).

What it cannot show: the values and the order of real kernels, CUDA's own lists of autocast, workspaces of cuDNN, time.
Bytes of a result are asked for when it has been computed; without room it is thrown away. Numbers of the host (tensors
without dimensions) are let through beside any tensor of the device. `new_zeros` and the like with device="cpu" beside a tensor
of the device are taken to mean the device, for that is how torch's C++ says it.
"""

import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import torch
from counted_allocator import CountedAllocator
from streams import Race, Streams, Uses
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_iter

from layerwise.memory.caching_allocator import Block

GPU = torch.device("cuda", 0)
CPU = torch.device("cpu")
aten = torch.ops.aten

TAKES_EITHER = {
    aten.index.Tensor: (1,),
    aten.index_put_.default: (1,),
    aten._index_put_impl_.default: (1,),
    aten.copy_.default: (0, 1),
    aten._to_copy.default: (0,),
}
"""Operations of the device that take tensors of the host, and at which arguments."""

WAITS = {
    aten._local_scalar_dense,
    aten.equal,
    aten.masked_select,
    aten.nonzero,
    aten.repeat_interleave,
    aten._unique2,
    aten.unique_dim,
    aten.unique_consecutive,
}
"""What the host must know the result of before it goes on."""

NO_KERNEL = {aten.empty, aten.empty_like, aten.empty_strided, aten.new_empty, aten.new_empty_strided}
"""What makes a storage and writes nothing."""

MATRIX_PRODUCTS = {aten.mm, aten.addmm, aten.addmm_, aten.bmm, aten.baddbmm, aten.baddbmm_, aten.mv, aten.addmv}

CUBLAS_WORKSPACE, ON_HOPPER = (2 * 4096 + 8 * 16) * 2**10, 32 * 2**20
"""Bytes of the allocator that torch gives cuBLAS before compute capability 9 and from there on, to each of two threads: the one
that calls, and that of the backward pass (aten/src/ATen/cuda/CublasHandlePool.cpp)."""


class MixedDevices(RuntimeError):
    """What torch says of an operation with tensors of the host beside those of the device."""


@dataclass(slots=True)
class Counts:
    """Since they were last set to zero."""

    kernels: int = 0
    """Operations that write; a view is none."""
    to_device: int = 0
    """Copies from the host."""
    to_host: int = 0
    waits: int = 0
    """How often the host waits for the device: copies in pageable memory, values that it reads, synchronize()."""
    bytes_to_device: int = field(default=0, compare=False)


@dataclass(slots=True)
class _Held:
    """A storage of the device."""

    storage: weakref.ref
    size: int
    block: Block | None
    uses: Uses


@dataclass(slots=True)
class _Pinned:
    """A storage of the host that the device reads and writes by itself."""

    storage: weakref.ref
    uses: Uses


@cache
def _written(func: Any) -> frozenset[object]:
    """Positions and names of the arguments that an operation writes into."""
    named = enumerate(func._schema.arguments)
    writes = [(at, each.name) for at, each in named if each.alias_info is not None and each.alias_info.is_write]
    return frozenset(name for pair in writes for name in pair)


class DeviceGenerator(torch.Generator):
    """Says whether it has been seeded anew, which cuDNN's recurrent layers ask."""

    seeded = True

    def manual_seed(self, seed: int) -> torch.Generator:
        self.seeded = True
        return super().manual_seed(seed)

    def set_state(self, state: torch.Tensor) -> torch.Generator:
        self.seeded = True
        return super().set_state(state)


class SimulatedGPU(TorchDispatchMode):
    """The one device, cuda:0."""

    def __init__(
        self,
        total: int = 4 * 2**30,
        context: int = 400 * 2**20,
        others: int = 0,
        capability: tuple[int, int] = (8, 6),
    ) -> None:
        """Bytes of memory, of this process' context, and of other processes."""
        super().__init__()
        self.total, self.context, self.others, self.capability = total, context, others, capability
        self.allocator = CountedAllocator(total - context - others)
        self.counts = Counts()
        self.streams = Streams(self._count_wait)
        self.generator = self._drawn_from = DeviceGenerator()
        """Of what is drawn on the device."""
        self.recurrent_in: set[torch.dtype] = set()
        """What recurrent layers have been computed in."""
        self._held: dict[int, _Held] = {}
        self._pinned: dict[int, _Pinned] = {}
        self._unseen: set[int] = set()
        """Pinned storages that the device has written into since the host has last looked."""
        self._workspaces: dict[bool, Block | None] = {}
        """Of cuBLAS, forward and backward."""
        self._to_host = self._as_one_kernel = False

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        # Otherwise torch wraps every dispatch in a guard for its compiler.
        return False

    @property
    def free(self) -> int:
        """Bytes, as the driver has them."""
        return self.total - self.context - self.others - self.allocator.figures.reserved_bytes.current

    def holds(self, tensor: torch.Tensor) -> bool:
        """Whether the tensor lies on the device."""
        return tensor.layout is torch.strided and tensor.untyped_storage()._cdata in self._held

    @property
    def live(self) -> int:
        """Bytes of tensors on the device, without workspaces."""
        return sum(held.size for held in self._held.values())

    def put(self, tensor: torch.Tensor) -> None:
        """Notes that the tensor lies on the device, and asks for its bytes."""
        storage = tensor.untyped_storage()
        key, size = storage._cdata, storage.nbytes()
        held = self._held.get(key)
        if held is not None and held.size == size:
            return
        block = self.allocator.allocate(size)
        if held is not None:
            self.allocator.free(held.block)
        self._held[key] = _Held(weakref.ref(storage, lambda _: self._drop(key)), size, block, self.streams.begin())

    def _drop(self, key: int) -> None:
        held = self._held.pop(key)
        self.streams.end(held.uses)
        self.allocator.free(held.block)

    def pin(self, tensor: torch.Tensor) -> None:
        """Notes that a tensor of the host lies in pinned memory."""
        storage, pinned = tensor.untyped_storage(), self._pinned
        key = storage._cdata
        pinned[key] = _Pinned(weakref.ref(storage, lambda _: pinned.pop(key)), Uses())

    def is_pinned(self, tensor: torch.Tensor) -> bool:
        """Whether the tensor lies in pinned memory of the host."""
        return tensor.layout is torch.strided and tensor.untyped_storage()._cdata in self._pinned

    def check_seen(self, tensor: torch.Tensor) -> None:
        """Before the host reads a tensor of its own. Raises Race where the device may still be writing into it."""
        key = tensor.untyped_storage()._cdata if self._unseen and tensor.layout is torch.strided else None
        if key in self._unseen:
            if key in self._pinned:
                self.streams.check_known_to_host(self._pinned[key].uses)
            self._unseen.discard(key)

    def raise_faults(self) -> None:
        """Raises Race where memory was let go of too early."""
        if self.streams.faults:
            raise Race(self.streams.faults.pop())

    def clear_workspaces(self) -> None:
        """As torch._C._cuda_clearCublasWorkspaces does."""
        while self._workspaces:
            self.allocator.free(self._workspaces.popitem()[1])

    @contextmanager
    def copying_to_host(self) -> Iterator[None]:
        """What is copied inside is to lie on the host."""
        self._to_host = True
        try:
            yield
        finally:
            self._to_host = False

    @contextmanager
    def as_one_kernel(self) -> Iterator[None]:
        """What is done inside counts as one kernel, that of a library."""
        self.counts.kernels += 1
        outer, self._as_one_kernel = self._as_one_kernel, True
        try:
            yield
        finally:
            self._as_one_kernel = outer

    @contextmanager
    def drawing_from(self, generator: torch.Generator) -> Iterator[None]:
        """What is drawn inside comes from this generator."""
        outer, self._drawn_from = self._drawn_from, generator
        try:
            yield
        finally:
            self._drawn_from = outer

    @contextmanager
    def alone(self) -> Iterator[None]:
        """All other dispatch modes are off inside: of tensors on the host nobody counts anything, of the device it does."""
        with _disable_current_modes(), self:
            yield

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if self._unseen or self.streams.faults:
            self.raise_faults()
            self._check_all_seen(func, args)
        device = kwargs.get("device")
        to_device = device is not None and torch.device(device).type == "cuda"
        if not self._held and not to_device:  # most of what plans are made from
            return func(*args, **kwargs)
        on_device, on_host = self._places(func, args, kwargs)
        if not on_device and not to_device:
            return func(*args, **kwargs)
        if on_host and on_device:
            where, shape = on_host[0]
            raise MixedDevices(
                f"Expected all tensors to be on the same device, but argument {where} of {func}, {shape}, is on cpu, "
                "different from other tensors on cuda:0"
            )
        if to_device:
            kwargs = {**kwargs, "device": CPU}
        packet = func.overloadpacket
        if packet in MATRIX_PRODUCTS and not self._as_one_kernel:
            self._need_workspace()
        writes = not func.is_view and packet not in NO_KERNEL
        if writes:
            self._queue(func, args, kwargs)
        comes_to_host = writes and not self._count(packet, args, kwargs, on_device)
        result = self._run(func, args, kwargs)
        if not comes_to_host:
            for value in (result,) if isinstance(result, torch.Tensor) else tree_iter(result):
                if isinstance(value, torch.Tensor):
                    self.put(value)
        return result

    def _check_all_seen(self, func: Any, args: Any) -> None:
        """Of the arguments that are tensors of the host, unless the device itself is to work on them."""
        if func.is_view or any(isinstance(value, torch.Tensor) and self.holds(value) for value in args):
            return
        for value in tree_iter(args):
            if isinstance(value, torch.Tensor):
                self.check_seen(value)

    def _queue(self, func: Any, args: Any, kwargs: Any) -> None:
        """Queues an operation on the stream in use. Raises Race where it has not waited for what it uses."""
        self.streams.queue()
        written = _written(func)
        for where, value in (*enumerate(args), *kwargs.items()):
            for tensor in value if isinstance(value, list | tuple) else (value,):
                if isinstance(tensor, torch.Tensor) and tensor.layout is torch.strided:
                    key = tensor.untyped_storage()._cdata
                    place = self._held.get(key) or self._pinned.get(key)
                    if place is not None:
                        self.streams.use(place.uses, where in written)
                        if where in written and key in self._pinned:
                            self._unseen.add(key)

    def _places(self, func: Any, args: Any, kwargs: Any) -> tuple[bool, list[tuple[object, tuple[int, ...]]]]:
        """Whether any tensor lies on the device; and those of the host that may not lie beside it, with their shapes."""
        on_device, on_host = False, []
        either = TAKES_EITHER.get(func, ())
        for where, value in (*enumerate(args), *kwargs.items()):
            values = value if isinstance(value, list | tuple) else (value,)
            for tensor in values:
                if not isinstance(tensor, torch.Tensor):
                    continue
                if self.holds(tensor):
                    on_device = True
                elif tensor.dim() and where not in either:
                    on_host.append((where, tuple(tensor.shape)))
        return on_device, on_host

    def _count(self, packet: Any, args: Any, kwargs: Any, on_device: bool) -> bool:
        """Counts an operation that writes. Gives whether its results lie on the device."""
        counts = self.counts
        if packet is aten._to_copy:
            if self._to_host:
                counts.to_host += 1
                self._wait_unless(bool(kwargs.get("non_blocking")))
                return False
            if not on_device:
                self._count_to_device(args[0], kwargs.get("non_blocking", False))
                return True
        if packet is aten.copy_:
            into, source = args[:2]
            if self.holds(into) != self.holds(source) and not (
                into.is_contiguous() and source.is_contiguous() and into.dtype == source.dtype
            ):
                self.streams.begin()  # of what lies otherwise torch makes a contiguous copy first
            if not self.holds(into):
                counts.to_host += 1
                self._wait_unless(
                    self.is_pinned(into) and (args[2] if len(args) > 2 else kwargs.get("non_blocking", False))
                )
                return False
            if not self.holds(source):
                self._count_to_device(source, args[2] if len(args) > 2 else kwargs.get("non_blocking", False))
                return True
        if packet in (aten.index, aten.index_put_, aten._index_put_impl_):
            for index in args[1]:
                if index is not None and not self.holds(index):
                    self._count_to_device(index, False)
                elif index is not None and index.dtype in (torch.bool, torch.uint8):
                    self._wait_unless(False)
        self._wait_unless(packet not in WAITS)
        counts.to_host += packet is aten._local_scalar_dense
        counts.kernels += not self._as_one_kernel and packet is not aten._local_scalar_dense
        return True

    def _count_to_device(self, source: torch.Tensor, non_blocking: bool) -> None:
        self.counts.to_device += 1
        self.counts.bytes_to_device += source.nbytes
        self._wait_unless(non_blocking and self.is_pinned(source))

    def _wait_unless(self, goes_on: bool) -> None:
        """The host waits for the stream in use, unless it goes on at once."""
        if not goes_on:
            self.streams.current.record_event().synchronize()

    def _count_wait(self) -> None:
        self.counts.waits += 1

    def _need_workspace(self) -> None:
        backward = torch._C._current_graph_task_id() != -1
        if backward not in self._workspaces:
            self._workspaces[backward] = self.allocator.allocate(
                ON_HOPPER if self.capability >= (9, 0) else CUBLAS_WORKSPACE
            )

    def _run(self, func: Any, args: Any, kwargs: Any) -> Any:
        """Random numbers come from a generator of the device."""
        if torch.Tag.nondeterministic_seeded not in func.tags or kwargs.get("generator") is not None:
            return func(*args, **kwargs)
        of_host = torch.default_generator.get_state()
        torch.default_generator.set_state(self._drawn_from.get_state())
        try:
            return func(*args, **kwargs)
        finally:
            torch.Generator.set_state(self._drawn_from, torch.default_generator.get_state())
            torch.default_generator.set_state(of_host)
