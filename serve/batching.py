"""The queue: bounded, first come first served, and what is alike is drawn together by the one thread that draws."""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from export.errors import EngineError
from serve.hosted import Hosted, Look
from serve.order import Job, Step


class Overloaded(Exception):
    """The queue is full. `retry_after`: whole seconds after which it should not be."""

    def __init__(self, retry_after: int) -> None:
        super().__init__(f"the queue is full; come back in {retry_after} s")
        self.retry_after = retry_after


class Closing(Exception):
    """The server finishes what it has accepted, and accepts no more."""


class _Unwanted(Exception):
    """Nobody waits for any picture of the batch that is being drawn."""


@dataclass(frozen=True)
class Drawn:
    """A batch that was tried.

    Attributes:
        engine: its name.
        pictures: how many were in it.
        seconds: it took.
        waited: seconds each of them had waited before.
        outcome: `drawn`, `abandoned` (nobody waited any more) or `failed`.
    """

    engine: str
    pictures: int
    seconds: float
    waited: tuple[float, ...]
    outcome: str


class Batcher:
    """Draws jobs in one thread, so that requests share the processor by waiting and not by slowing each other down.

    The job at the head of the queue is never passed over: it is drawn next, with as many of its kind as are there.
    Nothing waits for company. Jobs that are cancelled leave the queue, and a batch that nobody waits for any more
    ends at its next row.
    """

    def __init__(self, hosted: Mapping[str, Hosted], capacity: int, observe: Callable[[Drawn], None]) -> None:
        """Start drawing.

        Args:
            hosted: the engines by name.
            capacity: jobs that may wait.
            observe: called with every batch, from the drawing thread.
        """
        self._hosted, self._capacity, self._observe = hosted, capacity, observe
        self._changed = threading.Condition()
        self._waiting: list[Job] = []
        self._drawing = 0
        self._closed = False
        self._pace = 0.0
        self._thread = threading.Thread(target=self._work, name="drawing")
        self._thread.start()

    @property
    def waiting(self) -> int:
        """Jobs in the queue."""
        with self._changed:
            return sum(job.wanted for job in self._waiting)

    @property
    def alive(self) -> bool:
        """Whether somebody draws."""
        return self._thread.is_alive()

    def submit(self, jobs: Sequence[Job]) -> None:
        """Put the jobs of a request into the queue, all or none.

        Raises:
            Overloaded: they do not fit now.
            Closing: `close` was called.
        """
        with self._changed:
            if self._closed:
                raise Closing("the server is shutting down")
            self._waiting = [job for job in self._waiting if job.wanted]
            if len(self._waiting) + len(jobs) > self._capacity:
                raise Overloaded(max(1, math.ceil((len(self._waiting) + self._drawing) * self._pace)))
            self._waiting.extend(jobs)
            self._changed.notify()

    def close(self) -> None:
        """Draw what was accepted, then stop; returns when that is done."""
        with self._changed:
            self._closed = True
            self._changed.notify()
        self._thread.join()

    def _work(self) -> None:
        while batch := self._next():
            began = time.monotonic()
            outcome = self._draw(batch)
            seconds = time.monotonic() - began
            if outcome == "drawn":
                pace = seconds / len(batch)
                self._pace = 0.8 * self._pace + 0.2 * pace if self._pace else pace
            waited = tuple(began - job.since for job in batch)
            self._observe(Drawn(batch[0].order.engine, len(batch), seconds, waited, outcome))

    def _next(self) -> list[Job]:
        """The next batch; empty when there is none to come."""
        with self._changed:
            self._drawing = 0
            self._changed.wait_for(self._has_work)
            if not self._waiting:
                return []
            head = self._waiting[0]
            alike = [job for job in self._waiting if job.order.kind == head.order.kind]
            batch = alike[: self._hosted[head.order.engine].together(head.order, len(alike))]
            self._waiting = [job for job in self._waiting if job not in batch]
            self._drawing = len(batch)
            return batch

    def _has_work(self) -> bool:
        self._waiting = [job for job in self._waiting if job.wanted]
        return bool(self._waiting) or self._closed

    def _draw(self, batch: Sequence[Job]) -> str:
        """Draw a batch and keep its promises; one bad order costs the others nothing but time."""
        hosted = self._hosted[batch[0].order.engine]
        try:
            pictures = hosted.draw([job.order for job in batch], _watcher(hosted, batch))
        except _Unwanted:
            return "abandoned"
        except EngineError as error:
            if len(batch) > 1:
                outcomes = {self._draw([job]) for job in batch if job.wanted}
                return "drawn" if "drawn" in outcomes else "failed"
            batch[0].fail(error)
            return "failed"
        except Exception as error:
            for job in batch:
                job.fail(error)
            return "failed"
        for job, picture in zip(batch, pictures, strict=True):
            job.succeed(picture)
        return "drawn"


def _watcher(hosted: Hosted, batch: Sequence[Job]) -> Callable[[int, Look], None]:
    """Tells every job how far it is, and ends a batch that nobody waits for."""
    rows = hosted.rows(batch[0].order)

    def watch(row: int, look: Look) -> None:
        if not any(job.wanted for job in batch):
            raise _Unwanted
        for k, job in enumerate(batch):
            if job.watch is not None and job.wanted:
                preview: np.ndarray | None = look(k) if row in job.previews else None
                job.watch(Step(row, rows, preview))

    return watch
