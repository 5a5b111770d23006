"""GPTQ: weights are rounded column after column, and the rest makes good for the error of each.

Source: Frantar et al. 2023, arXiv 2210.17323, algorithm 1, with its order of columns by falling diagonal.
"""

from __future__ import annotations

import torch
from torch import Tensor

from compress.quantization.rounding import scales_of, to_element
from export.elements import element
from export.grids import WeightGrid

BLOCK = 128
DAMPING = 0.01


def gptq(rows: Tensor, grid: WeightGrid, moments: Tensor) -> Tensor:
    """Rounded weights, on the grid, float32 (out_channels, columns).

    Args:
        rows: the float weights.
        grid: their scales, which stay.
        moments: (columns, columns), the mean outer product of the inputs, float32.
    """
    kind = element(grid.element)
    scales = scales_of(grid, rows.shape[1], rows.device).expand(-1, rows.shape[1])
    moments = moments.double()
    dead = moments.diagonal() <= 0
    moments[dead, dead] = 1.0
    order = moments.diagonal().argsort(descending=True, stable=True)
    moments = moments[order][:, order]
    moments.diagonal().add_(DAMPING * moments.diagonal().mean())
    inverse = torch.linalg.cholesky(torch.cholesky_inverse(torch.linalg.cholesky(moments)), upper=True).float()
    left, scales = rows[:, order].clone(), scales[:, order]
    rounded = torch.empty_like(left)
    for first in range(0, left.shape[1], BLOCK):
        last = min(first + BLOCK, left.shape[1])
        errors = torch.empty_like(left[:, first:last])
        for at in range(first, last):
            column, scale = left[:, at], scales[:, at]
            rounded[:, at] = to_element(column / scale, kind) * scale
            error = (column - rounded[:, at]) / inverse[at, at]
            left[:, at:last] -= error[:, None] * inverse[at, at:last]
            errors[:, at - first] = error
        left[:, last:] -= errors @ inverse[first:last, last:]
    return rounded[:, order.argsort()]
