"""Gradient checkpointing: the units of a denoiser keep their inputs alone, and are computed again on the way back."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from compress.families.segments import Unit, used

if TYPE_CHECKING:
    from compress.families import Family, Network


class Recomputed:
    """A whole denoiser, called as its one segment is, whose gradients take memory for one unit at a time.

    The same numbers, for one more pass forward (Chen et al. 2016, arXiv 1604.06174). A unit is the smallest part at
    which the denoiser can be cut: a resnet with its attention, a resampler, or a block of a transformer.

    Attributes:
        units: in order.
    """

    def __init__(self, family: Family, denoiser: Network) -> None:
        """Take the units of a denoiser, over its own weights."""
        self._denoiser, self._output = denoiser, family.output
        self.units: list[Unit] = used(family.units(denoiser), {family.output})

    def __call__(self, **inputs: Tensor) -> tuple[Tensor, ...]:
        """The network output, of named tensors."""
        return (self._run(inputs, self._again if torch.is_grad_enabled() else self._once),)

    def kept(self, measure: Callable[[Callable[[], object]], int], **inputs: Tensor) -> int:
        """Bytes kept on the way for going back: the inputs of all units, and what the largest keeps within.

        Args:
            measure: bytes that a call keeps.
            inputs: of the denoiser.
        """
        seen: dict[int, int] = {}
        within = [0]

        def run(unit: Unit, *tensors: Tensor) -> tuple[Tensor, ...]:
            made: list[tuple[Tensor, ...]] = []
            within.append(measure(lambda: made.append(self._once(unit, *tensors))))
            seen.update((one.untyped_storage().data_ptr(), one.untyped_storage().nbytes()) for one in tensors)
            return tuple(one.detach().requires_grad_(one.requires_grad) for one in made[0])

        self._run(inputs, run)
        return sum(seen.values()) + max(within)

    def _run(self, inputs: Mapping[str, Tensor], run: Callable[..., tuple[Tensor, ...]]) -> Tensor:
        known = dict(inputs)
        for unit in self.units:
            known.update(zip(unit.outputs, run(unit, *(known[name] for name in unit.inputs)), strict=True))
        return known[self._output]

    def _once(self, unit: Unit, *tensors: Tensor) -> tuple[Tensor, ...]:
        return unit.run(self._denoiser, *tensors)

    def _again(self, unit: Unit, *tensors: Tensor) -> tuple[Tensor, ...]:
        found: tuple[Tensor, ...] = checkpoint(
            unit.run, self._denoiser, *tensors, use_reentrant=False, preserve_rng_state=False
        )
        return found
