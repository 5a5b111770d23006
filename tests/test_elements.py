"""Number formats, bit for bit: elements against ml_dtypes, scales against the definitions of OCP and NVIDIA."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import pytest
import torch

from compress.quantization.rounding import neighbours, round_input, round_weight, scale_of, tensor_scale_of, to_element
from compress.quantization.scheme import SCHEMES
from compress.quantization.weights import numbers_of, weight_grid
from export.elements import ElementError, element
from export.grids import Dynamic

TYPES = {
    "e4m3": ml_dtypes.float8_e4m3fn,
    "e5m2": ml_dtypes.float8_e5m2,
    "e2m1": ml_dtypes.float4_e2m1fn,
    "e3m2": ml_dtypes.float6_e3m2fn,
    "e2m3": ml_dtypes.float6_e2m3fn,
}
NAMES = (*TYPES, "int8", "int4", "int2", "e3m4", "e2m5", "e1m2", "e3m0", "e1m6", "e6m1")


def spread(largest: float) -> np.ndarray:
    """Numbers of every size up to the largest, ties and numbers too small for any step among them."""
    rng = np.random.default_rng(0)
    random = np.concatenate([rng.normal(size=4000) * scale for scale in largest * np.logspace(-9, 0, 10)])
    halves = np.concatenate([np.arange(-40, 40) / 4 * scale for scale in largest * 2.0 ** -np.arange(12)])
    return np.clip(np.concatenate([random, halves, [0.0, -0.0]]), -largest, largest).astype(np.float32)


@pytest.mark.parametrize("name", TYPES)
def test_floats_are_those_of_ml_dtypes_bit_for_bit(name: str) -> None:
    kind = element(name)
    x = spread(kind.largest)
    theirs = x.astype(TYPES[name])
    assert np.array_equal(kind.round(x), theirs.astype(np.float32))
    assert np.array_equal(kind.codes(kind.round(x)), theirs.view(np.uint8))
    finite = np.arange(2**kind.bits, dtype=np.uint8).view(TYPES[name]).astype(np.float32)
    assert np.array_equal(kind.numbers[np.isfinite(finite)], finite[np.isfinite(finite)])
    assert kind.largest == finite[np.isfinite(finite)].max()


@pytest.mark.parametrize("name", NAMES)
def test_rounding_gives_the_nearest_number_in_numpy_and_pytorch(name: str) -> None:
    kind = element(name)
    x = 1.5 * spread(kind.largest)
    rounded = kind.round(x)
    grid = np.unique(kind.numbers)
    assert np.isin(rounded, grid).all()
    nearest = np.abs(np.clip(x, grid[0], grid[-1])[:, None].astype(np.float64) - grid).min(1)
    assert np.allclose(np.abs(rounded - np.clip(x, grid[0], grid[-1])), nearest, atol=0, rtol=1e-6)
    assert np.array_equal(to_element(torch.from_numpy(x), kind).numpy(), rounded)
    assert np.array_equal(kind.numbers[kind.codes(rounded)], rounded)


@pytest.mark.parametrize("name", NAMES)
def test_neighbours_enclose_what_is_within_range(name: str) -> None:
    kind = element(name)
    x = torch.from_numpy(spread(kind.largest))
    below, above = neighbours(x, kind)
    assert bool((below <= x).all())
    assert bool((x <= above).all())
    assert bool((below < above).all())
    rounded = to_element(x, kind)
    assert bool(((rounded == below) | (rounded == above)).all())


@pytest.mark.parametrize("name", ["int1", "int9", "e8m0", "e4m4", "e0m3", "float8", ""])
def test_an_unknown_element_is_refused(name: str) -> None:
    with pytest.raises(ElementError, match="give int2 to int8, or e<E>m<M>"):
        element(name)


def test_mx_scales_are_powers_of_two_by_the_largest_exponent() -> None:
    """OCP MX 1.0, 6.3: 2^(floor(log2 of the largest) - largest exponent of the element): 2 for e2m1, 8 for e4m3."""
    largest = torch.tensor([1.0, 1.99, 4.0, 6.0, 7.9, 448.0, 2.0**-140, 0.0])
    fours = scale_of(largest, element("e2m1"), "e8m0")
    assert fours[:6].tolist() == [0.25, 0.25, 1.0, 1.0, 1.0, 64.0]
    eights = scale_of(largest, element("e4m3"), "e8m0")
    assert eights[:6].tolist() == [2.0**-8, 2.0**-8, 2.0**-6, 2.0**-6, 2.0**-6, 1.0]
    assert bool((fours > 0).all())


def test_nvfp4_has_e4m3_scales_of_blocks_and_a_float_of_the_tensor() -> None:
    """The block scale is e4m3 of (largest of the block / 6) in units of the tensor's largest / (6 x 448)."""
    torch.manual_seed(0)
    rows = torch.randn(8, 64) * torch.logspace(-3, 1, 8)[:, None]
    grid = weight_grid(rows, SCHEMES["nvfp4"].weight)
    tensor = float(rows.abs().max()) / (6 * 448)
    blocks = rows.reshape(8, 4, 16).abs().amax(2).numpy()
    expected = (blocks / 6 / np.float32(tensor)).astype(ml_dtypes.float8_e4m3fn).astype(np.float32) * np.float32(tensor)
    assert grid.tensor_scale == pytest.approx(tensor, rel=1e-7)
    assert np.allclose(grid.scale, expected, rtol=1e-6)
    numbers = (rows.numpy().reshape(8, 4, 16) / grid.scale[..., None]).reshape(8, 64)
    theirs = np.clip(numbers, -6, 6).astype(ml_dtypes.float4_e2m1fn).astype(np.float32)
    assert np.array_equal(grid.rounded(rows.numpy()).astype(np.float32), theirs)
    assert np.array_equal(numbers_of(rows, grid).astype(np.float32), theirs)
    assert np.array_equal(round_weight(rows, grid).numpy(), grid.dequantized(grid.rounded(rows.numpy())))
    assert tensor_scale_of(2688.0, element("e2m1")) == 1.0


