"""Units as the items of a budget: an axis loses its least important units first, in steps a target computes fast."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor

from compress.pruning.axis import Axis, DepthAxis, WidthAxis
from compress.pruning.knapsack import Item
from compress.pruning.structure import Cut

STEPS = 16
"""In which an axis is divided at most."""

Name = tuple[str, str]
"""Kind and module of an axis."""


@dataclass(frozen=True)
class Chunk:
    """Units of one axis that leave together."""

    axis: Axis
    units: tuple[int, ...]


def name_of(axis: Axis) -> Name:
    """Unique in a network."""
    return axis.kind, axis.module


def step_of(axis: Axis, multiple: int) -> int:
    """Units that make the channels of an axis a multiple of what the target computes at once; whole heads always do."""
    if axis.kind in ("depth", "heads") or not isinstance(axis, WidthAxis):
        return 1
    return multiple // math.gcd(multiple, axis.channels)


def together_of(axis: Axis, multiple: int) -> int:
    """Units that leave at once: a whole step, or several where the axis has very many."""
    step = step_of(axis, multiple)
    return 1 if isinstance(axis, DepthAxis) else step * math.ceil(axis.size / (step * STEPS))


def kept_count(axis: Axis, share: float, multiple: int) -> int:
    """How many units are left of an axis of which a share is to be kept, rounded to what leaves together."""
    together = together_of(axis, multiple)
    wanted = max(round(share * axis.size / together), 1) * together
    return min(max(wanted, axis.size - axis.removable), axis.size)


def chunks(axis: Axis, scores: Tensor, multiple: int) -> list[Chunk]:
    """What an axis may lose, least important first; what is left of it at the end is a whole step.

    Args:
        axis: of the network as it is.
        scores: (units,).
        multiple: of the channels that are left.
    """
    together = together_of(axis, multiple)
    order = [unit for unit in scores.argsort(stable=True).tolist() if unit not in axis.fixed]
    if isinstance(axis, DepthAxis):
        return [Chunk(axis, (unit,)) for unit in order[: axis.removable]]
    first = axis.size % together or together  # what is left is then a multiple of `together`
    found, at = [], 0
    while at + (size := first if at == 0 else together) < axis.size:
        found.append(Chunk(axis, tuple(order[at : at + size])))
        at += size
    return found


def least_important(found: Sequence[Chunk], losses: Mapping[Chunk, float], removed: int) -> list[Chunk]:
    """The chunks of one axis that lose least, as many as come to that many units; a smaller first one always goes.

    Args:
        found: what `chunks` gave.
        losses: of each.
        removed: units.
    """
    odd = bool(found) and len(found[0].units) < len(found[-1].units)
    chosen, left = list[Chunk](), removed
    for one in sorted(found, key=lambda one: (not (odd and one is found[0]), losses[one])):
        if len(one.units) <= left:
            chosen.append(one)
            left -= len(one.units)
    return chosen


def tree(
    found: Sequence[Chunk], losses: Mapping[Chunk, float], savings: Mapping[Name, Tensor]
) -> tuple[Item[Chunk], ...]:
    """The chunks as items, each inside the smallest block that could leave whole.

    Args:
        found: of all axes.
        losses: of each.
        savings: axis -> what each of its units saves.
    """
    blocks = [one for one in found if isinstance(one.axis, DepthAxis)]

    def around(one: Chunk) -> Chunk | None:
        mine = _places(one)
        outer = [block for block in blocks if block is not one and _inside(mine, _places(block))]
        return max(outer, key=lambda block: min(map(len, _places(block))), default=None)

    owners = {id(one): around(one) for one in found}

    def items(owner: Chunk | None) -> tuple[Item[Chunk], ...]:
        return tuple(
            Item(one, float(savings[name_of(one.axis)][list(one.units)].sum()), losses[one], items(one))
            for one in found
            if owners[id(one)] is owner
        )

    return items(None)


def _places(chunk: Chunk) -> tuple[str, ...]:
    """The modules a chunk lies in."""
    if isinstance(chunk.axis, DepthAxis):
        return tuple(path for unit in chunk.units for path in chunk.axis.units[unit])
    return (chunk.axis.module,)


def _inside(inner: Sequence[str], outer: Sequence[str]) -> bool:
    return all(any(path == one or path.startswith(f"{one}.") for one in outer) for path in inner)


def cuts_of(removed: Sequence[Chunk]) -> list[Cut]:
    """One cut for each axis that loses something."""
    lost: dict[Name, tuple[Axis, set[int]]] = {}
    for one in removed:
        lost.setdefault(name_of(one.axis), (one.axis, set()))[1].update(one.units)
    return [
        Cut(axis.kind, axis.module, axis.size, tuple(unit for unit in range(axis.size) if unit not in gone))
        for axis, gone in lost.values()
    ]
