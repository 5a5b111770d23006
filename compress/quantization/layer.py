"""Quantizes one layer: smooth, rotate, branch off, scale, round, calibrate, correct; whatever of it is asked for."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn

from compress.quantization.gptq import gptq
from compress.quantization.learned_rounding import learned
from compress.quantization.low_rank import branch_of
from compress.quantization.observers import Histogram
from compress.quantization.rounding import round_input, round_weight, tensor_scale_of
from compress.quantization.scheme import SCHEMES, Scheme
from compress.quantization.statistics import LayerStatistics
from compress.quantization.transforms import Rotation, largest_rotation, product, weight_of
from compress.quantization.weights import numbers_of, weight_grid
from export.elements import element
from export.grids import Dynamic, Input
from export.quant_plan import LayerQuant, Op

Observer = Literal["minmax", "percentile", "mse"]
Rounding = Literal["nearest", "gptq", "learned"]

STRENGTHS = tuple(at / 10 for at in range(11))
"""Shares of the difficulty of activations that smoothing moves to the weights, tried for each layer."""

COLUMNS = 6144
"""Rounded together at most by `gptq` and `learned`: time grows with their cube, memory with their square."""
_TRIED = 512
"""Rows that strengths are compared on."""
_LEAST_ROTATION = 16


@dataclass(frozen=True)
class Methods:
    """How layers are quantized.

    Attributes:
        observer: how static activation ranges are chosen.
        weights: how weight scales are: `minmax` reaches the largest weight, `mse` has the least error of the output.
        smooth: divide the inputs by channel: by a given strength, or `search` for that of the least error.
        rotate: rotate the inputs of linear layers by Hadamard matrices.
        low_rank: the rank of a 16-bit branch; 0 is none.
        rounding: of the weights.
        bias_correction: add the mean error of the output to the bias.
    """

    observer: Observer = "mse"
    weights: Literal["minmax", "mse"] = "mse"
    smooth: float | Literal["search"] | None = None
    rotate: bool = False
    low_rank: int = 0
    rounding: Rounding = "nearest"
    bias_correction: bool = True

    @property
    def needs_rows(self) -> bool:
        """Whether even layers that are only stored in few bits must be watched."""
        return self.low_rank > 0 or self.rounding != "nearest"

    @property
    def looks_at_rows(self) -> bool:
        """Whether rows of the inputs are needed, beside their ranges."""
        return (
            self.needs_rows or self.weights == "mse" or self.smooth is not None or self.rotate or self.bias_correction
        )


def quantized_layer(layer: nn.Module, scheme: Scheme, seen: LayerStatistics | None, methods: Methods) -> LayerQuant:
    """The numbers of one layer, computed on the CPU: most of it is many small steps.

    Args:
        layer: linear or convolution; not changed.
        scheme: its number formats.
        seen: what calibration kept of it; None only stores the weights in few bits.
        methods: what is done.
    """
    op: Op = "conv" if isinstance(layer, nn.Conv2d) else "linear"
    weight: Any = layer.weight
    if seen is None:
        grid = weight_grid(weight.detach().float().cpu().flatten(1), scheme.weight)
        return LayerQuant(op, scheme.name, grid, None)
    work = _Work(layer, op, scheme, seen, methods)
    quant = work.transformed()
    quant = replace(quant, weight=work.weights(quant), input=work.input(quant))
    if op == "conv" and scheme.activation.dtype == "uint8" and seen.output is not None:
        quant = replace(quant, output=seen.output.grid(methods.observer))
    if methods.bias_correction and getattr(layer, "bias", None) is not None:
        quant = replace(quant, bias=work.bias(quant))
    return quant


def output_error(layer: nn.Module, quant: LayerQuant, seen: LayerStatistics) -> float:
    """The squared error of a quantized layer's output on the rows of calibration, of the output's own square."""
    made, exact = _outputs(layer, quant, seen)
    return float((made - exact).square().sum() / exact.square().sum().clamp_min(1e-20))


def channel_errors(layer: nn.Module, quant: LayerQuant, seen: LayerStatistics, calls: int, batches: int) -> Tensor:
    """The mean squared error of a quantized layer's output, float64 (calls, out_channels), on the rows of each call.

    Args:
        layer: float.
        quant: what became of it.
        seen: with rows.
        calls: see `LayerStatistics.calls_of_rows`.
        batches: likewise.
    """
    made, exact = _outputs(layer, quant, seen)
    squares, rows = (made - exact).double().square(), seen.calls_of_rows(calls, batches)
    total = squares.new_zeros(calls, squares.shape[1]).index_add_(0, rows, squares)
    return total / torch.bincount(rows, minlength=calls).clamp_min(1)[:, None]


def _outputs(layer: nn.Module, quant: LayerQuant, seen: LayerStatistics) -> tuple[Tensor, Tensor]:
    """What a quantized layer and the float one make of the rows of calibration (rows, out_channels), but its bias."""
    work = _Work(layer, quant.op, SCHEMES[quant.scheme], seen, Methods())
    exact = work.rows @ work.weight.flatten(1).T
    inputs = work.inputs(work.rows, quant)
    made = work.rounded(inputs, quant) @ round_weight(weight_of(work.weight, quant), quant.weight).T
    if quant.low_rank is not None:
        made += inputs @ product(quant.low_rank, inputs.device).T
    if quant.bias is not None:
        made += torch.from_numpy(quant.bias) - layer.bias.detach().cpu()  # type: ignore[operator]
    return made, exact


class _Work:
    """One layer, its rows, and the choices made so far in a `LayerQuant` without numbers."""

    def __init__(self, layer: Any, op: Op, scheme: Scheme, seen: LayerStatistics, methods: Methods) -> None:
        self.layer, self.op, self.scheme, self.seen, self.methods = layer, op, scheme, seen, methods
        self.weight: Tensor = layer.weight.detach().float().cpu()
        self.rows = seen.rows if methods.looks_at_rows else self.weight.new_zeros(0, self.weight[0].numel())
        self.row_weights = seen.row_weights if len(self.rows) else self.weight.new_zeros(0)
        self.channels = self.weight.shape[1]
        self.taps = self.weight[0].numel() // self.channels

    def transformed(self) -> LayerQuant:
        """Smoothing, rotation and the low-rank branch, as asked for."""
        placeholder = weight_grid(self.weight.flatten(1), self.scheme.weight)
        quant = LayerQuant(self.op, self.scheme.name, placeholder, None)
        size = largest_rotation(self.channels)
        if self.methods.rotate and self.op == "linear" and size >= _LEAST_ROTATION:
            quant = replace(quant, rotation=size)
        if self.methods.smooth is not None and self.scheme.activation.is_scaled:
            quant = replace(quant, smooth=self._smoothing(quant))
        if self.methods.low_rank and self.methods.low_rank < min(self.weight.shape[0], self.rows.shape[1]) // 2:
            moments = self._moments(self.inputs(self.rows, quant))
            rows = weight_of(self.weight, quant)
            branch = branch_of(rows, moments, self.methods.low_rank, self._nearest(moments))
            quant = replace(quant, low_rank=branch)
        return quant

    def _nearest(self, moments: Tensor) -> Callable[[Tensor], Tensor]:
        importance = moments.diagonal() if self.methods.weights == "mse" else None
        return lambda rows: round_weight(rows, weight_grid(rows, self.scheme.weight, importance))

    def _smoothing(self, quant: LayerQuant) -> np.ndarray:
        """What each channel is divided by: a power of its largest input over one of its largest weight.

        Source: Xiao et al. 2023, arXiv 2211.10438, equation 4; the strength searched as in SVDQuant.
        """
        active = self.rows.abs().amax(0).reshape(self.channels, self.taps).amax(1).clamp_min(1e-5)
        heavy = self.weight.abs().flatten(2).amax((0, 2)) if self.taps > 1 else self.weight.flatten(1).abs().amax(0)
        heavy = heavy.clamp_min(1e-5)
        given = self.methods.smooth
        strengths = STRENGTHS if given == "search" or given is None else (given,)
        few = slice(None, None, max(1, len(self.rows) // _TRIED))
        best: tuple[float, np.ndarray] | None = None
        for strength in strengths:
            vector = active**strength / heavy ** (1.0 - strength)
            vector = (vector / vector.log().mean().exp()).clamp(1e-3, 1e3)
            smooth = vector.float().cpu().numpy()
            error = 0.0 if len(strengths) == 1 else self._error(replace(quant, smooth=smooth), few)
            if best is None or error < best[0]:
                best = error, smooth
        if best is None:
            raise ValueError("no strength was tried")
        return best[1]

    def _error(self, quant: LayerQuant, few: slice) -> float:
        """The squared error of the output, rounded to the nearest with scales that reach the largest weight."""
        inputs = self.inputs(self.rows[few], quant)
        weights = weight_of(self.weight, quant)
        exact = inputs @ weights.T
        quant = replace(quant, input=self.input(quant))
        nearest = round_weight(weights, weight_grid(weights, self.scheme.weight))
        errors = (self.rounded(inputs, quant) @ nearest.T - exact).square().sum(1)
        return float((errors * self.row_weights[few]).sum())

    def inputs(self, rows: Tensor, quant: LayerQuant) -> Tensor:
        """Rows as the quantized weight sees them, before rounding."""
        if quant.smooth is not None:
            rows = rows / torch.from_numpy(quant.smooth).to(rows.device).repeat_interleave(self.taps)
        return Rotation(quant.rotation, rows.device)(rows)

    def rounded(self, rows: Tensor, quant: LayerQuant) -> Tensor:
        """Transformed rows on the grid of the input; its groups are channels at one place of the kernel."""
        if quant.input is None:
            return rows
        return round_input(rows.unflatten(1, (self.channels, self.taps)), quant.input, 1).flatten(1)

    def weights(self, quant: LayerQuant) -> Any:
        """The scales, and the rounded weights unless the layer's own are rounded to the nearest."""
        rows = weight_of(self.weight, quant)
        if self.methods.rounding == "nearest" and self.methods.weights == "minmax":
            grid = weight_grid(rows, self.scheme.weight)
            return replace(grid, numbers=numbers_of(rows, grid)) if quant.transforms else grid
        inputs = self.inputs(self.rows, quant)
        importance = (inputs.square() * self.row_weights[:, None]).mean(0) if self.methods.weights == "mse" else None
        grid = weight_grid(rows, self.scheme.weight, importance)
        if self.methods.rounding == "nearest":
            return replace(grid, numbers=numbers_of(rows, grid)) if quant.transforms else grid
        method = {"gptq": gptq, "learned": learned}[self.methods.rounding]
        seen = self.rounded(inputs, replace(quant, input=self.input(quant)))
        pieces = []
        for first, last in _pieces(rows.shape[1], grid.group):
            groups = slice(first // grid.group, -(-last // grid.group)) if grid.group else slice(None)
            own = replace(grid, scale=grid.scale[:, groups])
            pieces.append(method(rows[:, first:last], own, self._moments(seen[:, first:last])))
        return replace(grid, numbers=numbers_of(torch.cat(pieces, 1), grid))

    def input(self, quant: LayerQuant) -> Input | None:
        """The grid of the input; of a transformed input, calibrated on the rows."""
        form = self.scheme.activation
        if not form.is_scaled:
            return None
        if form.dynamic and form.stored != "e4m3":
            return Dynamic(form.dtype, form.group, form.stored)
        seen = self.seen.input
        if quant.smooth is not None or quant.rotation:
            seen, inputs = Histogram(), self.inputs(self.rows, quant)
            for weight in self.row_weights.unique().tolist():
                seen.update(inputs[self.row_weights == weight], weight)
        if form.dynamic:
            top = tensor_scale_of(max(-seen.low, seen.high), element(form.dtype))
            return Dynamic(form.dtype, form.group, form.stored, top)
        if not form.symmetric:
            return seen.grid(self.methods.observer, form.bits)
        return seen.scaled(self.methods.observer, form.elements)

    def _moments(self, inputs: Tensor) -> Tensor:
        """The mean outer product (columns, columns) of a number for each column and row."""
        return inputs.T @ (inputs * self.row_weights[:, None]) / len(inputs)

    def bias(self, quant: LayerQuant) -> np.ndarray:
        """The bias with the mean error of the output, channel by channel.

        The layer sees float inputs, so the error of earlier layers is not compensated again in later ones. Source:
        Nagel et al. 2019, arXiv 1906.04721, section 4.2, measured on calibration data.
        """
        inputs = self.inputs(self.rows, quant)
        difference = inputs @ weight_of(self.weight, quant).T
        difference -= self.rounded(inputs, quant) @ round_weight(weight_of(self.weight, quant), quant.weight).T
        mean = (difference * self.row_weights[:, None]).mean(0)
        corrected: Tensor = self.layer.bias.detach().float().cpu() + mean
        return corrected.numpy()


def _pieces(columns: int, group: int) -> list[tuple[int, int]]:
    """Ranges of columns, as equal as groups allow, none above `COLUMNS`."""
    count = -(-columns // COLUMNS)
    size = -(-columns // count)
    if group:
        size = -(-size // group) * group
    return [(first, min(first + size, columns)) for first in range(0, columns, size)]
