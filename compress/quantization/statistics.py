"""What calibration keeps of a layer: histograms of its input and output, and some rows of its input."""

from __future__ import annotations

import zlib
from typing import Any

import torch
from torch import Tensor, nn

from compress.quantization.observers import Histogram


class LayerStatistics:
    """Of one layer, over all its calls.

    Attributes:
        input: a histogram of the input.
        output: of the output of a convolution; None of a linear layer.
    """

    def __init__(self, name: str, layer: nn.Module, rows_a_call: int) -> None:
        self.input = Histogram()
        self.output = Histogram() if isinstance(layer, nn.Conv2d) else None
        self._layer: Any = layer
        self._rows: list[Tensor] = []
        self._rows_a_call = rows_a_call
        self._random = torch.Generator().manual_seed(zlib.crc32(name.encode()))

    def update(self, x: Tensor, y: Tensor) -> None:
        """Take the input and output of one call."""
        self.input.update(x)
        if self.output is not None:
            self.output.update(y)
        if self._rows_a_call:
            self._rows.append(self._sampled(x.detach()).cpu())

    @property
    def rows(self) -> Tensor:
        """Rows of the input at random places, as many of every call: float32 (rows, in_channels x kernel), on CPU."""
        return torch.cat(self._rows)

    def calls_of_rows(self, calls: int, batches: int) -> Tensor:
        """Which network call each row is from, int64 (rows,).

        Args:
            calls: of the network in one run.
            batches: runs; a layer may be called several times, but always as often.
        """
        each = max(1, len(self._rows) // (calls * batches))
        return torch.cat([torch.full((len(rows),), at // each % calls) for at, rows in enumerate(self._rows)])

    def _sampled(self, x: Tensor) -> Tensor:
        if not isinstance(self._layer, nn.Conv2d):
            rows = x.reshape(-1, x.shape[-1])
            return rows[self._places(len(rows)).to(x.device)].float()
        layer = self._layer
        padded = nn.functional.pad(x, layer._reversed_padding_repeated_twice)
        for axis in (0, 1):
            padded = padded.unfold(2 + axis, layer.kernel_size[axis], layer.stride[axis])
        samples, _, high, wide = padded.shape[:4]
        at = self._places(samples * high * wide).to(x.device)
        patches = padded[at // (high * wide), :, at // wide % high, at % wide]
        return patches.flatten(1).float()

    def _places(self, count: int) -> Tensor:
        if count <= self._rows_a_call:
            return torch.arange(count)
        return torch.randint(count, (self._rows_a_call,), generator=self._random)
