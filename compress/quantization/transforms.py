"""What is done to the input of a layer before it is quantized, and to its weight in return."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from export.quant_plan import LayerQuant, LowRank
from export.stored_weights import hadamard


def largest_rotation(channels: int) -> int:
    """The greatest power of two that divides the channels."""
    return channels & -channels


class Rotation(nn.Module):
    """Rotates the last axis in blocks of `size`; twice gives the same again. A size of 0 leaves all as it is."""

    matrix: Tensor | None

    def __init__(self, size: int, device: torch.device) -> None:
        super().__init__()
        matrix = torch.from_numpy(hadamard(size)).to(device) if size else None
        self.register_buffer("matrix", matrix, persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        """Float32 of any shape."""
        if self.matrix is None:
            return x
        return (x.unflatten(-1, (-1, len(self.matrix))) @ self.matrix).flatten(-2)


class InputTransform(nn.Module):
    """Makes of an input what the quantized weight sees, before rounding: smoothed, then rotated."""

    smooth: Tensor | None

    def __init__(self, quant: LayerQuant, device: torch.device) -> None:
        super().__init__()
        smooth = None if quant.smooth is None else torch.from_numpy(quant.smooth).to(device)
        if smooth is not None and quant.op == "conv":
            smooth = smooth[:, None, None]
        self.register_buffer("smooth", smooth, persistent=False)
        self.rotation = Rotation(quant.rotation, device)

    def forward(self, x: Tensor) -> Tensor:
        """Channels are last for `linear`, and third from the end for `conv`."""
        turned: Tensor = self.rotation(x if self.smooth is None else x / self.smooth)
        return turned


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
