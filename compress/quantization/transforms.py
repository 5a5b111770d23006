"""What is done to the input of a layer before it is quantized, and to its weight in return."""

from __future__ import annotations

import torch
from torch import Tensor

from export.quant_plan import LayerQuant, LowRank
from export.stored_weights import hadamard


def largest_rotation(channels: int) -> int:
    """The greatest power of two that divides the channels."""
    return channels & -channels


class Rotation:
    """Rotates the last axis in blocks of `size`; twice gives the same again. A size of 0 leaves all as it is."""

    def __init__(self, size: int, device: torch.device) -> None:
        self._matrix = torch.from_numpy(hadamard(size)).to(device) if size else None

    def __call__(self, x: Tensor) -> Tensor:
        """Float32 of any shape."""
        if self._matrix is None:
            return x
        return (x.unflatten(-1, (-1, len(self._matrix))) @ self._matrix).flatten(-2)


class InputTransform:
    """Makes of an input what the quantized weight sees, before rounding: smoothed, then rotated."""

    def __init__(self, quant: LayerQuant, device: torch.device) -> None:
        self._smooth = None if quant.smooth is None else torch.from_numpy(quant.smooth).to(device)
        if self._smooth is not None and quant.op == "conv":
            self._smooth = self._smooth[:, None, None]
        self._rotation = Rotation(quant.rotation, device)

    def __call__(self, x: Tensor) -> Tensor:
        """Channels are last for `linear`, and third from the end for `conv`."""
        return self._rotation(x if self._smooth is None else x / self._smooth)


def weight_of(weight: Tensor, quant: LayerQuant) -> Tensor:
    """The rows (out_channels, in_channels x kernel) that act on the transformed input, without the low-rank branch."""
    rows = weight.detach().float().flatten(1)
    if quant.smooth is not None:
        smooth = torch.from_numpy(quant.smooth).to(rows.device)
        rows = rows * smooth.repeat_interleave(rows.shape[1] // len(smooth))
    rows = Rotation(quant.rotation, rows.device)(rows)
    if quant.low_rank is not None:
        rows = rows - product(quant.low_rank, rows.device)
    return rows


def product(branch: LowRank, device: torch.device) -> Tensor:
    """The matrix (out_channels, in_channels x kernel) of a low-rank branch."""
    return torch.from_numpy(branch.up).to(device).float() @ torch.from_numpy(branch.down).to(device).float()
