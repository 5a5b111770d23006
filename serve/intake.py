"""A request becomes orders: everything about it is checked here, before it may wait."""

from __future__ import annotations

import secrets
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from PIL import Image

from export.errors import EngineError
from export.start import start_row
from export.step_plan import StepPlanError
from serve import pictures
from serve.hosted import Hosted
from serve.limits import Limits
from serve.order import Order
from serve.refusal import Refusal
from serve.schemas import PictureRequest, Wish

STRENGTH = 0.8


@dataclass(frozen=True)
class Intake:
    """What a request asks of the server.

    Attributes:
        hosted: the engine.
        orders: one per picture.
        deadline_s: seconds it may take.
        previews: the rows after which a picture is shown, counted from 1.
        stream: whether events are wanted.
    """

    hosted: Hosted
    orders: tuple[Order, ...]
    deadline_s: float
    previews: frozenset[int]
    stream: bool


def engine_of(engines: Mapping[str, Hosted], name: str | None, param: str = "engine") -> Hosted:
    """The engine of that name, the first where none is named.

    Raises:
        Refusal: there is none.
    """
    chosen = next(iter(engines)) if name is None else name
    if chosen not in engines:
        raise Refusal(404, f"there is no such engine here, but {', '.join(engines)}", param, "model_not_found")
    return engines[chosen]


def from_json(request: PictureRequest, engines: Mapping[str, Hosted], limits: Limits) -> Intake:
    """Read a request whose pictures are fields in base64.

    Raises:
        Refusal: says what does not fit, and what would.
    """
    given = {name: getattr(request, name) for name in ("image", "mask")}
    read = {
        name: pictures.read(pictures.from_base64(text, name), name, limits.pixels)
        for name, text in given.items()
        if text is not None
    }
    image, mask = (read.get(name) for name in ("image", "mask"))
    if mask is not None and image is None:
        raise Refusal(422, "a mask needs an image to keep where it is black", "mask")
    sides = request.height, request.width
    return _intake(
        request,
        engines,
        limits,
        sides,
        None if image is None else pictures.colours(image),
        None if mask is None else pictures.white(mask),
    )


def from_picture(wish: Wish, data: bytes, engines: Mapping[str, Hosted], limits: Limits) -> Intake:
    """Read a request whose body is the picture to begin from; where it is transparent, it is painted.

    Raises:
        Refusal: as for `from_json`.
    """
    image: Image.Image = pictures.read(data, "body", limits.pixels)
    return _intake(wish, engines, limits, (None, None), pictures.colours(image), pictures.transparent(image))


def _intake(
    wish: Wish,
    engines: Mapping[str, Hosted],
    limits: Limits,
    sides: tuple[int | None, int | None],
    image: np.ndarray | None,
    mask: np.ndarray | None,
) -> Intake:
    hosted = engine_of(engines, wish.engine)
    if wish.n > limits.pictures:
        raise Refusal(422, f"n may be {limits.pictures} at most", "n")
    for param, text in (("prompt", wish.prompt), ("negative_prompt", wish.negative_prompt or "")):
        if len(text) > limits.prompt:
            raise Refusal(422, f"{param} may have {limits.prompt} characters at most", param)
    calls = int(hosted.engine.plan.key.get("steps", hosted.engine.plan.network_calls))
    if wish.steps not in (None, calls):
        raise Refusal(422, f"this engine draws in {calls} steps; leave steps out, or choose another engine", "steps")
    height, width = (
        _side(hosted, name, side, None if image is None else image.shape[axis])
        for axis, (name, side) in enumerate(zip(("height", "width"), sides, strict=True))
    )
    if height * width > limits.pixels:
        raise Refusal(422, f"a picture may have {limits.pixels} pixels at most", "height")
    if mask is not None and mask.shape != (height, width):
        raise Refusal(422, f"the mask must have the size of the image, {width} x {height} pixels", "mask")
    seed = secrets.randbelow(1 << 31) if wish.seed is None else wish.seed
    start = _start(hosted, wish.strength, image, mask)
    orders = tuple(
        Order(hosted.name, wish.prompt, seed + k, height, width, wish.negative_prompt, start, image, mask)
        for k in range(wish.n)
    )
    rows = hosted.rows(orders[0])
    shown = min(wish.previews, rows) if wish.stream else 0
    previews = frozenset(rows - rows * k // shown for k in range(shown)) if shown else frozenset[int]()
    return Intake(hosted, orders, min(wish.deadline_s or limits.deadline_s, limits.deadline_s), previews, wish.stream)


def _side(hosted: Hosted, name: str, asked: int | None, of_image: int | None) -> int:
    """Height or width in pixels: as asked, or that of the image, or the engine's own."""
    best = hosted.engine.manifest.shapes[name][1]
    side = next((value for value in (asked, of_image) if value is not None), best)
    try:
        hosted.check_side(name, side)
    except EngineError as error:
        raise Refusal(422, str(error), name) from None
    if of_image not in (None, side):
        raise Refusal(422, f"the image has the {name} {of_image}, not {side}: resize it first", name)
    return side


def _start(hosted: Hosted, strength: float | None, image: np.ndarray | None, mask: np.ndarray | None) -> int:
    """The row of the plan to begin at."""
    if image is None:
        if strength is not None:
            raise Refusal(422, "strength needs an image to begin from", "strength")
        return 0
    if "vae_encoder" not in hosted.engine.runtime.functions:
        raise Refusal(422, "this engine has no encoder, so it cannot begin from a picture", "image")
    plan = hosted.engine.plan
    if any(step.level != 1.0 for step in plan.steps):
        raise Refusal(422, "this engine begins at a lower resolution, so it cannot begin from a picture", "image")
    if strength is None and mask is not None:
        return 0
    try:
        start = start_row(plan, STRENGTH if strength is None else strength)
    except StepPlanError as error:
        raise Refusal(422, str(error), "strength") from None
    if start and start not in plan.starts:
        raise Refusal(422, "this engine cannot begin that late: take a greater strength, up to 1", "strength")
    return start
