"""The record of what was cut out of a network, as plain data that is checked and applied again before weights load."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from compress.pruning.axes import axis_named
from compress.pruning.axis import CutError, Network
from compress.pruning.configuration import expressed

STRUCTURE_FILE = "structure.json"
"""Beside the weights of a network that its config.json alone does not describe."""
FORMAT = 1
_MOST_CUTS = 10_000
_MOST_UNITS = 1_000_000


@dataclass(frozen=True)
class Cut:
    """What is left of one axis.

    Attributes:
        axis: its kind.
        module: the path of its module when this cut is made.
        size: units it has then.
        kept: those that stay.
    """

    axis: str
    module: str
    size: int
    kept: tuple[int, ...]

    def make(self, network: Network) -> None:
        """Cut the network.

        Raises:
            CutError: it has no such axis, of another size, or cannot lose these units.
        """
        axis = axis_named(network, self.axis, self.module)
        if axis.size != self.size:
            raise CutError(
                f"the axis {self.axis} of {self.module!r} has {axis.size} units, but {self.size} are written down"
            )
        axis.cut(network, self.kept)


@dataclass(frozen=True)
class Structure:
    """Cuts in the order they were made, on the network that its configuration describes."""

    cuts: tuple[Cut, ...] = ()

    def apply(self, network: Network) -> None:
        """Make all cuts on a network that has none; its weights may be on the meta device.

        Raises:
            CutError: one of them cannot be made.
        """
        for cut in self.cuts:
            cut.make(network)

    def to_json(self) -> str:
        """The content of structure.json."""
        return json.dumps({"format": FORMAT, "cuts": [asdict(cut) for cut in self.cuts]}, indent=1) + "\n"

    @classmethod
    def from_dict(cls, raw: Mapping[str, Any]) -> Structure:
        """Read what `to_json` wrote; every name, type and number of an untrusted file is checked here or by `apply`.

        Raises:
            CutError: it is something else.
        """
        if set(raw) != {"format", "cuts"} or raw["format"] != FORMAT:
            raise CutError(f"it must have format {FORMAT} and cuts, and nothing else")
        if not isinstance(raw["cuts"], list) or not 0 < len(raw["cuts"]) <= _MOST_CUTS:
            raise CutError(f"cuts must be a list of 1 to {_MOST_CUTS}")
        return cls(tuple(_cut(index, entry) for index, entry in enumerate(raw["cuts"])))


def _cut(index: int, raw: Any) -> Cut:
    if not isinstance(raw, dict) or set(raw) != {"axis", "module", "size", "kept"}:
        raise CutError(f"cuts[{index}] must have axis, module, size and kept, and nothing else")
    if not isinstance(raw["axis"], str) or not isinstance(raw["module"], str):
        raise CutError(f"cuts[{index}]: axis and module must be text")
    kept = raw["kept"]
    if not isinstance(kept, list) or not all(_is_number(number) for number in (raw["size"], *kept)):
        raise CutError(f"cuts[{index}]: size must be a whole number from 0 to {_MOST_UNITS}, and kept a list of them")
    return Cut(raw["axis"], raw["module"], raw["size"], tuple(kept))


def _is_number(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value <= _MOST_UNITS


def prune(network: Network, cuts: Sequence[Cut], structure: Structure) -> Structure:
    """Make cuts that are all named as the network is now, and write down those that no configuration can express.

    Blocks leave first; where nothing else has been cut, that only changes the configuration. What comes after them is
    renamed as the modules are, and left out where they are gone.

    Args:
        network: to be cut, in place.
        cuts: at most one of an axis.
        structure: what has been cut out of it before.

    Returns:
        The structure that makes the network out of its (new) configuration.

    Raises:
        CutError: a cut cannot be made.
    """
    ordered = sorted(cuts, key=lambda cut: (cut.axis != "depth", _expressible(network, cut) is None))
    modules = {cut.module: network.get_submodule(cut.module) for cut in ordered}
    made = list(structure.cuts)
    for cut in ordered:
        path = next((path for path, module in network.named_modules() if module is modules[cut.module]), None)
        if path is None:
            continue
        renamed = Cut(cut.axis, path, cut.size, cut.kept)
        changes = None if made else _expressible(network, renamed)
        renamed.make(network)
        if changes is None:
            made.append(renamed)
        else:
            network.register_to_config(**changes)
    return Structure(tuple(made))


def _expressible(network: Network, cut: Cut) -> dict[str, Any] | None:
    return expressed(network, cut.module, cut.kept) if cut.axis == "depth" else None
