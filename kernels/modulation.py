"""Shifts, scales and gates of tokens: one row of channels per sample."""

from __future__ import annotations

import torch

from kernels.errors import KernelError


def check_modulation(x: torch.Tensor, **rows: torch.Tensor) -> None:
    """Refuse what is not one row per sample; a kernel would read beyond it.

    Args:
        x: (batch, tokens, channels).
        rows: by name, (batch, channels) each.

    Raises:
        KernelError: a shape is another.
    """
    if x.ndim != 3:
        raise KernelError(f"tokens must be (batch, tokens, channels), not {tuple(x.shape)}")
    for name, row in rows.items():
        if row.shape != (x.shape[0], x.shape[2]):
            raise KernelError(
                f"the {name} must be {(x.shape[0], x.shape[2])} as the tokens are, not {tuple(row.shape)}"
            )
