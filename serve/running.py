"""A request that is being drawn, seen from the event loop: its events, until its deadline or the client's end."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from concurrent.futures import Future
from functools import partial
from typing import Any

import numpy as np

from serve.batching import Batcher
from serve.intake import Intake
from serve.order import Job, Step

Event = tuple[int, Step | Future[np.ndarray]]
"""Index of a picture in the request, and what happened to it: a step, or its future is done."""


class DeadlinePassed(Exception):
    """The pictures were not done in time."""


class Running:
    """The jobs of one request, submitted when this is made."""

    def __init__(self, intake: Intake, batcher: Batcher) -> None:
        """Submit the jobs.

        Raises:
            Overloaded: see `serve.batching.Batcher.submit`.
            Closing: likewise.
        """
        self._loop = asyncio.get_running_loop()
        self._events: asyncio.Queue[Event] = asyncio.Queue()
        self._until = self._loop.time() + intake.deadline_s
        self._jobs = [
            Job(order, partial(self._tell, k) if intake.stream else None, intake.previews)
            for k, order in enumerate(intake.orders)
        ]
        batcher.submit(self._jobs)
        for k, job in enumerate(self._jobs):
            job.future.add_done_callback(partial(self._tell, k))

    async def events(self) -> AsyncIterator[tuple[int, Step | np.ndarray]]:
        """All steps and pictures, as they come; whatever ends this early takes the jobs back.

        Raises:
            DeadlinePassed: the time is up.
            EngineError: the engine could not draw one of the orders.
        """
        try:
            left = len(self._jobs)
            while left:
                try:
                    k, event = await asyncio.wait_for(self._events.get(), self._until - self._loop.time())
                except TimeoutError:
                    raise DeadlinePassed from None
                if isinstance(event, Future):
                    left -= 1
                    yield k, event.result()
                else:
                    yield k, event
        finally:
            self.cancel()

    async def pictures(self, gone: Callable[[], asyncio.Future[None]]) -> list[np.ndarray] | None:
        """All pictures; None where the client went away first.

        Args:
            gone: waits for the client to go away.

        Raises:
            DeadlinePassed, EngineError: as for `events`.
        """
        drawing, leaving = asyncio.ensure_future(self._all()), gone()
        waited: set[asyncio.Future[Any]] = {drawing, leaving}
        try:
            await asyncio.wait(waited, return_when=asyncio.FIRST_COMPLETED)
            return await drawing if drawing.done() else None
        finally:
            leaving.cancel()
            drawing.cancel()
            self.cancel()

    def cancel(self) -> None:
        """Take back what is not done."""
        for job in self._jobs:
            job.future.cancel()

    async def _all(self) -> list[np.ndarray]:
        done = {k: event async for k, event in self.events() if not isinstance(event, Step)}
        return [done[k] for k in sorted(done)]

    def _tell(self, k: int, event: Step | Future[np.ndarray]) -> None:
        """Hand an event over from the drawing thread."""
        self._loop.call_soon_threadsafe(self._events.put_nowait, (k, event))
