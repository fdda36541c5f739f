"""Several processes that train one stage together, each with a device of its own and a share of every batch.

They hold the same weights and stay equal to the bit: whatever could round differently on two devices is broadcast from the
first rank. A process alone is rank 0 of 1 and exchanges nothing.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from layerwise.errors import LayerwiseError, ToldElsewhere
from layerwise.memory.meter import uncounted

T = TypeVar("T")


class LostRank(LayerwiseError):
    """Another process of this run has ended, or does not answer."""


@dataclass(frozen=True, slots=True)
class Ranks:
    """This process among those of the run. Every method but `share` is called by all of them, in the same order."""

    rank: int = 0
    count: int = 1
    between_gpus: "dist.ProcessGroup | None" = None
    """What exchanges tensors of GPUs, on GPUs: the other group would copy them to the host."""

    @property
    def first(self) -> bool:
        """Whether this is the one that writes and tells."""
        return self.rank == 0

    def share(self, samples: int, rank: int | None = None) -> slice:
        """The samples of a batch that are this rank's, or another's; as np.array_split cuts them, so some may have none."""
        rank = self.rank if rank is None else rank
        each, more = divmod(samples, self.count)
        return slice(rank * each + min(rank, more), (rank + 1) * each + min(rank + 1, more))

    def gather_rows(self, own: torch.Tensor, places: Sequence[slice]) -> torch.Tensor:
        """Rows (R, ...) of all ranks, one after another; `places` says which rows are whose. Without gradients."""
        whole = own.new_empty(places[-1].stop, *own.shape[1:])
        whole[places[self.rank]] = own.detach()
        # One broadcast each: shares differ in length, which gathering in one call does not take everywhere.
        with uncounted():
            parts = [(whole[rows], rank) for rank, rows in enumerate(places) if rows.start < rows.stop]
        if own.is_cuda:
            # Between GPUs the host does not wait, so nobody would notice there that another rank has ended.
            self.barrier()
        _exchange(lambda: _wait([self._broadcast(part, rank) for part, rank in parts]))
        return whole

    def all_reduce(self, tensors: Iterable[torch.Tensor]) -> None:
        """Puts the sum over all ranks into each tensor."""
        if self.count > 1:
            _exchange(
                lambda: _wait([dist.all_reduce(tensor, group=self._group(tensor), async_op=True) for tensor in tensors])
            )

    def broadcast(self, tensors: Iterable[torch.Tensor]) -> None:
        """Puts the first rank's values into each tensor."""
        if self.count > 1:
            _exchange(lambda: _wait([self._broadcast(tensor, 0) for tensor in tensors]))

    def _broadcast(self, tensor: torch.Tensor, rank: int) -> Any:
        return dist.broadcast(tensor, rank, group=self._group(tensor), async_op=True)

    def _group(self, tensor: torch.Tensor) -> "dist.ProcessGroup | None":
        return self.between_gpus if tensor.is_cuda else None

    def any(self, flag: bool) -> bool:
        """Whether it is true on any rank."""
        if self.count == 1:
            return flag
        with uncounted():
            found = torch.tensor([int(flag)])
        _exchange(lambda: _wait([dist.all_reduce(found, dist.ReduceOp.MAX, async_op=True)]))
        return bool(found.item())

    def barrier(self) -> None:
        """Returns once all ranks have called it."""
        self.any(False)

    def all_gather(self, value: T) -> list[T]:
        """The value of each rank; small values that can be pickled."""
        if self.count == 1:
            return [value]
        found: list[Any] = [None] * self.count
        _exchange(lambda: dist.all_gather_object(found, value))
        return found

    def broadcast_object(self, value: T | None = None) -> T:
        """The value of the first rank; the others give None."""
        return self.all_gather(value if self.first else None)[0]  # type: ignore[return-value]

    def wait_for_first(self, work: Callable[[], None]) -> None:
        """The first rank works while the others wait. Where it fails, the others raise ToldElsewhere."""
        failed: LayerwiseError | None = None
        if self.first:
            try:
                work()
            except LayerwiseError as error:
                failed = error
        told = self.broadcast_object(None if failed is None else (str(failed), failed.exit_code))
        if failed is not None:
            raise failed
        if told is not None:
            raise ToldElsewhere(*told)


ALONE = Ranks()


def _wait(works: list[Any]) -> None:
    for work in works:
        work.wait()


def _exchange(exchange: Callable[[], None]) -> None:
    """Raises LostRank where another rank is gone or silent."""
    try:
        with uncounted():
            exchange()
    except RuntimeError as error:
        reason = str(error).splitlines()[0]
        raise LostRank(
            f"Another process of this run has ended, or does not answer ({reason}); what it says itself tells why. Start the "
            "same command again to go on."
        ) from None
