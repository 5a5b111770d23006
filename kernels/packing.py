"""Two 4-bit weights in a byte, so laid out that a kernel unpacks a group without moving anything between threads.

Within each group along the inputs, byte i holds weight i in its low half and weight i + group / 2 in its high half,
each as code + 8. Weights are packed once, when an engine is made: there is plain torch for it and no kernel.
"""

from __future__ import annotations

import torch

from kernels.errors import KernelError

OFFSET = 8


def pack_int4(codes: torch.Tensor, group: int) -> torch.Tensor:
    """Pack codes (outputs, inputs), whole numbers from -8 to 7, into uint8 (outputs, inputs / 2).

    Raises:
        KernelError: a code is out of range, or groups are odd or do not divide the inputs.
    """
    if group % 2 or codes.shape[1] % group:
        raise KernelError(f"groups of {group} weights must be even and divide the {codes.shape[1]} inputs")
    if codes.numel() and not (-OFFSET <= int(codes.min()) and int(codes.max()) < OFFSET):
        raise KernelError("4-bit codes are from -8 to 7")
    halves = (codes + OFFSET).to(torch.uint8).view(len(codes), -1, 2, group // 2)
    return (halves[:, :, 0] | (halves[:, :, 1] << 4)).reshape(len(codes), -1).contiguous()


def unpack_int4(packed: torch.Tensor, group: int) -> torch.Tensor:
    """The int8 codes (outputs, inputs) of packed weights (outputs, inputs / 2)."""
    halves = packed.view(len(packed), -1, 1, group // 2)
    codes = torch.cat([halves & 15, halves >> 4], dim=2).to(torch.int8) - OFFSET
    return codes.reshape(len(packed), -1)
