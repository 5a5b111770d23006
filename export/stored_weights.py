"""Weights in few bits inside a graph, and the nodes that widen them: constant, so a runtime computes them on load."""

from __future__ import annotations

import functools

import numpy as np

from export.elements import element
from export.emitter import Emitter
from export.grids import WeightGrid
from export.packed import looked_up, packed, unpacked
from export.quant_plan import LayerQuant

_EXPONENTS = np.ldexp(np.float32(1.0), np.minimum(np.arange(256) - 127, 127))
"""What a byte of E8M0 stands for; the last one means no number."""


def widened(emitter: Emitter, label: str, layer: LayerQuant, numbers: np.ndarray, shape: tuple[int, ...]) -> str:
    """Float32 weights that act on the input itself, so with all that was done to the input undone.

    Args:
        emitter: of the graph.
        label: for names.
        layer: of the plan.
        numbers: (out_channels, in_channels x kernel).
        shape: (out_channels, in_channels, ...).

    Returns:
        The name of the float32 tensor of that shape.
    """
    rows, columns = numbers.shape
    group = layer.weight.group
    if group:
        numbers = np.pad(numbers, ((0, 0), (0, -columns % group))).reshape(rows, -1, group)
    named = functools.partial(_named, emitter, label)
    made = emitter.emit(
        "Mul", [_floats(emitter, label, layer.weight, numbers), _scales(emitter, label, layer.weight)], named("scaled")
    )
    if group:
        made = emitter.emit("Reshape", [made, emitter.shape(f"{label}.rows", rows, -1)], named("rows"))
        if numbers.shape[1] * group != columns:
            bounds = [
                emitter.shape(f"{label}.{name}", at) for name, at in (("first", 0), ("last", columns), ("axis", 1))
            ]
            made = emitter.emit("Slice", [made, *bounds], named("cut"))
    if layer.low_rank is not None:
        factors = [
            half(emitter, f"{label}.{name}", array)
            for name, array in (("up", layer.low_rank.up), ("down", layer.low_rank.down))
        ]
        product = emitter.emit("MatMul", factors, named("product"))
        made = emitter.emit("Add", [made, product], named("whole"))
    if layer.rotation:
        made = rotate(emitter, f"{label}.unrotated", made, layer.rotation, (rows, columns))
    if layer.smooth is not None:
        factor = np.repeat(1.0 / layer.smooth.astype(np.float32), columns // len(layer.smooth))
        made = emitter.emit(
            "Mul", [made, emitter.constant(emitter.fresh(f"{label}.roughness"), factor)], named("rough")
        )
    if shape != (rows, columns):
        made = emitter.emit("Reshape", [made, emitter.shape(f"{label}.shape", *shape)], named("shaped"))
    return made


def float_weights(layer: LayerQuant, numbers: np.ndarray) -> np.ndarray:
    """What `widened` gives, computed here: float32 of the shape of the numbers (out_channels, in_channels, ...)."""
    rows = layer.weight.dequantized(numbers).reshape(len(numbers), -1)
    if layer.low_rank is not None:
        rows = rows + layer.low_rank.up.astype(np.float32) @ layer.low_rank.down.astype(np.float32)
    if layer.rotation:
        blocks = rows.reshape(-1, layer.rotation) @ hadamard(layer.rotation)
        rows = blocks.reshape(rows.shape)
    if layer.smooth is not None:
        rows = rows * np.repeat(1.0 / layer.smooth.astype(np.float32), rows.shape[1] // len(layer.smooth))
    return rows.reshape(numbers.shape)


def rotate(emitter: Emitter, label: str, tensor: str, size: int, shape: tuple[int, ...] | None = None) -> str:
    """Rotate the last axis of a tensor in blocks of `size`, see `hadamard`; its shape is read from it unless given."""
    if shape is None:
        whole = emitter.emit("Shape", [tensor], emitter.fresh(f"{label}.shape"))
    else:
        whole = emitter.shape(f"{label}.shape", *shape)
    blocks = emitter.emit(
        "Reshape", [tensor, emitter.shape(f"{label}.blocks", -1, size)], emitter.fresh(f"{label}.blocked")
    )
    matrix = emitter.constant(emitter.fresh(f"{label}.hadamard"), hadamard(size))
    turned = emitter.emit("MatMul", [blocks, matrix], emitter.fresh(f"{label}.turned"))
    return emitter.emit("Reshape", [turned, whole], emitter.fresh(label))


@functools.cache
def hadamard(size: int) -> np.ndarray:
    """Sylvester's orthogonal, symmetric matrix (size, size) of +-1 / sqrt(size); float32."""
    one = np.ones((1, 1))
    while one.shape[0] < size:
        one = np.block([[one, one], [one, -one]])
    return (one / np.sqrt(size)).astype(np.float32)


def half(emitter: Emitter, label: str, array: np.ndarray) -> str:
    """A float16 constant widened to float32."""
    from onnx import TensorProto

    stored = emitter.constant(emitter.fresh(f"{label}.float16"), array)
    return emitter.emit("Cast", [stored], emitter.fresh(label), to=TensorProto.FLOAT)


def _named(emitter: Emitter, label: str, name: str) -> str:
    return emitter.fresh(f"{label}.{name}")


def _floats(emitter: Emitter, label: str, grid: WeightGrid, numbers: np.ndarray) -> str:
    """The numbers of the grid as float32."""
    from onnx import TensorProto

    kind = element(grid.element)
    made = unpacked(emitter, label, kind, numbers)
    if not kind.is_integer:
        return made
    return emitter.emit("Cast", [made], emitter.fresh(f"{label}.numbers"), to=TensorProto.FLOAT)


def _scales(emitter: Emitter, label: str, grid: WeightGrid) -> str:
    """The scales as float32, shaped to go with the numbers: (out_channels or 1, 1) or (out_channels, groups, 1)."""
    from onnx import TensorProto

    scale = grid.scale[..., None] if grid.group else grid.scale
    label = f"{label}.scale"
    if grid.stored == "e8m0":
        codes = (np.frexp(scale)[1] - 1 + 127).astype(np.uint8)
        return looked_up(emitter, label, emitter.constant(label, codes), _EXPONENTS, emitter.fresh(f"{label}.powers"))
    if grid.stored == "e4m3":
        kind = element("e4m3")
        stored = emitter.tensor(packed(label, kind, kind.round(scale / np.float32(grid.tensor_scale))))
        floats = emitter.emit("Cast", [stored], emitter.fresh(f"{label}.block"), to=TensorProto.FLOAT)
        whole = emitter.constant(emitter.fresh(f"{label}.tensor"), np.asarray(grid.tensor_scale, np.float32))
        return emitter.emit("Mul", [floats, whole], emitter.fresh(f"{label}.both"))
    return emitter.constant(label, scale.astype(np.float32))
