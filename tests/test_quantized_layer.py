"""Methods of quantization on single layers: what each must leave exact, and that each lowers the error."""

from __future__ import annotations

import copy
import io
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from compress.quantization.fake_quantize import round_layer
from compress.quantization.layer import Methods, output_error, quantized_layer
from compress.quantization.scheme import SCHEMES
from compress.quantization.statistics import LayerStatistics, Observed, RowFile
from compress.quantization.transforms import Rotation, weight_of
from export.elements import element
from export.quant_plan import LayerQuant

CHANNELS, OUT = 64, 48


def inputs(op: str, samples: int, seed: int) -> Tensor:
    """Correlated activations after a SiLU, every 13th channel ten times as large."""
    draw = torch.Generator().manual_seed(seed)
    mix = torch.randn(CHANNELS, CHANNELS, generator=torch.Generator().manual_seed(9))
    mix *= torch.logspace(0, -1.5, CHANNELS)[:, None]
    tokens = nn.functional.silu(torch.randn(samples, 36, CHANNELS, generator=draw) @ mix * 0.3)
    tokens = tokens * (1 + 9 * (torch.arange(CHANNELS) % 13 == 0))
    return tokens if op == "linear" else tokens.reshape(samples, 6, 6, CHANNELS).permute(0, 3, 1, 2).contiguous()


@pytest.fixture(scope="module", params=["linear", "conv"])
def case(request: pytest.FixtureRequest) -> tuple[str, nn.Module, LayerStatistics]:
    torch.manual_seed(0)
    op = request.param
    layer: nn.Module = nn.Linear(CHANNELS, OUT) if op == "linear" else nn.Conv2d(CHANNELS, OUT, 3, 2, 1)
    seen = Observed("layer", layer, 256, RowFile(io.BytesIO()))
    with torch.no_grad():
        for seed in range(6):
            seen.update(inputs(op, 32, seed), layer(inputs(op, 32, seed)))
    return op, layer, seen


def error(case: tuple[str, nn.Module, LayerStatistics], quant: LayerQuant) -> float:
    """The squared error of the output on other inputs, of the output's square."""
    op, layer, _ = case
    rounded = copy.deepcopy(layer)
    round_layer(rounded, quant)
    with torch.no_grad():
        x = inputs(op, 32, 99)
        exact = layer(x)
        return float((rounded(x) - exact).square().sum() / exact.square().sum())


Quantized = Callable[..., LayerQuant]


@pytest.fixture(scope="module")
def quantized(case: tuple[str, nn.Module, LayerStatistics]) -> Quantized:
    def make(scheme: str, **methods: Any) -> LayerQuant:
        _, layer, seen = case
        before = {name: tensor.clone() for name, tensor in layer.state_dict().items()}
        quant = quantized_layer(layer, SCHEMES[scheme], seen, Methods(**methods))
        assert all(torch.equal(before[name], tensor) for name, tensor in layer.state_dict().items())
        assert quant.fault() is None
        return quant

    return make


NEAREST = {"weights": "minmax", "observer": "minmax", "bias_correction": False}


@pytest.mark.parametrize("scheme", ["int4-w4a8", "nvfp4", "mxfp4", "fp4-w4a8", "int4-w4a4-g64", "int4-w4a32-g64"])
@pytest.mark.parametrize(
    "methods",
    [
        {"observer": "mse", "weights": "mse"},
        {"low_rank": 16},
        {"rounding": "gptq"},
        {"rounding": "learned"},
        {"smooth": "search", "low_rank": 16, "rounding": "gptq"},
    ],
    ids=str,
)
def test_methods_lower_the_error(
    case: tuple[str, nn.Module, LayerStatistics], quantized: Quantized, scheme: str, methods: dict[str, Any]
) -> None:
    nearest = error(case, quantized(scheme, **NEAREST))
    better = error(case, quantized(scheme, **methods))
    assert better < 0.98 * nearest
    if "low_rank" in methods:
        assert better < 0.7 * nearest


