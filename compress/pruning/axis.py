"""An axis as data: units that can leave a network together, and the slices or modules that each unit is made of."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from typing_extensions import override

Network = Any
"""A model class of diffusers."""

Kind = Literal["heads", "ffn", "resnet", "depth"]
KINDS: tuple[Kind, ...] = ("heads", "ffn", "resnet", "depth")


class CutError(ValueError):
    """A cut that a network cannot take; says which axis, and what it allows."""


@dataclass(frozen=True)
class Axis(ABC):
    """Units of a network, any of which can be removed without changing a tensor that another axis touches.

    Attributes:
        kind: of the axis.
        module: path of the module it belongs to; with the kind, its name.
        size: how many units there are.
        least: how many must be left.
        fixed: units that must be left.
    """

    kind: Kind
    module: str
    size: int
    least: int = 1
    fixed: frozenset[int] = frozenset()

    @property
    def removable(self) -> int:
        """How many units may be removed at most."""
        return self.size - max(self.least, len(self.fixed))

    @abstractmethod
    def scores(self, elements: Mapping[str, Tensor]) -> Tensor:
        """Sum a value of every parameter over each unit.

        Args:
            elements: parameter path -> tensor of the parameter's shape.

        Returns:
            float64 (size,).
        """

    @abstractmethod
    def remove(self, network: Network, kept: Sequence[int]) -> None:
        """Leave these units only; they have been checked."""

    def cut(self, network: Network, kept: Sequence[int]) -> None:
        """Leave these units only.

        Raises:
            CutError: they are no ascending units of this axis, or one that must stay is not among them.
        """
        said = f"the axis {self.kind} of {self.module!r} has units 0 to {self.size - 1}"
        if list(kept) != sorted(set(kept)) or not all(0 <= unit < self.size for unit in kept):
            raise CutError(f"{said}; kept must be some of them, ascending and once each")
        if len(kept) < self.least:
            raise CutError(f"{said}; {self.least} at least must be kept, not {len(kept)}")
        if lost := sorted(self.fixed - set(kept)):
            raise CutError(f"{said}; unit {lost[0]} cannot be removed, others depend on it")
        self.remove(network, kept)


@dataclass(frozen=True)
class Slice:
    """Where the units of an axis lie in a parameter: unit u holds `width` indices from `first + u * width` on.

    Attributes:
        parameter: its path.
        dim: 0 where units are made, 1 where they are used.
        first: index at which unit 0 begins.
        width: indices to a unit.
    """

    parameter: str
    dim: int
    first: int
    width: int


@dataclass(frozen=True)
class WidthAxis(Axis):
    """Channels inside a block: units are slices of parameters.

    Attributes:
        slices: of all parameters that make or use the channels.
        settings: (module path, attribute, amount a unit): numbers that modules know about their own size.
    """

    slices: tuple[Slice, ...] = ()
    settings: tuple[tuple[str, str, int], ...] = ()

    @property
    def channels(self) -> int:
        """Of a unit, in the layer that makes them."""
        return min(one.width for one in self.slices if one.dim == 0)

    @override
    def scores(self, elements: Mapping[str, Tensor]) -> Tensor:
        total = torch.zeros(self.size, dtype=torch.float64)
        for one in self.slices:
            values = elements[one.parameter].double()
            own = values.narrow(one.dim, one.first, self.size * one.width).movedim(one.dim, 0)
            total += own.reshape(self.size, -1).sum(1).cpu()
        return total

    @override
    def remove(self, network: Network, kept: Sequence[int]) -> None:
        """Parameters with several slices (values and gates of a GEGLU) lose all of them at once."""
        gone = sorted(set(range(self.size)) - set(kept))
        places: dict[tuple[str, int], list[int]] = {}
        for one in self.slices:
            lost = [one.first + unit * one.width + offset for unit in gone for offset in range(one.width)]
            places.setdefault((one.parameter, one.dim), []).extend(lost)
        for (path, dim), lost in places.items():
            _keep(network, path, dim, lost)
        for path, attribute, amount in self.settings:
            setattr(network.get_submodule(path), attribute, amount * len(kept))


@dataclass(frozen=True)
class DepthAxis(Axis):
    """Blocks that add to a stream: units are modules.

    Attributes:
        units: the paths of the modules of each unit.
    """

    units: tuple[tuple[str, ...], ...] = ()

    @override
    def scores(self, elements: Mapping[str, Tensor]) -> Tensor:
        def of(path: str) -> float:
            return math.fsum(float(e.double().sum()) for name, e in elements.items() if name.startswith(f"{path}."))

        return torch.tensor([math.fsum(map(of, unit)) for unit in self.units], dtype=torch.float64)

    @override
    def remove(self, network: Network, kept: Sequence[int]) -> None:
        gone = [path for unit, paths in enumerate(self.units) if unit not in set(kept) for path in paths]
        lists: dict[str, list[str]] = {}
        for path in gone:
            parent, _, name = path.rpartition(".")
            lists.setdefault(parent, []).append(name)
        for parent, names in lists.items():
            owner = network.get_submodule(parent)
            if isinstance(owner, nn.ModuleList):
                for index in sorted(map(int, names), reverse=True):
                    del owner[index]
            else:
                for name in names:
                    setattr(owner, name, None)


_SIZES: dict[type[nn.Module], tuple[str, str]] = {
    nn.Linear: ("out_features", "in_features"),
    nn.Conv2d: ("out_channels", "in_channels"),
    nn.GroupNorm: ("num_channels", ""),
}
"""Layer -> what it calls the sizes of its weight's first two dimensions."""


def _keep(network: Network, path: str, dim: int, lost: Sequence[int]) -> None:
    """Take indices out of a parameter, and tell its layer its new size."""
    owner_path, _, name = path.rpartition(".")
    owner = network.get_submodule(owner_path)
    whole: nn.Parameter = getattr(owner, name)
    gone = set(lost)
    left = torch.tensor([i for i in range(whole.shape[dim]) if i not in gone], device=whole.device)
    setattr(owner, name, nn.Parameter(whole.detach().index_select(dim, left), requires_grad=whole.requires_grad))
    if name == "weight":
        for layer, attributes in _SIZES.items():
            if isinstance(owner, layer):
                setattr(owner, attributes[dim], len(left))
