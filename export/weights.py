"""The weight pool: one file of content-hashed tensors that all graphs of a folder read their weights from."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Literal, Self

if TYPE_CHECKING:
    import numpy as np
    import onnx

FILE = "weights.bin"
INLINE_BYTES = 1024
"""Smaller tensors stay inside their graph."""

_ALIGN = 64
_PAGE = 4096
_LARGE = 1 << 16  # from this many bytes on, tensors begin at a page, so that a runtime can map them


Storage = Literal["float32", "float16"]
"""How float32 weights are kept in a pool; the arithmetic is float32 in any case."""


@dataclass(frozen=True)
class Pool:
    """What was written: bytes of the pool file, and bytes the graphs would hold without sharing."""

    bytes: int
    unshared_bytes: int


@dataclass(frozen=True)
class Place:
    """Where a tensor lies in a pool; `halved` where it is float32 stored as float16."""

    offset: int
    length: int
    halved: bool = False


class PoolWriter:
    """A pool under way: tensors come one at a time, so that no more than one of them need be in memory.

    Used in a `with` statement, at whose end the file is complete; it is removed where nothing was put into it.

    Attributes:
        folder: of the pool, and of the graphs that refer to it; made where it is missing.
        bytes: of the file so far.
        unshared_bytes: what was put in so far, equal tensors counted each time.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        self.folder.mkdir(parents=True, exist_ok=True)
        self.bytes = self.unshared_bytes = 0
        self._offsets: dict[bytes, int] = {}
        self._path = self.folder / FILE
        self._file = self._path.open("wb")

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        with self._file:
            self.flush()
        if not self._offsets:
            self._path.unlink()

    def flush(self) -> None:
        """Bring to the disk what was put in so far."""
        self._file.flush()
        os.fsync(self._file.fileno())

    def put(self, data: bytes | memoryview) -> Place:
        """Write the bytes of a tensor, unless equal ones are there already."""
        size = len(data)
        self.unshared_bytes += size
        key = hashlib.sha256(data).digest()
        if key not in self._offsets:
            gap = -self.bytes % (_PAGE if size >= _LARGE else _ALIGN)
            self._file.write(b"\0" * gap)
            self._file.write(data)
            self._offsets[key] = self.bytes + gap
            self.bytes += gap + size
        return Place(self._offsets[key], size)

    def put_array(self, array: np.ndarray, storage: Storage = "float32") -> Place | None:
        """Write an array, float32 ones as `storage` where it can hold them; None for those that stay in their graph."""
        half = _halved(array) if storage == "float16" else None
        stored = array if half is None else half
        if stored.nbytes < INLINE_BYTES:
            return None
        return replace(self._put_values(stored), halved=half is not None)

    def put_half(self, array: np.ndarray) -> Place:
        """Write float16 values of an array that the graph takes as float32."""
        return replace(self._put_values(array), halved=True)

    def _put_values(self, array: np.ndarray) -> Place:
        import numpy as np

        return self.put(np.ascontiguousarray(array).reshape(-1).view(np.uint8).data)


def write_pool(models: Mapping[str, onnx.ModelProto], folder: str | Path) -> Pool:
    """Write `folder/<name>.onnx` for every model and `folder/weights.bin` with each distinct tensor once.

    Tensors are equal when their bytes are, whatever graph, name or shape they have there. Equal models give equal
    files, byte for byte. The models are changed in place: their weights become references. No file is written
    where all tensors are small.

    Args:
        models: graph name -> model; written in the order of the names.
        folder: made where it is missing; the runtimes read weights only from beside the graph.
    """
    folder = Path(folder)
    with PoolWriter(folder) as pool:
        for name in sorted(models):
            for tensor in models[name].graph.initializer:
                data = _raw(tensor)
                if len(data) >= INLINE_BYTES:
                    _refer(tensor, pool.put(data))
    for name, model in models.items():
        write_graph(model, folder / f"{name}.onnx")
    return Pool(bytes=pool.bytes, unshared_bytes=pool.unshared_bytes)


def write_graph(model: onnx.ModelProto, path: Path) -> None:
    """Write a graph whose weights lie in the pool beside it; equal graphs give equal files."""
    with path.open("wb") as file:
        file.write(model.SerializeToString(deterministic=True))
        file.flush()
        os.fsync(file.fileno())


def refer(model: onnx.ModelProto, places: Mapping[str, Place]) -> None:
    """Make the named weights of a graph references into a pool, in place; halved ones are widened by a Cast."""
    from onnx import TensorProto

    halved = []
    for tensor in model.graph.initializer:
        place = places.get(tensor.name)
        if place is None:
            continue
        _refer(tensor, place)
        if place.halved:
            halved.append(tensor.name)
            tensor.name, tensor.data_type = f"{tensor.name}.float16", TensorProto.FLOAT16
    _widen(model, halved)


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
    from onnx import TensorProto, numpy_helper

    stored = []
    for tensor in model.graph.initializer:
        if tensor.data_type != TensorProto.FLOAT or (names is not None and tensor.name not in names):
            continue
        values = numpy_helper.to_array(tensor)
        half = _halved(values) if values.nbytes >= INLINE_BYTES else None
        if half is None:
            continue
        stored.append(tensor.name)
        tensor.CopyFrom(numpy_helper.from_array(half, f"{tensor.name}.float16"))
    _widen(model, stored)
    return len(stored)


def _halved(values: np.ndarray) -> np.ndarray | None:
    """float32 values as float16; None for another type, or where one is out of range."""
    import numpy as np

    if values.dtype != np.float32 or np.abs(values).max(initial=0.0) > np.finfo(np.float16).max:
        return None
    return values.astype(np.float16)


def _widen(model: onnx.ModelProto, names: Sequence[str]) -> None:
    """Put a Cast to float32 before everything else for each of the weights that are stored as `<name>.float16`."""
    from onnx import TensorProto, helper

    casts = [
        helper.make_node("Cast", [f"{name}.float16"], [name], f"{name}.widen", to=TensorProto.FLOAT) for name in names
    ]
    nodes = [*casts, *model.graph.node]
    del model.graph.node[:]
    model.graph.node.extend(nodes)


def _refer(tensor: onnx.TensorProto, place: Place) -> None:
    from onnx import TensorProto

    tensor.ClearField("raw_data")
    tensor.data_location = TensorProto.EXTERNAL
    del tensor.external_data[:]
    for entry, value in (("location", FILE), ("offset", place.offset), ("length", place.length)):
        tensor.external_data.add(key=entry, value=str(value))


def _raw(tensor: onnx.TensorProto) -> bytes:
    """The little-endian bytes of a tensor, which from now on holds them as such."""
    from onnx import numpy_helper

    if not tensor.HasField("raw_data"):
        tensor.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(tensor), tensor.name))
    return tensor.raw_data
