"""Whether the numbers of a quantized layer are near its weights."""

from __future__ import annotations

from torch import nn

from compress.errors import PassError
from compress.quantization.rounding import neighbours, round_weight, scales_of, to_element
from compress.quantization.scheme import scheme
from compress.quantization.transforms import weight_of
from export.elements import element
from export.quant_plan import LayerQuant

_LOST = {True: 0.3, False: 0.02}
"""Whether the bits are few -> of the squared weights of a layer, at most lost in rounding: more is no rounding."""

_CLIPPED = 2.7
"""Of an element's largest number, the most a weight may be: scales are tried down to half, powers of two fall below."""


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
