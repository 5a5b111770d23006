"""Rounding in PyTorch, on any device: to elements, and of tensors to the grids of a quantization plan."""

from __future__ import annotations

import torch
from torch import Tensor

from export.elements import Element, element
from export.grids import Affine, Dynamic, Input, Scaled, WeightGrid

_SMALLEST_POWER, _LARGEST_POWER = -126, 127


def to_element(x: Tensor, kind: Element) -> Tensor:
    """The nearest numbers of an element, as `Element.round`; float32 of any shape."""
    if kind.is_integer:
        return torch.clamp(torch.round(x), -kind.largest, kind.largest)
    steps = torch.ldexp(torch.ones_like(x), _exponents(x, kind))
    return torch.clamp(torch.round(x / steps) * steps, -kind.largest, kind.largest)


def _exponents(x: Tensor, kind: Element) -> Tensor:
    """The power of two of the step at each number, int32."""
    return torch.clamp_min(torch.frexp(x)[1] - 1, 1 - kind.bias) - kind.mantissa


def neighbours(x: Tensor, kind: Element) -> tuple[Tensor, Tensor]:
    """The numbers of an element just below (or at) and above each x; beyond the largest, the largest two."""
    if kind.is_integer:
        below = torch.floor(x).clamp(-kind.largest, kind.largest - 1)
        return below, below + 1
    grid = torch.from_numpy(kind.numbers).to(x.device).unique()
    at = torch.searchsorted(grid, x.contiguous(), right=True).clamp(1, len(grid) - 1)
    return grid[at - 1], grid[at]


def scale_of(largest: Tensor, kind: Element, stored: str, tensor_scale: float = 1.0) -> Tensor:
    """The scales, as they act, for numbers up to `largest`; 1 where all numbers are 0.

    `float32` reaches the element's largest number. `e8m0` is the power of two of OCP MX 1.0, section 6.3: the largest
    number's exponent less the element's. `e4m3` is rounded in units of `tensor_scale`, as NVFP4's.
    """
    if stored == "e8m0":
        power = torch.frexp(largest)[1] - 1 - kind.largest_exponent
        scale = torch.ldexp(torch.ones_like(largest), power.clamp(_SMALLEST_POWER, _LARGEST_POWER))
    elif stored == "e4m3":
        scale = to_element(largest / kind.largest / tensor_scale, element("e4m3")) * tensor_scale
    else:
        scale = largest / kind.largest
    return torch.where(scale > 0, scale, torch.ones_like(scale))


def tensor_scale_of(largest: float, kind: Element) -> float:
    """The second-level scale of NVFP4: with it the block scale of the largest number is e4m3's largest.

    Source: NVIDIA, Pretraining Large Language Models with NVFP4, 2025, arXiv 2509.25149, appendix B.
    """
    return max(largest, 1e-12) / (kind.largest * element("e4m3").largest)


def round_input(x: Tensor, grid: Input, axis: int = -1) -> Tensor:
    """Quantize and dequantize an activation, float32 of any shape; its channels are along `axis`."""
    if isinstance(grid, Affine):
        quantized = torch.clamp(torch.round(x / grid.scale) + grid.zero_point, 0, grid.levels)
        return (quantized - grid.zero_point) * grid.scale
    if isinstance(grid, Scaled):
        return to_element(x / grid.scale, element(grid.element)) * grid.scale
    return _round_dynamic(x.movedim(axis, -1), grid).movedim(-1, axis)


def _round_dynamic(x: Tensor, grid: Dynamic) -> Tensor:
    kind = element(grid.element)
    channels = x.shape[-1]
    group = grid.group or channels
    padded = torch.nn.functional.pad(x, (0, -channels % group)).unflatten(-1, (-1, group))
    scale = scale_of(padded.abs().amax(-1, keepdim=True), kind, grid.stored, grid.tensor_scale)
    return (to_element(padded / scale, kind) * scale).flatten(-2)[..., :channels]


def scales_of(grid: WeightGrid, columns: int, device: torch.device) -> Tensor:
    """The scale of every number of a row, (out_channels or 1, 1 or columns)."""
    return torch.from_numpy(grid.scales(columns)).to(device)


def round_weight(rows: Tensor, grid: WeightGrid) -> Tensor:
    """The weights (out_channels, in_channels x kernel) that a grid gives for these, float32."""
    scales = scales_of(grid, rows.shape[1], rows.device)
    if grid.numbers is not None:
        return torch.from_numpy(grid.numbers).to(rows.device).float() * scales
    return to_element(rows / scales, element(grid.element)) * scales
