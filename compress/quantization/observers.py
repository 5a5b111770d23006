"""Activation observers: a streamed histogram per tensor, and the grids read from it."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from compress.errors import PassError
from compress.quantization.rounding import to_element
from export.elements import Element, element
from export.grids import Affine, Scaled

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

    @classmethod
    def of(cls, counts: Tensor, limit: float, low: float, high: float) -> Histogram:
        """One with what another one has counted."""
        made = cls()
        made.counts, made.limit, made.low, made.high = counts, limit, low, high
        return made

    def update(self, x: Tensor, weight: float = 1.0) -> None:
        """Count the numbers of a float tensor of any shape.

        Args:
            x: to count.
            weight: how much each of them counts.

        Raises:
            PassError: one of them is not finite.
        """
        low, high = torch.stack(torch.aminmax(x.detach())).tolist()
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
        self.counts += weight * torch.histc(x.detach().float(), 2 * HALF, -self.limit, self.limit).double().cpu()

    def clipped(self, low: float, high: float) -> float:
        """What cutting off at `low` and `high` loses: its squared error, of the square of all seen."""
        values, weights = self._seen()
        lost = (values - values.clamp(low, high)).square() * weights
        return float(lost.sum() / (values.square() * weights).sum().clamp_min(1e-20))

    def grid(self, observer: str, bits: int = 8) -> Affine:
        """The asymmetric grid an observer chooses: `minmax`, `percentile` or `mse`."""
        if observer == "minmax":
            return Affine.of_range(self.low, self.high, bits)
        return Affine.of_range(*(self._percentile() if observer == "percentile" else self._mse(bits)), bits)

    def scaled(self, observer: str, elements: Sequence[str]) -> Scaled:
        """The symmetric grid an observer chooses, with the element that has the least mean squared error."""
        low, high = self._percentile() if observer == "percentile" else (self.low, self.high)
        largest = max(-low, high, 1e-8)
        values, weights = self._seen()
        shares = SHARES if observer == "mse" else SHARES[:1]
        best: tuple[float, Scaled] | None = None
        for kind in map(element, elements):
            scales = (shares * (largest / kind.largest))[:, None]
            errors = _scaled_errors(values, weights, scales, kind)
            at = int(errors.argmin())
            if best is None or float(errors[at]) < best[0]:
                best = float(errors[at]), Scaled(kind.name, float(scales[at]))
        if best is None:
            raise ValueError("there are no elements")
        return best[1]

    def _seen(self) -> tuple[Tensor, Tensor]:
        """The middles of the bins that hold something, and the share of each."""
        used = self.counts.nonzero()[:, 0]
        values = ((used.double() + 0.5 - HALF) * (self.limit / HALF)).float()
        return values, (self.counts[used] / self.counts.sum()).float()

    def _percentile(self) -> tuple[float, float]:
        share = torch.cumsum(self.counts, 0) / self.counts.sum()
        edges = torch.linspace(-self.limit, self.limit, 2 * HALF + 1, dtype=torch.float64)
        low = float(edges[int(torch.searchsorted(share, TAIL))])
        high = float(edges[min(int(torch.searchsorted(share, 1 - TAIL)) + 1, 2 * HALF)])
        return max(low, self.low), min(high, self.high)

    def _mse(self, bits: int) -> tuple[float, float]:
        """Shrink the upper, then the lower bound, twice, to what minimises the mean squared error over all seen."""
        values, weights = self._seen()
        low, high = values.new_tensor([min(self.low, 0.0)]), values.new_tensor([max(self.high, 0.0)])
        for _ in range(2):
            high = (candidates := high * SHARES)[_errors(values, weights, low, candidates, bits).argmin()]
            low = (candidates := low * SHARES)[_errors(values, weights, candidates, high, bits).argmin()]
        return float(low), float(high)


def _errors(values: Tensor, weights: Tensor, low: Tensor, high: Tensor, bits: int) -> Tensor:
    """The mean squared error (candidates,) of the grids over [low, high]."""
    low, high = torch.broadcast_tensors(low, high)
    levels = 2**bits - 1
    scale = ((high - low) / levels).clamp_min(1e-8)[:, None]
    zero_point = torch.round(-low[:, None] / scale)
    rounded = torch.clamp(torch.round(values / scale) + zero_point, 0, levels)
    return (((rounded - zero_point) * scale - values) ** 2 * weights).sum(1)


def _scaled_errors(values: Tensor, weights: Tensor, scales: Tensor, kind: Element) -> Tensor:
    """The mean squared error (candidates,) of symmetric grids of the scales (candidates, 1)."""
    return ((to_element(values / scales, kind) * scales - values) ** 2 * weights).sum(1)
