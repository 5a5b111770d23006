"""Says which names are known when one is not, and which of them was probably meant."""

from __future__ import annotations

import difflib
from collections.abc import Iterable

SHOWN = 12


def shown(value: object) -> str:
    """Quote a value that a user wrote, cut to a length that fits a sentence."""
    text = {"None": "null", "True": "true", "False": "false"}.get(repr(value), repr(value))
    return text if len(text) <= 60 else f"{text[:57]}..."


def listed(known: Iterable[object]) -> str:
    """List names in their own order, the tail cut off with a count."""
    names = [str(name) for name in known]
    head = ", ".join(names[:SHOWN])
    return head if len(names) <= SHOWN else f"{head} and {len(names) - SHOWN} more"


def nearest(value: object, known: Iterable[object]) -> str | None:
    """Return the known name closest to a misspelt one, or None where nothing is close."""
    if not isinstance(value, str):
        return None
    by_fold = {str(name).casefold(): str(name) for name in known}
    starts = [fold for fold in by_fold if value and fold.startswith(value.casefold())]
    close = difflib.get_close_matches(value.casefold(), by_fold, n=1, cutoff=0.55) or sorted(starts, key=len)
    return by_fold[close[0]] if close else None


def unknown(value: object, noun: str, known: Iterable[object]) -> str:
    """Compose the sentence for a name that is not in a table.

    For example: `'fp9' is not a scheme; known: int8-w8a8, fp8-e4m3 (did you mean 'fp8-e4m3'?)`.
    """
    names = [str(name) for name in known]
    close = nearest(value, names)
    # The nearest name is always visible, even where the list is cut.
    hint = "" if close is None else f" (did you mean {close!r}?)"
    return f"{shown(value)} is not {noun}; known: {listed(names)}{hint}"
