"""The application: engines, queue, limits, keys and metrics put together, with every route."""

from __future__ import annotations

from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager

from fastapi import Depends, FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.concurrency import run_in_threadpool
from starlette.exceptions import HTTPException
from starlette.middleware.trustedhost import TrustedHostMiddleware

from serve import native, openai, operations
from serve.access import Access
from serve.batching import Batcher
from serve.bodies import Bodies
from serve.hosted import Hosted
from serve.keys import Keys
from serve.limits import Limits
from serve.metrics import Meters
from serve.refusal import problem
from serve.service import Service


def application(
    engines: Mapping[str, Hosted],
    limits: Limits | None = None,
    keys: Sequence[str] = (),
    hosts: Sequence[str] = ("*",),
) -> FastAPI:
    """An ASGI application that draws from now on, until its lifespan ends.

    Args:
        engines: by the names that requests call them.
        limits: what it accepts.
        keys: of which a request must send one; without any, everybody is served.
        hosts: names by which it may be called: a page of another site, whose name was made to point here, is refused.
    """
    limits, meters = limits or Limits(), Meters()
    batcher = Batcher(engines, limits.queue, meters.batch)
    meters.queue(lambda: batcher.waiting, limits.queue)
    service = Service(engines, batcher, limits, meters)

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        yield
        await run_in_threadpool(batcher.close)

    # No pages of documentation: they would load scripts from another host. The document itself is there.
    app = FastAPI(title="compress serve", version="1", docs_url=None, redoc_url=None, lifespan=lifespan)
    guarded = [Depends(Keys(tuple(keys)))] if keys else []
    for router in (native.routes(service), openai.routes(service), operations.routes(service)):
        app.include_router(router, dependencies=guarded)
    app.include_router(operations.open_routes(service))
    app.add_exception_handler(HTTPException, _refused)
    app.add_exception_handler(RequestValidationError, _malformed)
    app.add_middleware(Bodies, limits=limits)
    app.add_middleware(TrustedHostMiddleware, allowed_hosts=list(hosts), www_redirect=False)
    app.add_middleware(Access, meters=meters)
    return app


async def _refused(_: Request, error: Exception) -> JSONResponse:
    """Answer with the sentence of a refusal."""
    status, detail = getattr(error, "status_code", 500), str(getattr(error, "detail", ""))
    body = problem(status, detail, getattr(error, "param", None), getattr(error, "code", None))
    return JSONResponse(body.model_dump(), status, headers=getattr(error, "headers", None))


async def _malformed(_: Request, error: Exception) -> JSONResponse:
    """Say which field is wrong and why, without repeating what was sent."""
    first = error.errors()[0] if isinstance(error, RequestValidationError) else {}
    where = ".".join(str(part) for part in first.get("loc", ())[1:])
    body = problem(422, f"{where or 'body'}: {first.get('msg', 'malformed')}", where or None, first.get("type"))
    return JSONResponse(body.model_dump(), 422)
