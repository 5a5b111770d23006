"""How long work says how far it is."""

from __future__ import annotations

from collections.abc import Callable

Progress = Callable[[str, int, int], None]
"""Called with (what is done, units done, units in all)."""


def silent(what: str, done: int, total: int) -> None:
    """Report progress to nobody."""
