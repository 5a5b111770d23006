"""Numbers of few bits inside a graph, stored in as many; constant nodes unpack them, which runtimes fold on load."""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING

import numpy as np

from export.elements import Element
from export.emitter import Emitter

if TYPE_CHECKING:
    import onnx

PLANES = {2: (2,), 3: (2, 1), 5: (4, 1), 6: (4, 2), 7: (4, 2, 1)}
"""Bits of a number that ONNX has no type for -> those of its planes, lowest first: each fills bytes without a rest."""


def unpacked(emitter: Emitter, label: str, kind: Element, numbers: np.ndarray) -> str:
    """Store numbers of an element; gives the name of the int8 tensor of integers, of the float32 tensor of floats.

    Args:
        emitter: of the graph.
        label: for names.
        kind: of the numbers.
        numbers: that `kind.round` gave, of any shape.
    """
    from onnx import TensorProto

    if kind.is_integer and kind.bits == 8:
        return emitter.constant(label, numbers.astype(np.int8))
    result = emitter.fresh(f"{label}.unpacked")
    if kind.bits not in PLANES:
        stored = emitter.tensor(packed(label, kind, numbers))
        if kind.is_integer:
            return emitter.emit("Cast", [stored], result, to=TensorProto.INT8)
        if kind.name in ("e4m3", "e5m2"):
            return emitter.emit("Cast", [stored], result, to=TensorProto.FLOAT)
        return looked_up(emitter, label, stored, kind.numbers, result)
    whole = _joined(emitter, label, kind, numbers)
    if kind.is_integer:
        return emitter.emit("Cast", [whole], result, to=TensorProto.INT8)
    return looked_up(emitter, label, whole, kind.numbers, result)


def looked_up(emitter: Emitter, label: str, codes: str, table: np.ndarray, result: str) -> str:
    """Emit result = table[codes]."""
    from onnx import TensorProto

    index = emitter.emit("Cast", [codes], emitter.fresh(f"{label}.codes"), to=TensorProto.INT32)
    return emitter.emit("Gather", [emitter.constant(emitter.fresh(f"{label}.table"), table), index], result)


def packed(label: str, kind: Element, numbers: np.ndarray) -> onnx.TensorProto:
    """A tensor of 4 or 8 bits a number: of ONNX's type where there is one, of unsigned codes otherwise."""
    from onnx import TensorProto

    types = {"int4": TensorProto.INT4, "e4m3": TensorProto.FLOAT8E4M3FN, "e5m2": TensorProto.FLOAT8E5M2}
    codes = kind.codes(numbers).reshape(-1)
    if kind.bits == 4:
        codes = _bytes(codes, 4)
    chosen = types.get(kind.name, TensorProto.UINT4 if kind.bits == 4 else TensorProto.UINT8)
    return TensorProto(name=label, data_type=chosen, dims=numbers.shape, raw_data=codes.tobytes())


def _joined(emitter: Emitter, label: str, kind: Element, numbers: np.ndarray) -> str:
    """The sum of the planes: integers as int32, floats as the int32 of their bits."""
    codes, below, parts = kind.codes(numbers).reshape(-1), 0, []
    for bits in PLANES[kind.bits]:
        stored = _bytes((codes >> below) & (2**bits - 1), bits)
        signed = kind.is_integer and below + bits == kind.bits
        plane = f"{label}.bits{below}"
        parts.append(
            looked_up(emitter, plane, emitter.constant(plane, stored), _plane(bits, below, signed), f"{plane}.spread")
        )
        below += bits
    named = functools.partial(_named, emitter, label)
    flat = []
    for part in parts:
        flat.append(emitter.emit("Reshape", [part, emitter.shape(f"{label}.all", -1)], named("flat")))
        bounds = [emitter.shape(f"{label}.{name}", at) for name, at in (("first", 0), ("last", codes.size))]
        flat[-1] = emitter.emit("Slice", [flat[-1], *bounds], named("filled"))
    whole = flat[0]
    for part in flat[1:]:
        whole = emitter.emit("Add", [whole, part], named("sum"))
    return emitter.emit("Reshape", [whole, emitter.shape(f"{label}.dims", *numbers.shape)], named("whole"))


def _plane(bits: int, below: int, signed: bool) -> np.ndarray:
    """What each byte holds, int32 (256, 8 / bits): parts of numbers from the bit `below` on."""
    places = np.arange(0, 8, bits)
    parts = (np.arange(256)[:, None] >> places) & (2**bits - 1)
    if signed:
        parts = np.where(parts >= 2 ** (bits - 1), parts - 2**bits, parts)
    return (parts * 2**below).astype(np.int32)


def _bytes(codes: np.ndarray, bits: int) -> np.ndarray:
    """Codes (count,) of so many bits, the first one lowest in its byte."""
    each = 8 // bits
    rows = np.pad(codes, (0, -codes.size % each)).reshape(-1, each)
    return np.bitwise_or.reduce(rows << np.arange(0, 8, bits, dtype=np.uint8), axis=1).astype(np.uint8)


def _named(emitter: Emitter, label: str, name: str) -> str:
    return emitter.fresh(f"{label}.{name}")
