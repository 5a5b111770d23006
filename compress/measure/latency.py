"""Interleaved timing: contestants take turns, so that a busy moment of the machine falls on all of them."""

from __future__ import annotations

import contextlib
import gc
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from compress.errors import PassError
from compress.measure.metrics import Estimate
from compress.progress import Progress, silent

PAUSE_S = 0.02
"""Rest before every run: threads that spin after their work (OpenMP, ONNX Runtime) go to sleep meanwhile."""


@dataclass(frozen=True)
class Contestant:
    """Something that makes one picture when called; already set to its number of threads."""

    name: str
    run: Callable[[], object]


@dataclass(frozen=True)
class Timing:
    """Wall times of one contestant.

    Attributes:
        times: (rounds,) in ms, in the order they were taken.
    """

    times: np.ndarray

    @property
    def median(self) -> float:
        """In ms."""
        return float(np.median(self.times))

    @property
    def quartiles(self) -> tuple[float, float]:
        """25 % and 75 % of the runs, in ms."""
        low, high = np.percentile(self.times, (25, 75))
        return float(low), float(high)

    def estimate(self) -> Estimate:
        """The median with its 95 % interval from order statistics (distribution-free, Conover 1999, section 3.2)."""
        n, ordered = len(self.times), np.sort(self.times)
        spread = 1.96 * np.sqrt(n) / 2
        low, high = int(np.floor(n / 2 - spread)), int(np.ceil(n / 2 + spread))
        interval = None if low < 0 or high >= n else (float(ordered[low]), float(ordered[high]))
        return Estimate(self.median, interval, n)


def interleave(
    contestants: Sequence[Contestant],
    rounds: int,
    warm_up: int = 1,
    budget_s: float | None = None,
    progress: Progress = silent,
    what: str = "latency",
) -> dict[str, Timing]:
    """Time contestants in turn: A B C, B C A, C A B, ...

    Args:
        contestants: with different names.
        rounds: how often each is timed.
        warm_up: untimed runs of each before.
        budget_s: no new round is begun after so many seconds, once there are five.
        progress: receives (what, rounds done, rounds in all).
        what: named in the progress.

    Returns:
        Name -> timing.

    Raises:
        PassError: two contestants share a name, or there is no round.
    """
    if len({contestant.name for contestant in contestants}) != len(contestants):
        raise PassError("two contestants of the timing share a name")
    if rounds < 1:
        raise PassError("a timing needs at least one round")
    for contestant in contestants:
        for _ in range(warm_up):
            contestant.run()
    times: dict[str, list[float]] = {contestant.name: [] for contestant in contestants}
    began = time.perf_counter()
    with _without_collection():
        for done in range(rounds):
            progress(what, done, rounds)
            turn = done % len(contestants)
            for contestant in [*contestants[turn:], *contestants[:turn]]:
                time.sleep(PAUSE_S)
                start = time.perf_counter()
                contestant.run()
                times[contestant.name].append(1e3 * (time.perf_counter() - start))
            if budget_s is not None and done >= 4 and time.perf_counter() - began > budget_s:
                break
    progress(what, rounds, rounds)
    return {name: Timing(np.array(taken)) for name, taken in times.items()}


@contextlib.contextmanager
def _without_collection() -> Iterator[None]:
    """Keep the garbage collector from running inside somebody's turn."""
    was_on = gc.isenabled()
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        if was_on:
            gc.enable()


@contextlib.contextmanager
def torch_threads(threads: int) -> Iterator[None]:
    """Let PyTorch compute with so many threads inside the block."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        yield
    finally:
        torch.set_num_threads(before)
