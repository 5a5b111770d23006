"""The project's own routes: pictures from JSON, or from a PNG that is sent as it is."""

from __future__ import annotations

from typing import Annotated, Any

import numpy as np
from fastapi import APIRouter, Header, Query, Request, Response
from starlette.concurrency import run_in_threadpool

from serve import pictures
from serve.intake import Intake, from_json, from_picture
from serve.order import Step
from serve.refusal import Refusal, documented
from serve.schemas import Picture, PictureEvent, PictureReply, PictureRequest, StepEvent, Wish
from serve.service import STREAM, Service

_ANSWERS: dict[int | str, dict[str, Any]] = {
    200: {
        "model": PictureReply,
        "description": "The pictures: as JSON, as server-sent events, or as one PNG (`Accept: image/png`).",
        "content": {pictures.MEDIA_TYPE: {"schema": {"type": "string", "format": "binary"}}, STREAM: {}},
    },
    **documented(400, 401, 404, 408, 413, 422, 429),
}
_PNG_BODY = {"requestBody": {"required": True, "content": {pictures.MEDIA_TYPE: {"schema": {"type": "string"}}}}}


def routes(service: Service) -> APIRouter:
    """The routes over a service."""
    router = APIRouter(tags=["pictures"])

    @router.post("/v1/pictures", responses=_ANSWERS, response_model=PictureReply)
    async def draw(wanted: PictureRequest, request: Request, accept: Annotated[str, Header()] = "*/*") -> Response:
        """Draw pictures from text, from a picture, or into one."""
        intake = await run_in_threadpool(from_json, wanted, service.engines, service.limits)
        return await _answer(service, intake, request, accept)

    @router.post("/v1/pictures/png", responses=_ANSWERS, response_model=PictureReply, openapi_extra=_PNG_BODY)
    async def redraw(
        wish: Annotated[Wish, Query()], request: Request, accept: Annotated[str, Header()] = "*/*"
    ) -> Response:
        """Draw from the PNG that is the body; what is transparent in it is painted, the rest is kept."""
        data = await request.body()
        intake = await run_in_threadpool(from_picture, wish, data, service.engines, service.limits)
        return await _answer(service, intake, request, accept)

    return router


async def _answer(service: Service, intake: Intake, request: Request, accept: str) -> Response:
    raw = pictures.MEDIA_TYPE in accept
    if raw and (intake.stream or len(intake.orders) > 1):
        raise Refusal(422, f"{pictures.MEDIA_TYPE} is one picture: leave n and stream out, or accept JSON", "n")
    if intake.stream:
        return service.stream(intake, request, lambda k, event: run_in_threadpool(_described, intake, k, event))
    drawn = await service.draw(intake, request)
    if raw:
        png = await run_in_threadpool(pictures.to_png, drawn[0])
        return Response(png, media_type=pictures.MEDIA_TYPE, headers={"X-Seed": str(intake.orders[0].seed)})
    reply = await run_in_threadpool(_reply, intake, drawn)
    return Response(reply.model_dump_json(), media_type="application/json")


def _reply(intake: Intake, drawn: list[np.ndarray]) -> PictureReply:
    first = intake.orders[0]
    return PictureReply(
        engine=first.engine,
        engine_hash=intake.hosted.engine.manifest.engine_hash,
        height=first.height,
        width=first.width,
        pictures=[
            Picture(seed=order.seed, png=pictures.to_base64(picture))
            for order, picture in zip(intake.orders, drawn, strict=True)
        ],
    )


def _described(intake: Intake, k: int, event: Step | np.ndarray) -> tuple[str, StepEvent | PictureEvent]:
    if isinstance(event, Step):
        preview = None if event.preview is None else pictures.to_base64(event.preview)
        return "step", StepEvent(index=k, row=event.row, rows=event.rows, preview=preview)
    return "picture", PictureEvent(index=k, seed=intake.orders[k].seed, png=pictures.to_base64(event))
