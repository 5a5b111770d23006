"""Routes for whoever runs the server: alive, ready, metrics, and what the engines are."""

from __future__ import annotations

from fastapi import APIRouter, Response
from prometheus_client.exposition import CONTENT_TYPE_LATEST, generate_latest
from pydantic import BaseModel

from serve.refusal import Refusal, documented
from serve.service import Service


class State(BaseModel):
    """The answer of `/healthz` and `/readyz`."""

    ok: bool = True


class EngineCard(BaseModel):
    """What an engine of this server is."""

    name: str
    engine_hash: str
    family: str
    target: str
    network_calls: int
    height: tuple[int, int, int]
    width: tuple[int, int, int]
    batches: tuple[int, ...]


def open_routes(service: Service) -> APIRouter:
    """The routes that need no key; none of them tells what anybody asked for."""
    router = APIRouter(tags=["operations"])

    @router.get("/healthz", responses=documented(503))
    async def healthy() -> State:
        """Whether the process can still draw; restart it where not."""
        return _state(service.batcher.alive)

    @router.get("/readyz", responses=documented(503))
    async def ready() -> State:
        """Whether requests should be sent here."""
        return _state(service.batcher.alive and service.batcher.waiting < service.limits.queue)

    @router.get("/metrics", response_class=Response, responses={200: {"content": {"text/plain": {}}}})
    def metrics() -> Response:
        """Metrics as text, for Prometheus."""
        return Response(generate_latest(service.meters.registry), media_type=CONTENT_TYPE_LATEST)

    return router


def routes(service: Service) -> APIRouter:
    """The routes that need a key."""
    router = APIRouter(tags=["operations"])

    @router.get("/v1/engines", responses=documented(401))
    async def engines() -> list[EngineCard]:
        """What the engines of this server are."""
        return [
            EngineCard(
                name=name,
                engine_hash=hosted.engine.manifest.engine_hash,
                family=hosted.engine.manifest.family,
                target=hosted.engine.target,
                network_calls=hosted.engine.plan.network_calls,
                height=hosted.engine.manifest.shapes["height"],
                width=hosted.engine.manifest.shapes["width"],
                batches=hosted.sizes,
            )
            for name, hosted in service.engines.items()
        ]

    return router


def _state(ok: bool) -> State:
    if not ok:
        raise Refusal(503, "not now", retry_after=1)
    return State()
