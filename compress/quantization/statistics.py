"""What calibration keeps of a layer: histograms of its input and output, and some rows of its input, in a file."""

from __future__ import annotations

import contextlib
import json
import math
import weakref
import zlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from compress.errors import PassError
from compress.quantization.observers import Histogram

_LEAST = 0.25
"""Of the rows of a call that counts 1: calls that count more give more of them."""

_ROWS, _LAYERS, _COUNTS = "rows.bin", "layers.json", "histograms.safetensors"


class RowFile:
    """Rows of many layers in one file, in the order they came; what is written is only read again when asked for.

    Args:
        file: empty, or to be read; it is closed with the last one who may ask for rows.
    """

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        weakref.finalize(self, file.close)
        self._end = 0

    def append(self, rows: Tensor) -> tuple[int, int]:
        """Write float32 (rows, columns); gives the place and the number of rows."""
        at = self._end
        self._file.seek(at)
        self._end += self._file.write(rows.contiguous().numpy().data)
        return at, len(rows)

    def read(self, places: Sequence[tuple[int, int]], columns: int) -> Tensor:
        """Those rows, float32 (rows, columns)."""
        found = np.empty((sum(count for _, count in places), columns), np.float32)
        done = 0
        for at, count in places:
            self._file.seek(at)
            part = found[done : done + count]
            if self._file.readinto(part.reshape(-1).view(np.uint8)) != part.nbytes:  # type: ignore[attr-defined]
                raise PassError("the stored calibration is shorter than it says")
            done += count
        return torch.from_numpy(found)


class LayerStatistics:
    """Of one layer, over all its calls.

    Attributes:
        input: a histogram of the input.
        output: of the output of a convolution; None of a linear layer.
        places: of its rows in the file, call by call.
        weights: of the same calls: how much each of their rows counts.
        positions: as many outputs of each channel it gave in all.
    """

    def __init__(self, file: RowFile, columns: int, input_: Histogram, output: Histogram | None) -> None:
        self.input, self.output = input_, output
        self.places: list[tuple[int, int]] = []
        self.weights: list[float] = []
        self.positions = 0
        self.columns = columns
        self._file = file

    @property
    def rows(self) -> Tensor:
        """Rows of the input at random places, as many of every call: float32 (rows, in_channels x kernel), on CPU."""
        return self._file.read(self.places, self.columns)

    @property
    def row_weights(self) -> Tensor:
        """How much each of the rows counts, float32 (rows,); 1 on average."""
        counts = torch.tensor([count for _, count in self.places])
        weights = torch.tensor(self.weights).repeat_interleave(counts)
        return weights / weights.mean()

    def calls_of_rows(self, calls: int, batches: int) -> Tensor:
        """Which network call each row is from, int64 (rows,).

        Args:
            calls: of the network in one run.
            batches: runs; a layer may be called several times, but always as often.
        """
        each = max(1, len(self.places) // (calls * batches))
        return torch.cat([torch.full((count,), at // each % calls) for at, (_, count) in enumerate(self.places)])


class Observed(LayerStatistics):
    """Statistics that are still being taken.

    Args:
        name: of the layer, which chooses the places that are kept.
        layer: linear or convolution.
        rows_a_call: to keep of each call that counts 1.
        file: takes the rows.
    """

    def __init__(self, name: str, layer: nn.Module, rows_a_call: int, file: RowFile) -> None:
        weight: Tensor = layer.weight  # type: ignore[assignment]
        super().__init__(file, weight[0].numel(), Histogram(), Histogram() if isinstance(layer, nn.Conv2d) else None)
        self._layer: Any = layer
        self._rows_a_call = rows_a_call
        self._random = torch.Generator().manual_seed(zlib.crc32(name.encode()))

    def update(self, x: Tensor, y: Tensor, weight: float = 1.0) -> None:
        """Take the input and output of one call, and how much it counts."""
        self.input.update(x, weight)
        if self.output is not None:
            self.output.update(y, weight)
        positions = y.numel() // len(self._layer.weight)
        self.positions += positions
        if self._rows_a_call:
            rows = self._sampled(x.detach(), math.ceil(self._rows_a_call * max(weight, _LEAST))).cpu()
            self.weights.append(weight * min(self._rows_a_call, positions) / len(rows))
            self.places.append(self._file.append(rows))

    def _sampled(self, x: Tensor, most: int) -> Tensor:
        if not isinstance(self._layer, nn.Conv2d):
            rows = x.reshape(-1, x.shape[-1])
            return rows[self._places(len(rows), most).to(x.device)].float()
        layer = self._layer
        padded = nn.functional.pad(x, layer._reversed_padding_repeated_twice)
        for axis in (0, 1):
            padded = padded.unfold(2 + axis, layer.kernel_size[axis], layer.stride[axis])
        samples, _, high, wide = padded.shape[:4]
        at = self._places(samples * high * wide, most).to(x.device)
        patches = padded[at // (high * wide), :, at // wide % high, at % wide]
        return patches.flatten(1).float()

    def _places(self, count: int, most: int) -> Tensor:
        return torch.arange(count) if count <= most else torch.randint(count, (most,), generator=self._random)


Key = tuple[str, str]
"""(part, layer)."""


@contextlib.contextmanager
def writing(folder: Path) -> Iterator[RowFile]:
    """The file of rows of a folder, while they are taken."""
    with (folder / _ROWS).open("w+b") as file:
        yield RowFile(file)


def save(folder: Path, seen: Mapping[Key, LayerStatistics]) -> None:
    """Write what belongs to the rows that the folder already has."""
    layers, counts = [], dict[str, Tensor]()
    for at, ((part, name), one) in enumerate(seen.items()):
        histograms = {"input": one.input} | ({} if one.output is None else {"output": one.output})
        bounds = {kind: [found.limit, found.low, found.high] for kind, found in histograms.items()}
        counts |= {f"{at}.{kind}": found.counts for kind, found in histograms.items()}
        layers.append([part, name, one.columns, one.places, one.weights, one.positions, bounds])
    (folder / _LAYERS).write_text(json.dumps(layers), encoding="utf-8")
    save_file(counts, folder / _COUNTS)


def load(folder: Path) -> dict[Key, LayerStatistics]:
    """What `save` wrote; the rows stay in their file, which is kept open."""
    counts, file = load_file(folder / _COUNTS), RowFile((folder / _ROWS).open("rb"))
    seen = {}
    for at, layer in enumerate(json.loads((folder / _LAYERS).read_bytes())):
        part, name, columns, places, weights, positions, bounds = layer
        histograms = {kind: Histogram.of(counts[f"{at}.{kind}"], *numbers) for kind, numbers in bounds.items()}
        one = LayerStatistics(file, columns, histograms["input"], histograms.get("output"))
        one.places = [(int(place), int(count)) for place, count in places]
        one.weights, one.positions = weights, positions
        seen[part, name] = one
    return seen
