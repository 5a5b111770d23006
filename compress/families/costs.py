"""What the paths of a layout cost: multiply-accumulates and parameters, from shapes alone."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

from compress.families.layout import FULL, Layout
from compress.families.segments import Network, Program, Unit
from compress.families.sublayers import Sublayer


@dataclass(frozen=True)
class PathCost:
    """What one path costs.

    Attributes:
        macs_share: multiply-accumulates, as a fraction of the whole denoiser's.
        parameter_share: parameters, as a fraction of the whole denoiser's.
    """

    macs_share: float
    parameter_share: float


def path_costs(
    denoiser: Network,
    units: Sequence[Unit],
    sublayers: Sequence[Sublayer],
    layout: Layout,
    inputs: Mapping[str, Tensor],
) -> dict[str, PathCost]:
    """Path -> its cost on inputs of these shapes; nothing is run."""
    program = Program(denoiser, units, sublayers, layout)
    chains = {path: program.path_unit(path) for path in layout.paths}
    macs: dict[str, int] = {}
    with torch.no_grad(), FakeTensorMode(allow_non_fake_inputs=True):
        known = dict(inputs)
        for path, chain in chains.items():
            outputs, macs[path] = run_counted(denoiser, chain, known)
            known = outputs | known
    return {path: PathCost(macs[path] / macs[FULL], program.parameter_share(path)) for path in layout.paths}


def run_counted(denoiser: Network, unit: Unit, known: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], int]:
    """Run a unit; its outputs by name, and its multiply-accumulates (convolutions, matrix products, attention)."""
    with FlopCounterMode(display=False, custom_mapping=_UNCOUNTED) as counter:
        outputs = unit.run(denoiser, *(known[name] for name in unit.inputs))
    return dict(zip(unit.outputs, outputs, strict=True)), counter.get_total_flops() // 2


def _attention_flops(query: Sequence[int], key: Sequence[int], value: Sequence[int], *_: Any, **__: Any) -> int:
    """Of (batch, heads, tokens, width) shapes: two per multiply-accumulate of both matrix products."""
    batch, heads, queries, width = query
    return 2 * batch * heads * queries * key[2] * (width + value[3])


_UNCOUNTED = {torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: _attention_flops}
"""What FlopCounterMode does not know of."""
