"""Reads bodies of requests before anything else does: only so large, and only so slow."""

from __future__ import annotations

import asyncio

from starlette.datastructures import Headers
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from serve.limits import Limits
from serve.refusal import Refusal, problem


class Bodies:
    """ASGI middleware: the application behind it meets whole bodies alone."""

    def __init__(self, app: ASGIApp, limits: Limits) -> None:
        self._app, self._limits = app, limits

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one connection or the lifespan."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        try:
            whole = await asyncio.wait_for(self._whole(scope, receive), self._limits.body_s)
        except TimeoutError:
            refusal = Refusal(408, f"the body did not arrive within {self._limits.body_s:g} s", code="slow_body")
            await _refuse(refusal, scope, receive, send)
        except Refusal as refusal:
            await _refuse(refusal, scope, receive, send)
        else:
            if whole is not None:
                await self._app(scope, _replayed(whole, receive), send)

    async def _whole(self, scope: Scope, receive: Receive) -> bytes | None:
        """The body; None where the client went away before it was complete."""
        most = self._limits.body_bytes
        said = Headers(scope=scope).get("content-length", "0")
        pieces, size = [], 0
        while True:
            # Known too large before it is read; nothing that the client says is trusted to be small.
            if size > most or (said.isdecimal() and int(said) > most):
                raise Refusal(413, f"a request may have {most} bytes at most", code="body_too_large")
            message = await receive()
            if message["type"] == "http.disconnect":
                return None
            pieces.append(message.get("body", b""))
            size += len(pieces[-1])
            if not message.get("more_body", False) and size <= most:
                return b"".join(pieces)


def _replayed(body: bytes, receive: Receive) -> Receive:
    """Gives the body as one message, and then what comes."""
    waiting: list[Message] = [{"type": "http.request", "body": body, "more_body": False}]

    async def replay() -> Message:
        return waiting.pop() if waiting else await receive()

    return replay


async def _refuse(refusal: Refusal, scope: Scope, receive: Receive, send: Send) -> None:
    """Answer, and close: the rest of the body is not wanted."""
    body = problem(refusal.status_code, refusal.detail, refusal.param, refusal.code)
    answer = JSONResponse(body.model_dump(), refusal.status_code, headers={"Connection": "close"})
    await answer(scope, receive, send)
