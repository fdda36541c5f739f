"""The simulated GPU finds where one stream uses what another one may still be writing, reading or about to lose."""

from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
from simulated_gpu import Counts, SimulatedGPU
from streams import Event, Race, Stream

T = torch.Tensor


@dataclass
class Copied:
    """A copy on a stream of its own, from pinned memory to the device."""

    source: T
    there: T
    stream: Stream
    done: Event


@pytest.fixture
def copied(gpu: SimulatedGPU) -> Copied:
    source = torch.arange(4.0).pin_memory()
    there, stream = torch.empty(4, device="cuda"), torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        there.copy_(source, non_blocking=True)
    return Copied(source, there, stream, stream.record_event())


WAITS: dict[str, Callable[[Copied], object]] = {
    "the stream, for the event": lambda copied: torch.cuda.current_stream().wait_event(copied.done),
    "the stream, for the stream": lambda copied: torch.cuda.current_stream().wait_stream(copied.stream),
    "the host, for the event": lambda copied: copied.done.synchronize(),
    "the host, for the stream": lambda copied: copied.stream.synchronize(),
    "the host, for the device": lambda copied: torch.cuda.synchronize(),
}
USES: dict[str, Callable[[T], object]] = {
    "read": lambda there: there + 1,
    "written": lambda there: there.zero_(),
    "seen by the host": lambda there: there.tolist(),
    "read through a view": lambda there: there[1:].view(3, 1).sum(),
}


@pytest.mark.parametrize("use", USES)
def test_what_another_stream_writes_is_used_only_behind_a_wait(copied: Copied, use: str) -> None:
    with pytest.raises(Race, match="has not waited for stream 1"):
        USES[use](copied.there)
    torch.cuda.current_stream().wait_event(copied.done)
    USES[use](copied.there)


@pytest.mark.parametrize("wait", WAITS)
def test_every_kind_of_wait_will_do(copied: Copied, wait: str) -> None:
    WAITS[wait](copied)
    assert (copied.there + 1).tolist() == [1, 2, 3, 4]


def test_an_event_says_nothing_of_what_comes_behind_it(copied: Copied) -> None:
    with torch.cuda.stream(copied.stream):
        copied.there.add_(1)
    torch.cuda.current_stream().wait_event(copied.done)
    with pytest.raises(Race):
        copied.there.sum()


def test_fresh_memory_is_written_by_another_stream_only_behind_its_own(gpu: SimulatedGPU) -> None:
    source, stream = torch.arange(4.0).pin_memory(), torch.cuda.Stream()
    torch.ones(4, device="cuda").add_(1)  # its memory is what the next tensor gets
    there = torch.empty(4, device="cuda")
    with torch.cuda.stream(stream), pytest.raises(Race, match="stream 1, which has not waited for stream 0"):
        there.copy_(source, non_blocking=True)


def test_what_another_stream_reads_is_not_written_before(gpu: SimulatedGPU) -> None:
    here, host, stream = torch.ones(4, device="cuda"), torch.empty(4, pin_memory=True), torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        host.copy_(here, non_blocking=True)
    here.sum()  # two may read
    with pytest.raises(Race):
        here.add_(1)
    torch.cuda.current_stream().wait_stream(stream)
    here.add_(1)


@pytest.mark.parametrize("read", [lambda host: host.numpy(), lambda host: host + 1, lambda host: host[1:].tolist()])
def test_the_host_reads_what_comes_down_only_when_it_has_waited(gpu: SimulatedGPU, read: Callable[[T], object]) -> None:
    here, host = torch.ones(4, device="cuda"), torch.empty(4, pin_memory=True)
    gpu.counts = Counts()
    host.copy_(here, non_blocking=True)
    assert gpu.counts == Counts(to_host=1)
    with pytest.raises(Race, match="by the host"):
        read(host)
    torch.cuda.current_stream().synchronize()
    assert gpu.counts.waits == 1
    read(host)


def test_memory_is_let_go_of_only_when_no_other_stream_uses_it(copied: Copied, gpu: SimulatedGPU) -> None:
    del copied.there
    with pytest.raises(Race, match="let go of"):
        torch.ones(4, device="cuda")


def test_memory_that_was_waited_for_is_let_go_of(copied: Copied, gpu: SimulatedGPU) -> None:
    torch.cuda.current_stream().wait_event(copied.done)
    del copied.there
    torch.ones(4, device="cuda")


def test_memory_is_asked_for_on_one_stream_alone(gpu: SimulatedGPU) -> None:
    with torch.cuda.stream(torch.cuda.Stream()), pytest.raises(Race, match="memory is asked for"):
        torch.ones(4, device="cuda")


def test_what_is_not_contiguous_is_not_copied_on_a_stream_of_its_own(gpu: SimulatedGPU) -> None:
    here, host, stream = torch.ones(4, 3, device="cuda"), torch.empty(3, 4, pin_memory=True), torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream), pytest.raises(Race, match="memory is asked for"):
        host.copy_(here.t(), non_blocking=True)
    torch.cuda.current_stream().wait_stream(stream)
    host.copy_(here.t())
