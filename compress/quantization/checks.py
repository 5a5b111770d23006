"""Whether the numbers of a quantized layer are near its weights, and its grid is wide enough for its input."""

from __future__ import annotations

from torch import nn

from compress.errors import PassError
from compress.quantization.rounding import neighbours, round_weight, scales_of, to_element
from compress.quantization.scheme import scheme
from compress.quantization.statistics import LayerStatistics
from compress.quantization.transforms import weight_of
from export.elements import element
from export.grids import Affine, Scaled
from export.quant_plan import LayerQuant

_LOST = {True: 0.3, False: 0.02}
"""Whether the bits are few -> of the squared weights of a layer, at most lost in rounding: more is no rounding."""

_CLIPPED = 2.7
"""Of an element's largest number, the most a weight may be: scales are tried down to half, powers of two fall below."""

SATURATED = 0.1
"""Of the squared inputs that calibration saw, the most that may be lost by the ends of a static grid."""


def check_layer(name: str, layer: nn.Module, quant: LayerQuant) -> None:
    """Weights rounded to the nearest must be half a step away at most, or clipped as far as scales were tried.

    Those that a method rounded otherwise must keep most of their energy.

    Args:
        name: for the message.
        layer: linear or convolution, float.
        quant: what became of it.

    Raises:
        PassError: they do not.
    """
    rows = weight_of(layer.weight, quant)  # type: ignore[arg-type]
    error = round_weight(rows, quant.weight) - rows
    few = scheme(quant.scheme).weight.bits < 6
    if quant.weight.numbers is None:
        kind = element(quant.weight.element)
        scaled = rows / scales_of(quant.weight, rows.shape[1], rows.device)
        below, above = neighbours(scaled.clamp(-kind.largest, kind.largest), kind)
        missed = (to_element(scaled, kind) - scaled).abs() > 0.51 * (above - below) + 1e-7
        if bool((missed & (scaled.abs() < kind.largest)).any() | (scaled.abs() > _CLIPPED * kind.largest).any()):
            raise PassError(f"the weights of {name} do not fit the scales planned for them")
    if not bool(error.square().sum() <= _LOST[few] * rows.square().sum()):
        raise PassError(f"the weights of {name} do not fit the scales planned for them")


def check_inputs(name: str, quant: LayerQuant, seen: LayerStatistics) -> None:
    """A static grid may cut off little of the inputs of calibration; of a transformed input, nothing is known.

    Args:
        name: for the message.
        quant: what became of the layer.
        seen: what calibration kept of it.

    Raises:
        PassError: the input saturates.
    """
    grid = quant.input
    if quant.smooth is not None or quant.rotation or not isinstance(grid, Affine | Scaled):
        return
    if isinstance(grid, Affine):
        low, high = -grid.zero_point * grid.scale, (grid.levels - grid.zero_point) * grid.scale
    else:
        high = element(grid.element).largest * grid.scale
        low = -high
    share = seen.input.clipped(low, high)
    if share > SATURATED:
        raise PassError(
            f"the input of {name} saturates: its grid from {low:.3g} to {high:.3g} loses {100 * share:.0f} % of the "
            "energy that calibration saw; leave the layer in float with a `layers` rule, or choose another observer"
        )
