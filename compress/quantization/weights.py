"""Scales for weights: the grid of a number format that fits the weights of one layer."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from compress.quantization.rounding import scale_of, tensor_scale_of, to_element
from compress.quantization.scheme import NumberFormat
from export.elements import element
from export.grids import WeightGrid

SHARES = tuple(np.linspace(1.0, 0.5, 26).tolist())
"""Of the largest number of a group, tried as what the largest number of the element stands for."""


def weight_grid(rows: Tensor, form: NumberFormat, importance: Tensor | None = None) -> WeightGrid:
    """The scales of the weights (out_channels, in_channels x kernel), and the element where there is a choice.

    Args:
        rows: of a layer.
        form: symmetric.
        importance: mean square of every input (in_channels x kernel,); with it, each scale has the least squared error
            of the output, inputs taken as uncorrelated, and without it, it reaches the largest weight.
    """
    shares: Sequence[float] = SHARES if importance is not None else (1.0,)
    columns = rows.shape[1]
    group = form.group if form.granularity == "group" else columns
    missing = -columns % group
    blocks = torch.nn.functional.pad(rows, (0, missing)).unflatten(1, (-1, group))
    weights = torch.ones_like(rows[:1]) if importance is None else importance[None]
    weights = torch.nn.functional.pad(weights, (0, missing)).unflatten(1, (-1, group))
    if form.granularity == "tensor":
        largest = blocks.abs().amax().reshape(1, 1)
    else:
        largest = blocks.abs().amax(2)
    best: tuple[float, WeightGrid] | None = None
    for kind in map(element, form.elements):
        top = tensor_scale_of(float(largest.max()), kind) if form.stored == "e4m3" else 1.0
        scale = torch.ones_like(largest)
        least = torch.full_like(largest, torch.inf)
        for share in shares:
            tried = scale_of(share * largest, kind, form.stored, top)
            errors = ((to_element(blocks / tried[..., None], kind) * tried[..., None] - blocks).square() * weights).sum(
                2
            )
            errors = errors.sum().reshape(1, 1) if form.granularity == "tensor" else errors
            better = errors < least
            scale, least = torch.where(better, tried, scale), torch.where(better, errors, least)
        total = float(least.sum())
        if best is None or total < best[0]:
            kept = form.group if form.granularity == "group" else 0
            best = total, WeightGrid(kind.name, scale.float().cpu().numpy(), kept, form.stored, top)
    if best is None:
        raise ValueError("there are no elements")
    return best[1]


def numbers_of(rows: Tensor, grid: WeightGrid) -> np.ndarray:
    """Rounded rows (out_channels, in_channels x kernel), in units of their scales, as a grid keeps them."""
    kind = element(grid.element)
    scales = torch.from_numpy(grid.scales(rows.shape[1])).to(rows.device)
    numbers = to_element(rows / scales, kind).cpu().numpy()
    return numbers.astype(np.int8 if kind.is_integer else np.float16)
