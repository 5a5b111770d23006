"""Many processes that take task after task of one list, until none is left or the time is over."""

from __future__ import annotations

import multiprocessing
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeVar

T = TypeVar("T")


def run(work: Callable[..., None], told: Any, tasks: Sequence[Any]) -> None:
    """Run `work(told, tasks, following, ends)` in `told.workers` processes, and end them after `told.seconds`."""
    ends = time.time() + told.seconds
    spawning = multiprocessing.get_context("spawn")
    following = spawning.Value("i", 0)
    workers = [spawning.Process(target=work, args=(told, tasks, following, ends)) for _ in range(told.workers)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(max(0.0, ends - time.time()) if told.seconds < float("inf") else None)
    for worker in workers:
        worker.kill()


def taken(tasks: Sequence[T], following: Any, ends: float) -> Iterator[tuple[int, T]]:
    """The tasks that fall to this process, with their places in the list."""
    while time.time() < ends:
        with following.get_lock():
            at, following.value = following.value, following.value + 1
        if at >= len(tasks):
            return
        yield at, tasks[at]
