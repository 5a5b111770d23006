"""Queries, keys and values for tests of attention, and what attention gives in float64."""

from __future__ import annotations

import torch
from torch import Tensor

from tests.interpreted import guarded

BATCH, HEADS = 2, 2


def heads(seed: int, tokens: int, channels: int, dtype: str, layout: str = "heads") -> Tensor:
    """Normal values (batch, heads, tokens, channels) between bands of NaN.

    Args:
        seed: of the values.
        tokens: how many.
        channels: of a head.
        dtype: its name in torch.
        layout: `heads` has the heads outside, `tokens` has the tokens outside, as a projection leaves them.
    """
    random = torch.Generator().manual_seed(seed)
    values = torch.randn(BATCH, HEADS, tokens, channels, generator=random).to(getattr(torch, dtype))
    return guarded(values) if layout == "heads" else guarded(values.transpose(1, 2).contiguous()).transpose(1, 2)


def attention_in_float64(
    query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None = None, scale: float | None = None
) -> Tensor:
    """Attention of all queries to all keys, with a bias (batch, keys); a query that sees no key gets zeros."""
    scores = query.double() @ key.double().mT * (query.shape[-1] ** -0.5 if scale is None else scale)
    if bias is not None:
        scores = scores + bias.double()[:, None, None]
    exponentials = (scores - scores.amax(-1, keepdim=True).clamp(min=-1e300)).exp()
    return exponentials @ value.double() / exponentials.sum(-1, keepdim=True).clamp(min=1e-300)
