"""All axes of a network, and one of them by its name."""

from __future__ import annotations

from collections.abc import Sequence

from compress.pruning.axis import KINDS, Axis, CutError, Kind, Network
from compress.pruning.depths import depth_axes
from compress.pruning.widths import width_axis


def axes_of(network: Network, kinds: Sequence[Kind] = KINDS, within: str = "") -> list[Axis]:
    """The axes of some kinds whose module lies within a path, in the order of the modules; those of depth first."""
    found: list[Axis] = list(depth_axes(network)) if "depth" in kinds else []
    for path, _ in network.named_modules():
        for kind in kinds:
            axis = width_axis(network, kind, path) if kind != "depth" else None
            if axis is not None:
                found.append(axis)
    return [axis for axis in found if axis.module.startswith(within)]


def axis_named(network: Network, kind: str, module: str) -> Axis:
    """The axis of a kind that belongs to a module.

    Raises:
        CutError: the network has no such axis.
    """
    if kind not in KINDS:
        raise CutError(f"{kind!r} is no axis; there are {', '.join(KINDS)}")
    found: Axis | None = None
    if kind == "depth":
        found = next((axis for axis in depth_axes(network) if axis.module == module), None)
    elif module in dict(network.named_modules()):
        found = width_axis(network, kind, module)
    if found is None:
        raise CutError(f"the network has no axis {kind} of a module {module!r}")
    return found