@pytest.mark.parametrize("scheme", ["int4-w4a8", "int4-w4a32-g32"])
@pytest.mark.parametrize("rounding", ["gptq", "learned"])
def test_wide_layers_are_rounded_in_pieces(
    case: tuple[str, nn.Module, LayerStatistics],
    quantized: Quantized,
    scheme: str,
    rounding: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    whole = quantized(scheme, rounding=rounding)
    monkeypatch.setattr("compress.quantization.layer.COLUMNS", 40)
    pieces = quantized(scheme, rounding=rounding)
    assert not np.array_equal(whole.weight.numbers, pieces.weight.numbers)
    assert (
        error(case, whole)
        < error(case, pieces)
        < (1.01 if rounding == "learned" else 1.0) * error(case, quantized(scheme))
    )


@pytest.mark.parametrize("scheme", ["int4-w4a4-g64", "int4-w4a4", "nvfp4", "fp4-any-w4a4"])
def test_outliers_are_smoothed(case: tuple[str, nn.Module, LayerStatistics], quantized: Quantized, scheme: str) -> None:
    assert error(case, quantized(scheme, smooth="search")) < 0.9 * error(case, quantized(scheme))


@pytest.mark.parametrize("scheme", ["int4-w4a4", "fp4-any-w4a4", "mxfp4"])
def test_outliers_are_spread_by_rotation(
    case: tuple[str, nn.Module, LayerStatistics], quantized: Quantized, scheme: str
) -> None:
    rotated = quantized(scheme, rotate=True)
    assert rotated.rotation == (64 if case[0] == "linear" else 0)
    if case[0] == "linear":
        assert error(case, rotated) < 0.7 * error(case, quantized(scheme))


@pytest.mark.parametrize("scheme", [name for name, row in SCHEMES.items() if row.is_quantized])
def test_every_scheme_goes_with_every_method(
    case: tuple[str, nn.Module, LayerStatistics], quantized: Quantized, scheme: str
) -> None:
    """The error stays small, and the error on the rows of calibration tells it roughly."""
    row = SCHEMES[scheme]
    for methods in (NEAREST, {}, {"smooth": 0.5, "rotate": True, "low_rank": 8, "rounding": "gptq"}):
        quant = quantized(scheme, **methods)
        found = error(case, quant)
        assert found < (1e-2 if row.weight.bits == 8 else 0.2)
        # Rounding of the outputs of convolutions is not the layer's own; what is fitted to few rows fits them best.
        told = output_error(case[1], quant, case[2])
        if quant.output is None:
            assert 0.25 < told / found < 2.0
        assert (quant.input is None) == (not row.activation.is_scaled)


def test_more_bits_are_better(case: tuple[str, nn.Module, LayerStatistics], quantized: Quantized) -> None:
    errors = [error(case, quantized(scheme)) for scheme in ("int8-w8a8-token", "int4-w4a8-g64", "int4-w4a4-g64")]
    assert errors[0] < 0.1 * errors[1]
    assert errors[1] < errors[2]


def test_transforms_alone_leave_the_output(case: tuple[str, nn.Module, LayerStatistics], quantized: Quantized) -> None:
    """Smoothing, rotation and the branch move what is rounded; without rounding nothing is lost."""
    op, layer, _ = case
    quant = quantized("int4-w4a4-g64", smooth=0.5, rotate=True, low_rank=8, bias_correction=False)
    assert quant.transforms
    assert quant.weight.numbers is not None
    x = inputs(op, 4, 5)
    rows = weight_of(layer.weight, quant)  # type: ignore[arg-type]
    exact = copy.deepcopy(layer)
    round_layer(exact, quant, inputs=False)
    lost = torch.from_numpy(quant.weight.dequantized(quant.weight.numbers)) - rows
    with torch.no_grad():
        stored = exact(x)
        exact.weight = nn.Parameter(exact.weight - lost.reshape(exact.weight.shape))  # type: ignore[arg-type, operator]
        assert (exact(x) - layer(x)).abs().max() < 1e-4 * layer(x).abs().max()
        assert (stored - layer(x)).abs().max() > 1e-3 * layer(x).abs().max()


def test_rotation_is_its_own_inverse() -> None:
    x = torch.randn(3, 96)
    turn = Rotation(32, torch.device("cpu"))
    assert torch.allclose(turn(turn(x)), x, atol=1e-5)
    assert torch.allclose(turn(x).square().sum(1), x.square().sum(1), rtol=1e-5)
    assert turn(torch.eye(96)[:1]).abs().max() == pytest.approx(32**-0.5)


def test_any_float_chooses_by_tensor(case: tuple[str, nn.Module, LayerStatistics], quantized: Quantized) -> None:
    quant = quantized("fp8-any-w8a8")
    fixed = min(error(case, quantized(scheme)) for scheme in ("fp8-w8a8", "fp8-e5m2-w8a8"))
    assert error(case, quant) < fixed
    assert element(quant.weight.element).bits == 8


def test_calibration_rows_are_the_same_again(case: tuple[str, nn.Module, LayerStatistics]) -> None:
    op, layer, seen = case
    again = Observed("layer", layer, 256, RowFile(io.BytesIO()))
    with torch.no_grad():
        for seed in range(6):
            again.update(inputs(op, 32, seed), layer(inputs(op, 32, seed)))
    assert torch.equal(seen.rows, again.rows)
    assert seen.rows.shape[0] == 6 * 256
    with torch.no_grad():
        made = seen.rows @ layer.weight.flatten(1).T + layer.bias  # type: ignore[union-attr, operator]
        x = inputs(op, 32, 0)
        all_rows = layer(x) if op == "linear" else layer(x).movedim(1, -1)
    nearest = (made[:20, None] - all_rows.reshape(1, -1, OUT)).abs().amax(2).amin(1)
    assert nearest.max() < 1e-4
