"""What the GPU did in some steps of a run, and how often the host waited for it: from a trace of torch's profiler."""

import json
import tempfile
import time
from collections.abc import Iterable
from dataclasses import astuple, dataclass
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity

AT_THE_END = "cudaDeviceSynchronize"
WAITS = {AT_THE_END, "cudaStreamSynchronize", "cudaEventSynchronize", "cudaMemcpy", "cuStreamSynchronize"}


@dataclass(frozen=True, slots=True)
class Traced:
    """Of so many steps in a row."""

    steps: int = 0
    seconds: float = 0.0
    """By the clock."""
    busy: float = 0.0
    """Seconds in which a kernel ran."""
    kernels: int = 0
    copies: int = 0
    """Between host and device."""
    waits: int = 0
    """How often the host waited for the device."""

    def __add__(self, other: "Traced") -> "Traced":
        return Traced(*(mine + theirs for mine, theirs in zip(astuple(self), astuple(other), strict=True)))

    @classmethod
    def of(cls, events: Iterable[dict[str, Any]], steps: int, seconds: float) -> "Traced":
        """events: those of a Chrome trace; their times are microseconds."""
        kernels: list[tuple[float, float]] = []
        calls: list[tuple[float, str]] = []
        copies = 0
        for event in events:
            kind, name = event.get("cat"), event.get("name", "")
            if kind == "kernel":
                kernels.append((event["ts"], event["ts"] + event["dur"]))
            elif kind == "gpu_memcpy":
                copies += "DtoD" not in name
            elif kind in ("cuda_runtime", "cuda_driver"):
                calls.append((event["ts"], name))
        calls.sort()
        while calls and calls[-1][1] == AT_THE_END:  # of `Tracer.stop`, and of the profiler itself
            calls.pop()
        waits = sum(name in WAITS for _, name in calls)
        return cls(steps, seconds, _covered(kernels) / 1e6, len(kernels), copies, waits)


def _covered(spans: list[tuple[float, float]]) -> float:
    """The length of all spans together, where they overlap once."""
    covered, reached = 0.0, float("-inf")
    for start, end in sorted(spans):
        covered += max(end - max(start, reached), 0)
        reached = max(reached, end)
    return covered


class Tracer:
    """Between `start` and `stop` torch's profiler looks on, where it can see a GPU's kernels; the clock runs anyway."""

    def __init__(self) -> None:
        self._profile = None
        if ProfilerActivity.CUDA in torch.profiler.supported_activities():
            self._profile = torch.profiler.profile(activities=[ProfilerActivity.CUDA])

    def start(self) -> None:
        torch.cuda.synchronize()
        if self._profile:
            self._profile.start()
        self._started = time.perf_counter()

    def stop(self, steps: int) -> Traced:
        """steps: how many were taken since the start."""
        torch.cuda.synchronize()
        seconds = time.perf_counter() - self._started
        if not self._profile:
            return Traced(steps, seconds)
        self._profile.stop()
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "trace.json"
            self._profile.export_chrome_trace(str(path))
            events = json.loads(path.read_text(errors="replace"))["traceEvents"]
        return Traced.of(events, steps, seconds)