def test_a_group_at_the_end_may_be_shorter() -> None:
    torch.manual_seed(0)
    rows = torch.randn(5, 40)
    grid = weight_grid(rows, SCHEMES["int4-w4a32-g32"].weight)
    assert grid.scale.shape == (5, 2)
    assert np.allclose(grid.scale[:, 1], rows[:, 32:].abs().amax(1) / 7)
    assert (round_weight(rows, grid) - rows).abs().max() <= grid.scale.max() * 0.5001
    x = torch.randn(2, 3, 40)
    rounded = round_input(x, Dynamic("int4", 32))
    assert torch.allclose(rounded[..., :32], round_input(x[..., :32], Dynamic("int4", 32)))
    assert torch.allclose(rounded[..., 32:], round_input(x[..., 32:], Dynamic("int4", 8)))


@pytest.mark.parametrize("grid", [Dynamic("int8"), Dynamic("e2m1", 16, "e4m3", 0.01), Dynamic("e4m3", 32, "e8m0")])
def test_activations_scaled_at_run_time_do_not_see_other_samples_or_pixels(grid: Dynamic) -> None:
    torch.manual_seed(0)
    x = torch.randn(3, 64, 4, 5)
    x[1] *= 50
    x[2, :, 0, 0] *= 1e-3
    whole = round_input(x, grid, 1)
    assert torch.equal(whole[:1], round_input(x[:1], grid, 1))
    assert torch.equal(whole[2:, :, :1, :1], round_input(x[2:, :, :1, :1], grid, 1))
    assert torch.equal(round_input(torch.zeros(2, 64), grid), torch.zeros(2, 64))


@pytest.mark.parametrize("name", [name for name, row in SCHEMES.items() if row.is_quantized])
def test_every_scheme_rounds_weights_within_half_a_step(name: str) -> None:
    torch.manual_seed(0)
    rows = torch.randn(12, 72)
    grid = weight_grid(rows, SCHEMES[name].weight)
    assert grid.fault() is None
    scales = torch.from_numpy(grid.scales(72))
    below, above = neighbours(
        (rows / scales).clamp(-element(grid.element).largest, element(grid.element).largest), element(grid.element)
    )
    error = (round_weight(rows, grid) - rows).abs()
    clipped = (rows / scales).abs() > element(grid.element).largest
    assert bool((error[~clipped] <= 0.5001 * ((above - below) * scales)[~clipped]).all())
    assert float(clipped.float().mean()) < 0.05
    stored = SCHEMES[name].weight.bytes_of(12, 72)
    assert stored >= 12 * 72 * SCHEMES[name].weight.bits / 8
