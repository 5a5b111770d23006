"""Segments: the units of a denoiser, gathered along the paths of a layout into modules that can be traced."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar, NamedTuple, TypeAlias

import torch
from torch import Tensor, nn

from compress.errors import RefusedError
from compress.families.layout import FULL, Layout
from compress.families.sublayers import Sublayer, intercepted
from export.step_plan import Slot

PAIR_SHARE = 0.05
"""Where every cached path holds at most this share of the parameters, each path is one segment."""

Network: TypeAlias = Any
"""An nn.Module of diffusers or transformers, whose attributes (config, blocks) the type checker does not know."""


@dataclass(frozen=True)
class Unit:
    """The smallest part of a denoiser at which it can be cut: a pure function of named tensors.

    Attributes:
        name: of the unit.
        inputs, outputs: names of tensors; what no unit outputs is given from outside.
        run: `run(denoiser, *inputs)` gives the outputs.
        modules: paths of the modules and lone parameters that it runs.
    """

    name: str
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    run: Callable[..., tuple[Tensor, ...]]
    modules: tuple[str, ...] = ()

    def bind(self, denoiser: Network) -> DenoiserSegment:
        """Make it a module over this denoiser; the weights are shared, not copied."""
        names = ("self", *self.inputs)
        kind = inspect.Parameter.POSITIONAL_OR_KEYWORD
        signature = inspect.Signature([inspect.Parameter(name, kind) for name in names])
        run = self.run

        def forward(*args: Any, **kwargs: Any) -> tuple[Tensor, ...]:
            module, *tensors = signature.bind(*args, **kwargs).args
            return run(module.denoiser, *tensors)

        # torch.export names a graph's inputs after the parameters of `forward`, and they differ from cut to cut.
        forward.__signature__ = signature  # type: ignore[attr-defined]
        members = {"forward": forward, "inputs": self.inputs, "outputs": self.outputs}
        module: SegmentModule = type("SegmentModule", (SegmentModule,), members)(denoiser)
        module.training = denoiser.training
        return DenoiserSegment(self.name, module, self.inputs, self.outputs)


@dataclass(frozen=True)
class DenoiserSegment:
    """A row of a cut denoiser: `module(**{name: tensor for name in inputs})` is the tuple named by `outputs`."""

    name: str
    module: SegmentModule
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]


class SegmentModule(nn.Module):
    """Holds the whole denoiser under `denoiser`, so that module paths in a traced graph are those of the denoiser."""

    prefix: ClassVar[str] = "denoiser"
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]

    def __init__(self, denoiser: Network) -> None:
        super().__init__()
        self.denoiser = denoiser

    @property
    def component(self) -> Network:
        """The whole denoiser."""
        return self.denoiser


class Segmentation(NamedTuple):
    """What a step plan is made of: the segments, the paths through them, and the slots between network calls."""

    segments: list[DenoiserSegment]
    paths: dict[str, tuple[str, ...]]
    slots: dict[str, Slot]


class Program:
    """The units of a denoiser under a layout: which of them every path runs."""

    def __init__(self, denoiser: Network, units: Sequence[Unit], sublayers: Sequence[Sublayer], layout: Layout) -> None:
        """Follow every path backwards from what it must give.

        Raises:
            RefusedError: a slot keeps what no unit computes, or a path computes what it reads.
        """
        self._denoiser = denoiser
        self._output = units[-1].outputs[-1]
        self._layout = layout
        self._units = used(units, {self._output, *layout.watch, *_kept(layout)})
        self._inside = {tensor: sublayer for sublayer in sublayers for tensor in sublayer.tensors}
        produced = {tensor for unit in units for tensor in unit.outputs}
        for tensor in (*_kept(layout), *layout.watch):
            if tensor not in produced and tensor not in self._inside:
                raise RefusedError(f"the layout keeps {tensor!r}, which no unit of the denoiser computes")
        self.runs = {path: self._needed(path) for path in layout.paths}

    def _needed(self, path: str) -> list[int]:
        """The units a path runs, in order."""
        layout = self._layout
        read = [layout.slots[name] for name in layout.paths[path].read]
        written = [layout.slots[name] for name in layout.paths[path].write]
        given = {slot.tensor for slot in read}
        want = {self._output, *(slot.tensor for slot in written), *layout.watch}
        want |= {slot.base for slot in (*read, *written) if slot.base is not None}
        want -= given
        found = []
        for at in reversed(range(len(self._units))):
            unit = self._units[at]
            if want.intersection(unit.outputs):
                if both := given.intersection(unit.outputs):
                    raise RefusedError(f"path {path!r} reads {sorted(both)[0]!r}, but its unit {unit.name!r} must run")
                found.append(at)
                want |= set(unit.inputs) - given
        return found[::-1]

    def _sublayers(self, names: Sequence[str]) -> list[Sublayer]:
        """The sub-layers that some slots keep."""
        found = [self._inside[self._layout.slots[name].tensor] for name in names if self._within(name)]
        return list(dict.fromkeys(found))

    def _within(self, slot: str) -> bool:
        return self._layout.slots[slot].tensor in self._inside

    def parameter_share(self, path: str) -> float:
        """The parameters at or below the modules that a path runs, as a fraction of all."""
        tops = [module for at in self.runs[path] for module in self._units[at].modules]
        left_out = [sublayer.module for sublayer in self._sublayers(self._layout.paths[path].read)]
        sizes = {name: parameter.numel() for name, parameter in self._denoiser.named_parameters()}
        used = [name for name in sizes if _under(name, tops) and not _under(name, left_out)]
        return sum(sizes[name] for name in used) / sum(sizes.values())

    def segmentation(self) -> Segmentation:
        """Share segments between the paths; or make one of each path where sharing gains nothing or cannot be."""
        layout = self._layout
        cached = [path for path in layout.paths if path != FULL]
        inside = any(self._within(name) for name in layout.slots)
        if inside and layout.watch:
            raise RefusedError("a layout with slots inside units has one segment per path, in which nothing is watched")
        if not layout.watch and (inside or max(map(self.parameter_share, cached)) <= PAIR_SHARE):
            return self._one_per_path()
        return self._shared()

    def path_unit(self, path: str) -> Unit:
        """A whole path as one unit. Residuals are then taken inside it, and kept as features."""
        layout, units = self._layout, [self._units[at] for at in self.runs[path]]
        read, write = layout.paths[path].read, layout.paths[path].write
        watched, replaced = self._sublayers(write), self._sublayers(read)
        crossing = {name: _crossing(name, layout.slots[name]) for name in layout.slots}
        made = {tensor for unit in units for tensor in unit.outputs}
        taken = {layout.slots[name].tensor for name in read}
        outside = [tensor for unit in units for tensor in unit.inputs if tensor not in made | taken]
        inputs = tuple(dict.fromkeys([*outside, *(crossing[name] for name in read)]))
        outputs = (*(crossing[name] for name in write), self._output)

        def run(denoiser: Network, *tensors: Tensor) -> tuple[Tensor, ...]:
            known = dict(zip(inputs, tensors, strict=True))
            waiting = {name: layout.slots[name] for name in read if layout.slots[name].base is not None}
            # A stream that has no slot is one that nothing on this path reads: what it is, is never computed.
            unread = torch.zeros(1, device=next(denoiser.parameters()).device)
            given = {sublayer: [known.get(tensor, unread) for tensor in sublayer.tensors] for sublayer in replaced}
            with intercepted(denoiser, watched, given) as seen:
                for unit in units:
                    for name in [name for name, slot in waiting.items() if slot.tensor in unit.inputs]:
                        slot = waiting.pop(name)
                        known[slot.tensor] = known[str(slot.base)] + known[crossing[name]]
                    given_here = (known[key] for key in unit.inputs)
                    known.update(zip(unit.outputs, unit.run(denoiser, *given_here), strict=True))
            known.update(seen)
            for name in write:
                slot = layout.slots[name]
                if slot.base is not None:
                    known[crossing[name]] = known[slot.tensor] - known[slot.base]
            return tuple(known[key] for key in outputs)

        return Unit(path, inputs, outputs, run)

    def _one_per_path(self) -> Segmentation:
        segments = [self.path_unit(path).bind(self._denoiser) for path in self._layout.paths]
        slots = {
            name: replace(slot, tensor=_crossing(name, slot), kind="feature", base=None)
            for name, slot in self._layout.slots.items()
        }
        return Segmentation(segments, {path: (path,) for path in self._layout.paths}, slots)

    def _shared(self) -> Segmentation:
        """Maximal runs of units that are run by the same paths."""
        users = [tuple(path for path in self.runs if at in self.runs[path]) for at in range(len(self._units))]
        groups: list[list[int]] = []
        for at in range(len(self._units)):
            if groups and users[at] == users[groups[-1][-1]]:
                groups[-1].append(at)
            else:
                groups.append([at])
        units = [self._joined(group) for group in groups]
        paths = {
            path: tuple(unit.name for unit, group in zip(units, groups, strict=True) if group[0] in self.runs[path])
            for path in self.runs
        }
        return Segmentation([unit.bind(self._denoiser) for unit in units], paths, dict(self._layout.slots))

    def _joined(self, group: Sequence[int]) -> Unit:
        """Neighbouring units as one, which gives what others, slots, gates or the sampler take from it."""
        units = [self._units[at] for at in group]
        made = [tensor for unit in units for tensor in unit.outputs]
        inputs = tuple(dict.fromkeys(tensor for unit in units for tensor in unit.inputs if tensor not in made))
        others = [unit for at, unit in enumerate(self._units) if at not in group]
        taken = {tensor for unit in others for tensor in unit.inputs} | set(self._layout.watch) | {self._output}
        taken |= set(_kept(self._layout))
        outputs = tuple(tensor for tensor in made if tensor in taken)

        def run(denoiser: Network, *tensors: Tensor) -> tuple[Tensor, ...]:
            known = dict(zip(inputs, tensors, strict=True))
            for unit in units:
                known.update(zip(unit.outputs, unit.run(denoiser, *(known[k] for k in unit.inputs)), strict=True))
            return tuple(known[key] for key in outputs)

        name = units[0].name if len(units) == 1 else f"{units[0].name}-{units[-1].name}"
        return Unit(name, inputs, outputs, run)


def used(units: Sequence[Unit], wanted: set[str]) -> list[Unit]:
    """The units that something wanted comes of; the others are there for gates alone."""
    found: list[Unit] = []
    for unit in reversed(units):
        if wanted.intersection(unit.outputs):
            found.append(unit)
            wanted = wanted | set(unit.inputs)
    return found[::-1]


def _kept(layout: Layout) -> list[str]:
    return [tensor for slot in layout.slots.values() for tensor in (slot.tensor, slot.base) if tensor is not None]


def _crossing(name: str, slot: Slot) -> str:
    """What a path hands over for a slot where each path is one segment."""
    return slot.tensor if slot.base is None else f"{name}_residual"


def _under(name: str, tops: Sequence[str]) -> bool:
    return any(name == top or name.startswith(top + ".") for top in tops)
