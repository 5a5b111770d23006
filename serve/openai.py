"""Routes in the form of the OpenAI images API, so that its clients work with nothing but another base URL."""

from __future__ import annotations

import time
from typing import Annotated, Literal

import numpy as np
from fastapi import APIRouter, Request, Response
from pydantic import BaseModel, ConfigDict, Field
from starlette.concurrency import run_in_threadpool

from serve import pictures
from serve.intake import Intake, engine_of, from_json
from serve.order import Step
from serve.refusal import Refusal, documented
from serve.schemas import PictureRequest, Text
from serve.service import STREAM, Service


class ImagesRequest(BaseModel):
    """The request of `POST /v1/images/generations`; fields that change nothing here are taken and left alone."""

    model_config = ConfigDict(extra="ignore")

    prompt: Text
    model: str | None = Field(default=None, description="An engine by name; the first of the server by default.")
    n: Annotated[int, Field(ge=1, le=1 << 16)] | None = None
    size: Annotated[str, Field(pattern="^(auto|[1-9][0-9]{0,4}x[1-9][0-9]{0,4})$")] | None = Field(
        default=None, description="WIDTHxHEIGHT, or auto."
    )
    response_format: Literal["b64_json", "url"] | None = Field(
        default=None, description="`url` gives a data: URL, since the server keeps no pictures."
    )
    output_format: Literal["png"] | None = None
    stream: bool | None = None
    partial_images: Annotated[int, Field(ge=0, le=3)] | None = None
    seed: Annotated[int, Field(ge=0, lt=1 << 63)] | None = Field(default=None, description="Not of the OpenAI API.")
    negative_prompt: Text | None = Field(default=None, description="Not of the OpenAI API.")


class Image(BaseModel):
    """One picture."""

    b64_json: str | None = None
    url: str | None = None


class ImagesReply(BaseModel):
    """The answer of `POST /v1/images/generations`."""

    created: int
    data: list[Image]
    output_format: Literal["png"] = "png"
    size: str


class ImageEvent(BaseModel):
    """An event of a streamed answer."""

    type: Literal["image_generation.partial_image", "image_generation.completed"]
    b64_json: str
    created_at: int
    partial_image_index: int | None = None
    output_format: Literal["png"] = "png"
    size: str


class Model(BaseModel):
    """An engine, as a model."""

    id: str
    object: Literal["model"] = "model"
    created: int = 0
    owned_by: str = "local"


class Models(BaseModel):
    """The engines of this server."""

    object: Literal["list"] = "list"
    data: list[Model]


def routes(service: Service) -> APIRouter:
    """The routes over a service."""
    router = APIRouter(tags=["openai"])

    @router.post(
        "/v1/images/generations",
        response_model=ImagesReply,
        responses={200: {"content": {STREAM: {}}}, **documented(400, 401, 404, 408, 413, 422, 429)},
    )
    async def generate(wanted: ImagesRequest, request: Request) -> Response:
        """Draw pictures from text."""
        hosted = engine_of(service.engines, wanted.model, "model")
        width, _, height = (wanted.size or "auto").partition("x")
        own = PictureRequest(
            prompt=wanted.prompt,
            engine=hosted.name,
            n=wanted.n or 1,
            seed=wanted.seed,
            negative_prompt=wanted.negative_prompt,
            height=int(height) if height else None,
            width=int(width) if height else None,
            previews=wanted.partial_images or 0,
            stream=bool(wanted.stream),
        )
        intake = await run_in_threadpool(from_json, own, service.engines, service.limits)
        if intake.stream:
            if len(intake.orders) > 1:
                raise Refusal(422, "a stream is of one picture: leave n out", "n")
            return service.stream(intake, request, lambda _, event: run_in_threadpool(_described, intake, event))
        drawn = await service.draw(intake, request)
        encoded = await run_in_threadpool(lambda: [pictures.to_base64(picture) for picture in drawn])
        reply = ImagesReply(
            created=int(time.time()),
            data=[_image(text, wanted.response_format == "url") for text in encoded],
            size=_size(intake),
        )
        return Response(reply.model_dump_json(exclude_none=True), media_type="application/json")

    @router.get("/v1/models", responses=documented(401))
    async def models() -> Models:
        """List the engines."""
        return Models(data=[Model(id=name) for name in service.engines])

    return router


def _image(text: str, as_url: bool) -> Image:
    return Image(url=f"data:{pictures.MEDIA_TYPE};base64,{text}") if as_url else Image(b64_json=text)


def _described(intake: Intake, event: Step | np.ndarray) -> tuple[str, ImageEvent] | None:
    """A step without a preview has no event in this form."""
    now, size = int(time.time()), _size(intake)
    if not isinstance(event, Step):
        name: Literal["image_generation.completed"] = "image_generation.completed"
        return name, ImageEvent(type=name, b64_json=pictures.to_base64(event), created_at=now, size=size)
    if event.preview is None:
        return None
    return "image_generation.partial_image", ImageEvent(
        type="image_generation.partial_image",
        b64_json=pictures.to_base64(event.preview),
        created_at=now,
        partial_image_index=sorted(intake.previews).index(event.row),
        size=size,
    )


def _size(intake: Intake) -> str:
    return f"{intake.orders[0].width}x{intake.orders[0].height}"
