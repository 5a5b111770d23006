"""What one server accepts: how much, how large, how long."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Limits:
    """Bounds of a server.

    Attributes:
        queue: pictures that wait at most; a request that does not fit is told to come back later.
        batch: pictures that are drawn together at most.
        pictures: of one request.
        pixels: of one picture.
        prompt: characters.
        body_bytes: of a request.
        body_s: seconds in which a request's body must have arrived.
        deadline_s: seconds a request takes at most; its own deadline may be shorter.
        connections: open at a time.
    """

    queue: int = 64
    batch: int = 8
    pictures: int = 8
    pixels: int = 1 << 22
    prompt: int = 4000
    body_bytes: int = 16 << 20
    body_s: float = 10.0
    deadline_s: float = 120.0
    connections: int = 1024
