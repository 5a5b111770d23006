"""What all routes share: the engines, the queue, and the way from a request's intake to its answer."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from dataclasses import dataclass

import numpy as np
from fastapi import Request
from fastapi.responses import StreamingResponse
from pydantic import BaseModel

from export.errors import EngineError
from serve.batching import Batcher, Closing, Overloaded
from serve.hosted import Hosted
from serve.intake import Intake
from serve.limits import Limits
from serve.metrics import Meters
from serve.order import Step
from serve.refusal import GONE, Refusal, problem
from serve.running import DeadlinePassed, Running

Describe = Callable[[int, Step | np.ndarray], Awaitable[tuple[str, BaseModel] | None]]
"""An event of a request as (name, data) for its stream, or None where the stream has no word for it."""

STREAM = "text/event-stream"


@dataclass(frozen=True)
class Service:
    """A server's engines by name, its queue, its limits, and its metrics."""

    engines: Mapping[str, Hosted]
    batcher: Batcher
    limits: Limits
    meters: Meters

    async def draw(self, intake: Intake, request: Request) -> list[np.ndarray]:
        """Draw all pictures of a request, unless its client goes away.

        Raises:
            Refusal: no room, no time, or what the engine said.
        """
        running = self._run(intake, request)
        try:
            pictures = await running.pictures(lambda: asyncio.ensure_future(_left(request)))
        except (DeadlinePassed, EngineError) as error:
            raise _refusal(error) from error
        if pictures is None:
            raise Refusal(GONE, "the client went away")
        return pictures

    def stream(self, intake: Intake, request: Request, describe: Describe) -> StreamingResponse:
        """Answer with server-sent events (WHATWG HTML, section 9.2); an error on the way is the last event.

        Raises:
            Refusal: no room.
        """
        running = self._run(intake, request)
        return StreamingResponse(_lines(running, describe), media_type=STREAM, headers={"Cache-Control": "no-store"})

    def _run(self, intake: Intake, request: Request) -> Running:
        request.state.engine, request.state.pictures = intake.hosted.name, len(intake.orders)
        try:
            running = Running(intake, self.batcher)
        except Overloaded as error:
            raise Refusal(429, str(error), code="queue_full", retry_after=error.retry_after) from None
        except Closing as error:
            raise Refusal(503, str(error), code="shutting_down", retry_after=10) from None
        self.meters.accepted()
        return running


async def _lines(running: Running, describe: Describe) -> AsyncIterator[str]:
    try:
        async for k, event in running.events():
            told = await describe(k, event)
            if told is not None:
                yield _event(*told)
    except (DeadlinePassed, EngineError) as error:
        refusal = _refusal(error)
        yield _event("error", problem(refusal.status_code, refusal.detail, code=refusal.code))
    finally:
        running.cancel()


def _event(name: str, data: BaseModel) -> str:
    return f"event: {name}\ndata: {data.model_dump_json(exclude_none=True)}\n\n"


def _refusal(error: DeadlinePassed | EngineError) -> Refusal:
    if isinstance(error, DeadlinePassed):
        return Refusal(408, "the pictures were not done before the deadline", "deadline_s", "deadline_passed")
    return Refusal(422, str(error), code="refused_by_engine")


async def _left(request: Request) -> None:
    """Return when the client has gone away."""
    while (await request.receive())["type"] != "http.disconnect":
        continue
