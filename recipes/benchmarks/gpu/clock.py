"""Times a function on a device: the median of single calls, each on cold caches."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

_FLUSHED = 1 << 28  # bytes, more than the caches of a GPU hold
_RECORDING = 3  # calls before one is recorded


@dataclass(frozen=True)
class Clock:
    """Of one device.

    Attributes:
        device: whose time is taken.
        seconds: that one measurement takes, about.
        most: calls.
        warm: calls before them, that compile, load and warm up.
    """

    device: torch.device
    seconds: float = 0.3
    most: int = 100
    warm: int = 3

    @torch.no_grad()
    def milliseconds(self, function: Callable[[], Any], warm: int | None = None) -> float:
        """The median of calls after some that compile, load and warm up; at least one call is timed."""
        for _ in range(self.warm if warm is None else warm):
            function()
        took: list[float] = []
        once = self._cuda if self.device.type == "cuda" else self._host
        began = time.perf_counter()
        while not took or (len(took) < self.most and time.perf_counter() - began < self.seconds):
            took.append(once(function))
        return statistics.median(took)

    def _host(self, function: Callable[[], Any]) -> float:
        began = time.perf_counter()
        function()
        return (time.perf_counter() - began) * 1e3

    def _cuda(self, function: Callable[[], Any]) -> float:
        """While the caches are overwritten, the host gets ahead: a short kernel is not timed with its launch."""
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.empty(_FLUSHED, dtype=torch.uint8, device=self.device).zero_()
        start.record()
        function()
        end.record()
        end.synchronize()
        return start.elapsed_time(end)


def graphed(function: Callable[[], Any]) -> Callable[[], None]:
    """The function recorded as a CUDA graph, so that launching is not timed; for functions that never wait."""
    aside = torch.cuda.Stream()
    aside.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(aside), torch.no_grad():
        for _ in range(_RECORDING):
            function()
    torch.cuda.current_stream().wait_stream(aside)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph), torch.no_grad():
        function()
    return graph.replay


def launches(function: Callable[[], Any], device: torch.device) -> int:
    """How many kernels a call starts on a GPU; elsewhere how many operations torch dispatches."""
    activity = torch.profiler.ProfilerActivity
    cuda = device.type == "cuda"
    with torch.no_grad():
        function()
        with torch.profiler.profile(activities=[activity.CUDA if cuda else activity.CPU]) as seen:
            function()
            if cuda:
                torch.cuda.synchronize()
    if cuda:  # the events as they were recorded: to make a tree of them takes minutes
        raw = seen.profiler.kineto_results.events() if seen.profiler is not None else []
        return sum(event.device_type() == torch.autograd.DeviceType.CUDA for event in raw)
    return sum(event.cpu_parent is None and event.name.startswith("aten::") for event in seen.events() or [])
