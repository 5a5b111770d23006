"""The layout of a cut denoiser as plain data: what is kept between network calls, and which paths read it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from export.step_plan import Slot

FULL = "full"
"""The path that computes everything."""


@dataclass(frozen=True)
class LayoutPath:
    """One way through a denoiser.

    Attributes:
        read: slots whose tensors are not computed but read.
        write: slots a step may fill from what this path computes.
    """

    read: tuple[str, ...] = ()
    write: tuple[str, ...] = ()


@dataclass(frozen=True)
class Layout:
    """Which tensors of a denoiser are kept, and which paths read them; what a path need not compute, it does not run.

    Attributes:
        slots: name -> the tensor of a unit, or of a sub-layer, that is kept.
        paths: name -> what it reads and writes; `full` computes everything, and comes first.
        watch: further tensors of units that the runtime must see (what a gate decides by).
    """

    slots: Mapping[str, Slot]
    paths: Mapping[str, LayoutPath]
    watch: tuple[str, ...] = ()

    @classmethod
    def of(cls, slots: Mapping[str, Slot], cached: Mapping[str, tuple[str, ...]]) -> Layout:
        """Make the usual layout: `full` writes every slot, every other path reads some and writes none.

        Args:
            slots: see above.
            cached: path -> the slots it reads.
        """
        readers = {name: LayoutPath(read=tuple(read)) for name, read in cached.items()}
        return cls(dict(slots), {FULL: LayoutPath(write=tuple(slots))} | readers)

    def to_dict(self) -> dict[str, Any]:
        """Return plain data for JSON."""
        return asdict(self)

    @classmethod
    def from_dict(cls, raw: Mapping[str, Any]) -> Layout:
        """Read what `to_dict` wrote.

        Raises:
            TypeError: it is something else.
        """
        paths = {name: LayoutPath(tuple(path["read"]), tuple(path["write"])) for name, path in raw["paths"].items()}
        slots = {name: Slot(**slot) for name, slot in raw["slots"].items()}
        return cls(slots, paths, tuple(raw["watch"]))
