"""A piece of work and what it takes, as it is known before it is done."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Cost:
    """What one piece of work takes.

    Attributes:
        what: it is.
        seconds: on this machine, as busy as it is now.
        bytes: of memory at its peak, beside the model and the libraries.
        way_out: what takes less.
    """

    what: str
    seconds: float
    bytes: int
    way_out: str
