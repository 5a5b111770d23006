"""Numbers, counts and logs every request: which route, how it ended, how long it took, and never what it asked for."""

from __future__ import annotations

import logging
import secrets
import time
import traceback

from starlette.datastructures import MutableHeaders
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from serve.metrics import Meters
from serve.refusal import GONE, problem

_LOG = logging.getLogger("serve.access")
UNKNOWN = "unknown"


class Access:
    """ASGI middleware, the outermost: an error that nobody foresaw ends here, with the lines it came from logged."""

    def __init__(self, app: ASGIApp, meters: Meters) -> None:
        self._app, self._meters = app, meters

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one connection or the lifespan."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        began, number, status = time.perf_counter(), secrets.token_hex(8), GONE

        async def noted(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                MutableHeaders(scope=message)["X-Request-Id"] = number
            await send(message)

        try:
            await self._app(scope, receive, noted)
        except Exception as error:
            # The message of an error may quote the request; where it was raised does not.
            lines = [f"{frame.filename}:{frame.lineno}" for frame in traceback.extract_tb(error.__traceback__)]
            _LOG.error("error", extra={"id": number, "error": type(error).__name__, "lines": lines})
            if status == GONE:
                body = problem(500, f"our fault; the log tells more of the request {number}")
                await JSONResponse(body.model_dump(), 500)(scope, receive, noted)
        finally:
            seconds = time.perf_counter() - began
            route = getattr(scope.get("route"), "path", UNKNOWN)
            self._meters.request(route, status, seconds)
            state = scope.get("state", {})
            about = {key: state[key] for key in ("engine", "pictures") if key in state}
            _LOG.info(
                "request",
                extra={"id": number, "route": route, "status": status, "ms": round(seconds * 1e3, 2), **about},
            )
