"""The weight pool: one file of content-hashed tensors that all graphs of a folder read their weights from."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import onnx

FILE = "weights.bin"
INLINE_BYTES = 1024
"""Smaller tensors stay inside their graph."""

_ALIGN = 64
_PAGE = 4096
_LARGE = 1 << 16  # from this many bytes on, tensors begin at a page, so that a runtime can map them


@dataclass(frozen=True)
class Pool:
    """What was written: bytes of the pool file, and bytes the graphs would hold without sharing."""

    bytes: int
    unshared_bytes: int


def write_pool(models: Mapping[str, onnx.ModelProto], folder: str | Path) -> Pool:
    """Write `folder/<name>.onnx` for every model and `folder/weights.bin` with each distinct tensor once.

    Tensors are equal when their bytes are, whatever graph, name or shape they have there. Equal models give equal
    files, byte for byte. The models are changed in place: their weights become references. No file is written
    where all tensors are small.

    Args:
        models: graph name -> model; written in the order of the names.
        folder: made where it is missing; the runtimes read weights only from beside the graph.
    """
    from onnx import TensorProto

    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    places: dict[bytes, int] = {}
    position = unshared = 0
    path = folder / FILE
    with path.open("wb") as pool:
        for name in sorted(models):
            for tensor in models[name].graph.initializer:
                data = _raw(tensor)
                if len(data) < INLINE_BYTES:
                    continue
                unshared += len(data)
                key = hashlib.sha256(data).digest()
                if key not in places:
                    gap = -position % (_PAGE if len(data) >= _LARGE else _ALIGN)
                    pool.write(b"\0" * gap)
                    pool.write(data)
                    places[key] = position + gap
                    position += gap + len(data)
                tensor.ClearField("raw_data")
                tensor.data_location = TensorProto.EXTERNAL
                del tensor.external_data[:]
                for entry, value in (("location", FILE), ("offset", places[key]), ("length", len(data))):
                    tensor.external_data.add(key=entry, value=str(value))
        pool.flush()
        os.fsync(pool.fileno())
    if not places:
        path.unlink()
    for name, model in models.items():
        graph = folder / f"{name}.onnx"
        with graph.open("wb") as file:
            file.write(model.SerializeToString(deterministic=True))
            file.flush()
            os.fsync(file.fileno())
    return Pool(bytes=position, unshared_bytes=unshared)


def store_float16(model: onnx.ModelProto, names: Collection[str] | None = None) -> int:
    """Store the float32 weights as float16 behind a Cast that widens them when the graph is loaded, in place.

    Halves the size; the arithmetic stays float32, on weights rounded to float16. Weights beyond the float16 range and
    tensors that stay inside the graph (`INLINE_BYTES`) are left as they are.

    Args:
        model: the graph.
        names: of the weights that may be stored so; None is all of them.

    Returns:
        How many tensors are now stored as float16.
    """
    import numpy as np
    from onnx import TensorProto, helper, numpy_helper

    casts = []
    for tensor in model.graph.initializer:
        if tensor.data_type != TensorProto.FLOAT or (names is not None and tensor.name not in names):
            continue
        values = numpy_helper.to_array(tensor)
        if values.nbytes < INLINE_BYTES or np.abs(values).max(initial=0.0) > np.finfo(np.float16).max:
            continue
        wide = tensor.name
        stored = numpy_helper.from_array(values.astype(np.float16), f"{wide}.float16")
        tensor.CopyFrom(stored)
        casts.append(helper.make_node("Cast", [stored.name], [wide], f"{wide}.widen", to=TensorProto.FLOAT))
    nodes = [*casts, *model.graph.node]
    del model.graph.node[:]
    model.graph.node.extend(nodes)
    return len(casts)


def _raw(tensor: onnx.TensorProto) -> bytes:
    """The little-endian bytes of a tensor, which from now on holds them as such."""
    from onnx import numpy_helper

    if not tensor.HasField("raw_data"):
        tensor.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(tensor), tensor.name))
    return tensor.raw_data
