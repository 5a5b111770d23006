"""Learned rounding: each weight goes up or down, as the output of its layer is then closest, on any element.

Source: Nagel et al. 2020, arXiv 2004.10568 (AdaRound), for integers; on the local steps of floats as Chen et al. 2024,
arXiv 2408.06995. The squared error of the output is computed from the second moments of the input, so a step needs
no data.
"""

from __future__ import annotations

import torch
from torch import Tensor

from compress.quantization.rounding import neighbours, scales_of
from export.elements import element
from export.grids import WeightGrid

STEPS = 500
RATE = 3e-2
PULL = 30.0
"""Weight of the term that pulls each choice to up or down, against the error of nearest rounding taken as 1."""
STRETCH = 1.1, -0.1
"""The sigmoid is stretched by this above 1 and below 0, and clipped, so that choices become final."""


def learned(rows: Tensor, grid: WeightGrid, moments: Tensor, steps: int = STEPS) -> Tensor:
    """Rounded weights, on the grid, float32 (out_channels, columns); the arguments are those of `gptq`."""
    kind = element(grid.element)
    scales = scales_of(grid, rows.shape[1], rows.device)
    below, above = (number * scales for number in neighbours(rows / scales, kind))
    gap = above - below
    top, bottom = STRETCH
    share = ((rows - below) / gap).clamp(0.01, 0.99)
    choices = torch.logit((share - bottom) / (top - bottom)).requires_grad_()
    nearest = torch.where(share < 0.5, below, above)
    unit = _error(nearest - rows, moments).clamp_min(1e-20)
    adam = torch.optim.Adam([choices], lr=RATE)
    with torch.enable_grad():
        for step in range(steps):
            up = torch.clamp(torch.sigmoid(choices) * (top - bottom) + bottom, 0, 1)
            loss = _error(below + gap * up - rows, moments) / unit
            if step >= steps // 5:
                sharp = 20.0 - 18.0 * (step - steps // 5) / (steps - steps // 5)
                loss = loss + PULL * (1 - (2 * up - 1).abs() ** sharp).mean()
            adam.zero_grad()
            loss.backward()
            adam.step()
    rounded = torch.where(choices.detach() >= 0, above, below)
    return rounded if _error(rounded - rows, moments) < unit else nearest


def _error(difference: Tensor, moments: Tensor) -> Tensor:
    """The mean squared error of the output, summed over channels."""
    return ((difference @ moments) * difference).sum()
