"""Activation observers: a streamed histogram per tensor, and the ranges read from it."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from compress.errors import PassError
from export.quant_plan import Affine

HALF = 4096
"""Bins on either side of zero."""

SHARES = torch.linspace(1.0, 0.3, 57)
"""Of a bound, tried by `mse`."""

TAIL = 1e-5
"""The share of numbers that `percentile` clips at either end."""


class Histogram:
    """Counts of everything seen, over [-limit, limit]; `limit` is a power of two and doubles when it is exceeded.

    Memory is constant. A grid of 256 levels that spans the whole range still has 16 to 32 bins per level.
    """

    def __init__(self) -> None:
        self.counts = torch.zeros(2 * HALF, dtype=torch.float64)
        self.limit = 0.0
        self.low, self.high = math.inf, -math.inf

    def update(self, x: Tensor) -> None:
        """Count the numbers of a float tensor of any shape.

        Raises:
            PassError: one of them is not finite.
        """
        low, high = (float(bound) for bound in torch.aminmax(x.detach()))
        if not math.isfinite(low) or not math.isfinite(high):
            raise PassError("an activation is not finite in the uncompressed model")
        self.low, self.high = min(self.low, low), max(self.high, high)
        largest = max(-low, high)
        if not self.limit:
            self.limit = 2.0 ** math.ceil(math.log2(max(largest, 1e-6)))
        while largest > self.limit:
            merged = self.counts.reshape(-1, 2).sum(1)
            self.counts = torch.zeros_like(self.counts)
            self.counts[HALF // 2 : HALF // 2 + HALF] = merged
            self.limit *= 2
        self.counts += torch.histc(x.detach().float(), 2 * HALF, -self.limit, self.limit)

    def grid(self, observer: str) -> Affine:
        """The 8-bit grid an observer chooses: `minmax`, `percentile` or `mse`."""
        return {"minmax": self._minmax, "percentile": self._percentile, "mse": self._mse}[observer]()

    def _minmax(self) -> Affine:
        return Affine.of_range(self.low, self.high)

    def _percentile(self) -> Affine:
        share = torch.cumsum(self.counts, 0) / self.counts.sum()
        edges = torch.linspace(-self.limit, self.limit, 2 * HALF + 1, dtype=torch.float64)
        low = float(edges[int(torch.searchsorted(share, TAIL))])
        high = float(edges[min(int(torch.searchsorted(share, 1 - TAIL)) + 1, 2 * HALF)])
        return Affine.of_range(max(low, self.low), min(high, self.high))

    def _mse(self) -> Affine:
        """Shrink the upper, then the lower bound, twice, to what minimises the mean squared error over all seen."""
        used = self.counts.nonzero()[:, 0]
        values = ((used.double() + 0.5 - HALF) * (self.limit / HALF)).float()
        weights = (self.counts[used] / self.counts.sum()).float()
        low, high = torch.tensor([min(self.low, 0.0)]), torch.tensor([max(self.high, 0.0)])
        for _ in range(2):
            high = (candidates := high * SHARES)[_errors(values, weights, low, candidates).argmin()]
            low = (candidates := low * SHARES)[_errors(values, weights, candidates, high).argmin()]
        return Affine.of_range(float(low), float(high))


def _errors(values: Tensor, weights: Tensor, low: Tensor, high: Tensor) -> Tensor:
    """The mean squared error (candidates,) of the grids over [low, high]."""
    low, high = torch.broadcast_tensors(low, high)
    scale = ((high - low) / 255).clamp_min(1e-8)[:, None]
    zero_point = torch.round(-low[:, None] / scale)
    rounded = torch.clamp(torch.round(values / scale) + zero_point, 0, 255)
    return (((rounded - zero_point) * scale - values) ** 2 * weights).sum(1)
