"""What requests and answers of the project's own routes look like."""

from __future__ import annotations

from typing import Annotated

from pydantic import AfterValidator, BaseModel, ConfigDict, Field


def _encodable(text: str) -> str:
    """Refuse half characters (lone surrogates), which JSON can hold and no tokenizer can read."""
    text.encode()
    return text


Text = Annotated[str, AfterValidator(_encodable)]
Side = Annotated[int, Field(ge=1, le=1 << 16)]


class Wish(BaseModel):
    """What every request for pictures may say."""

    model_config = ConfigDict(extra="forbid")

    prompt: Text = Field(description="What to draw, or a class.")
    engine: str | None = Field(default=None, description="By name; the first of the server by default.")
    negative_prompt: Text | None = Field(default=None, description="What guidance leads away from.")
    n: Annotated[int, Field(ge=1, le=1 << 16)] = Field(
        default=1, description="Pictures; picture k has the seed `seed + k`."
    )
    seed: Annotated[int, Field(ge=0, lt=1 << 63)] | None = Field(
        default=None, description="Equal requests with equal seeds give equal bytes; drawn by lot and told by default."
    )
    strength: Annotated[float, Field(gt=0.0, le=1.0)] | None = Field(
        default=None, description="Image-to-image: how much is drawn anew; 0.8 by default, 1 with a mask."
    )
    steps: Annotated[int, Field(ge=1, le=1 << 16)] | None = Field(
        default=None, description="The engine's own number; another is refused, since an engine is compiled for it."
    )
    deadline_s: Annotated[float, Field(gt=0.0, le=1e6)] | None = Field(default=None, description="Seconds it may take.")
    previews: Annotated[int, Field(ge=0, le=1 << 16)] = Field(
        default=0, description="Of a stream: how many steps show what the picture is going to be."
    )
    stream: bool = Field(default=False, description="Answer with server-sent events: `step`, then `picture`.")


class PictureRequest(Wish):
    """Draw pictures: from text, from a picture (`image`), or into one (`image` and `mask`)."""

    height: Side | None = Field(default=None, description="Pixels; that of the image, or the engine's own, by default.")
    width: Side | None = Field(default=None, description="Likewise.")
    image: str | None = Field(default=None, description="A picture to begin from, in base64.")
    mask: str | None = Field(default=None, description="A picture in base64: white is painted, black is kept.")


class Picture(BaseModel):
    """One drawn picture."""

    seed: int
    png: str = Field(description="base64")


class PictureReply(BaseModel):
    """All pictures of a request, in the order of their seeds."""

    engine: str
    engine_hash: str
    height: int
    width: int
    pictures: list[Picture]


class StepEvent(BaseModel):
    """Event `step` of a stream: a network call of a picture is done."""

    index: int
    row: int
    rows: int
    preview: str | None = Field(default=None, description="PNG in base64")


class PictureEvent(Picture):
    """Event `picture` of a stream."""

    index: int
