"""Pictures as PNG bytes: written the same every time, and read from strangers within bounds."""

from __future__ import annotations

import base64
import binascii
import io

import numpy as np
from PIL import Image, UnidentifiedImageError

from serve.refusal import Refusal

MEDIA_TYPE = "image/png"
_FORMATS = ("PNG", "JPEG", "WEBP")


def to_png(picture: np.ndarray) -> bytes:
    """uint8 (height, width, 3) to PNG; equal pictures give equal bytes."""
    buffer = io.BytesIO()
    Image.fromarray(picture).save(buffer, format="PNG")
    return buffer.getvalue()


def to_base64(picture: np.ndarray) -> str:
    """uint8 (height, width, 3) to PNG in base64."""
    return base64.b64encode(to_png(picture)).decode("ascii")


def from_base64(text: str, param: str) -> bytes:
    """Bytes of a field in base64; `data:...;base64,` may stand before them.

    Raises:
        Refusal: it is no base64.
    """
    head, comma, rest = text.partition(",")
    try:
        return base64.b64decode(rest if comma and head.startswith("data:") else text, validate=True)
    except (binascii.Error, ValueError):
        raise Refusal(422, f"{param} is not base64", param) from None


def read(data: bytes, param: str, most_pixels: int) -> Image.Image:
    """Read a picture; its pixels are only unpacked when there are not too many.

    Raises:
        Refusal: no picture, a damaged one, or one that is too large.
    """
    try:
        with Image.open(io.BytesIO(data), formats=_FORMATS) as image:
            if image.width * image.height > most_pixels:
                raise Refusal(
                    422, f"{param} has {image.width} x {image.height} pixels; {most_pixels} are allowed", param
                )
            image.load()
            return image.copy()
    except UnidentifiedImageError:
        raise Refusal(422, f"{param} is not a picture; send {', '.join(_FORMATS)}", param) from None
    except (OSError, ValueError, SyntaxError, EOFError, Image.DecompressionBombError):
        raise Refusal(422, f"{param} is a damaged picture", param) from None


def colours(image: Image.Image) -> np.ndarray:
    """uint8 (height, width, 3)."""
    return np.asarray(image.convert("RGB"))


def white(image: Image.Image) -> np.ndarray:
    """Where a picture is rather white than black: bool (height, width)."""
    return np.asarray(image.convert("L")) >= 128


def transparent(image: Image.Image) -> np.ndarray | None:
    """Where a picture is rather transparent than opaque: bool (height, width); None where it nowhere is."""
    clear = np.asarray(image.convert("RGBA"))[..., 3] < 128
    return clear if clear.any() else None
