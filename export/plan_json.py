"""Reads the parts of a step plan out of JSON, and refuses every value of another type."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from export.plan_rows import Gate, Segment, Slot, Step, Update


def name(raw: Any) -> str:
    """A text; TypeError for anything else."""
    if not isinstance(raw, str):
        raise TypeError(f"{raw!r} is not a name")
    return raw


def names(raw: Any) -> tuple[str, ...]:
    """A list of texts; TypeError for anything else."""
    if not isinstance(raw, list):
        raise TypeError(f"{raw!r} is not a list of names")
    return tuple(name(text) for text in raw)


def number(raw: Any) -> float:
    """A number as float; TypeError for anything else, truth values included."""
    if isinstance(raw, bool) or not isinstance(raw, int | float):
        raise TypeError(f"{raw!r} is not a number")
    return float(raw)


def segment(raw: dict[str, Any]) -> Segment:
    """A segment from its JSON object."""
    return Segment(**{side: names(tensors) for side, tensors in raw.items()})


def slot(raw: dict[str, Any]) -> Slot:
    """A slot from its JSON object."""
    read = Slot(**raw)
    _whole("the history", read.history)
    name(read.tensor)
    if read.base is not None:
        name(read.base)
    return read


def gate(raw: dict[str, Any] | None) -> Gate | None:
    """A gate from its JSON object, or none."""
    if raw is None:
        return None
    fields: dict[str, Any] = dict(raw)
    fields["tensor"] = name(raw["tensor"])
    fields["threshold"] = number(raw["threshold"])
    fields["max_run"] = _whole("max_run", raw["max_run"])
    if "polynomial" in raw:
        fields["polynomial"] = _numbers(raw["polynomial"])
    return Gate(**fields)


def step(raw: dict[str, Any]) -> Step:
    """A row from its JSON object; keys of later versions of the table may be missing."""
    raw = dict(raw)
    gated = raw.pop("gated", False)
    if not isinstance(gated, bool):
        raise TypeError(f"gated is {gated!r}, which is neither true nor false")
    return Step(
        x=_lags(raw.pop("x")),
        m=_lags(raw.pop("m")),
        write=names(raw.pop("write")),
        read={key: _numbers(alphas) for key, alphas in raw.pop("read").items()},
        path=name(raw.pop("path")),
        guidance=raw.pop("guidance"),
        span=_whole("the span", raw.pop("span", 1)),
        gated=gated,
        **{key: number(value) for key, value in raw.items()},
    )


def update(raw: dict[str, Any]) -> Update:
    """The coefficients of a late start from their JSON object."""
    raw = dict(raw)
    return Update(
        x=_lags(raw.pop("x")),
        m=_lags(raw.pop("m")),
        noise=number(raw.pop("noise")),
        **{key: number(value) for key, value in raw.items()},
    )


def _whole(what: str, raw: Any) -> int:
    if isinstance(raw, bool) or not isinstance(raw, int):
        raise TypeError(f"{what} {raw!r} is not a whole number")
    return raw


def _numbers(raw: Any) -> tuple[float, ...]:
    if not isinstance(raw, list):
        raise TypeError(f"{raw!r} is not a list of numbers")
    return tuple(number(value) for value in raw)


def _lags(raw: Mapping[str, Any]) -> dict[int, float]:
    return {int(lag): number(coefficient) for lag, coefficient in raw.items()}
