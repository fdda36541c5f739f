"""Streams and events of the simulated GPU: what is queued on two of them has no order, unless one has waited for the other.

Everything is computed at once and in order, so that nothing goes wrong here that would on a GPU. Therefore it is noted which
stream has last written what, and who has read it since; `Race` is raised where a later use has waited for neither. A stream
knows of the others what it has waited for, and so does the host, which passes on what it knows with all that it queues.

Not modelled: memory that is asked for on a stream of its own (`Race` too, since the model of the allocator has one), and
`Tensor.record_stream`, without which memory may be let go of only when the stream that asked for it has waited for all others.
Pinned memory that the host writes into while it is copied from is not seen.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

Known = dict[int, int]
"""Of each stream, by its number: how much of what was queued on it is known to come first."""


class Race(RuntimeError):
    """Something that CUDA does with half of the values, and says nothing of."""


@dataclass(slots=True)
class Uses:
    """Who has used a storage, and when: numbers of streams, and how much had been queued on them then."""

    written: tuple[int, int] = (0, 0)
    read: Known = field(default_factory=dict)


def _learn(known: Known, other: Known) -> None:
    for stream, queued in other.items():
        known[stream] = max(queued, known.get(stream, 0))


class Streams:
    """All of a device, and the host."""

    def __init__(self, host_waits: Callable[[], None]) -> None:
        """host_waits: is called when the host waits."""
        self.host: Known = {}
        """What the host has waited for."""
        self.host_waits = host_waits
        self.made: list[Stream] = []
        self.default = self.current = Stream(self)
        self.faults: list[str] = []
        """Found where no error can be raised."""

    @contextmanager
    def using(self, stream: "Stream") -> Iterator[None]:
        """Inside, all is queued on this stream."""
        outer, self.current = self.current, stream
        try:
            yield
        finally:
            self.current = outer

    def queue(self) -> None:
        """One more operation of the device, on the stream in use."""
        stream = self.current
        _learn(stream.known, self.host)
        stream.known[stream.number] = stream.known.get(stream.number, 0) + 1

    def use(self, uses: Uses, writes: bool) -> None:
        """By the operation that was queued last. Raises Race."""
        known, number = self.current.known, self.current.number
        self.check(uses, known, number, writes, "is used")
        if writes:
            uses.written, uses.read = (number, known[number]), {}
        else:
            uses.read[number] = known[number]

    def check(self, uses: Uses, known: Known, who: int, with_reads: bool, what: str) -> None:
        """Raises Race where a use by another stream is not known to have come first."""
        for stream, queued in (uses.written, *(uses.read.items() if with_reads else ())):
            if stream != who and known.get(stream, 0) < queued:
                by = "the host" if who < 0 else f"stream {who}"
                raise Race(f"a tensor {what} by {by}, which has not waited for stream {stream}, where it was used last")

    def check_known_to_host(self, uses: Uses) -> None:
        """Before the host reads what a stream has written. Raises Race."""
        self.check(uses, self.host, -1, False, "is read")

    def begin(self) -> Uses:
        """Of memory that the stream in use has asked for: what lay there before it has used until now."""
        if self.current is not self.default:
            raise Race(
                f"memory is asked for on stream {self.current.number}, and the model of the allocator has one stream"
            )
        return Uses((self.default.number, self.default.known.get(self.default.number, 0)))

    def end(self, uses: Uses) -> None:
        """Of memory that is let go of: the stream that has asked for it may use it again at once."""
        known = dict(self.default.known)
        _learn(known, self.host)
        try:
            self.check(uses, known, self.default.number, True, "is let go of")
        except Race as race:
            self.faults.append(str(race))

    def wait(self) -> None:
        """The host waits for all."""
        self.host_waits()
        for stream in self.made:
            _learn(self.host, stream.known)


class Stream:
    """As torch.cuda.Stream."""

    def __init__(self, of: Streams) -> None:
        self.of, self.number, self.known = of, len(of.made), {}
        of.made.append(self)

    def wait_stream(self, other: "Stream") -> None:
        self.wait_event(other.record_event())

    def wait_event(self, event: "Event") -> None:
        _learn(self.known, event.known)

    def record_event(self, event: "Event | None" = None) -> "Event":
        event = event or Event(self.of)
        event.record(self)
        return event

    def synchronize(self) -> None:
        self.record_event().synchronize()


class Event:
    """As torch.cuda.Event."""

    def __init__(self, of: Streams, **_: Any) -> None:
        self.of = of
        self.known: Known = {}

    def record(self, stream: Stream | None = None) -> None:
        stream = stream or self.of.current
        self.known = dict(stream.known)
        _learn(self.known, self.of.host)

    def wait(self, stream: Stream | None = None) -> None:
        (stream or self.of.current).wait_event(self)

    def synchronize(self) -> None:
        self.of.host_waits()
        _learn(self.of.host, self.known)

    def query(self) -> bool:
        return True
