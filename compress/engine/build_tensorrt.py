"""Builds the engines of one TensorRT target, function by function, and keeps how each of them was built."""

from __future__ import annotations

import tempfile
from collections.abc import Iterable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from compress.errors import PassError
from export.errors import ExportError
from export.manifest import sha256_of
from export.target import Target
from export.to_tensorrt import Profile, build, library, version
from export.weights import write_pool

if TYPE_CHECKING:
    import onnx


class EngineBuilder:
    """The engines of a target so far.

    Args:
        target: with a library.
        profiles: function -> the sizes of its inputs.
        folder: of the engine.
    """

    def __init__(self, target: Target, profiles: Mapping[str, Profile], folder: Path) -> None:
        self.target = target
        self.graphs: dict[str, str] = {}
        self._library = library(target.library)
        self._profiles = profiles
        self._folder = folder
        self._hashes: dict[str, str] = {}
        self._layers: dict[str, int] = {}
        self._tensors: dict[str, dict[str, Any]] = {}
        self._widened: dict[str, list[str]] = {}

    def build(self, function: str, graph: onnx.ModelProto, widened: set[str], path: str) -> None:
        """Build one engine.

        Args:
            function: of the runtime.
            graph: lowered for this target.
            widened: layers whose weights are float16 in it, though the plan has them in fewer bits.
            path: of the engine in the folder, without the ending.

        Raises:
            EngineError: the library does not offer what is asked for.
            PassError: it refuses the graph.
        """
        dynamic = {value.name for value in graph.graph.input if any(d.dim_param for d in _dimensions(value))}
        shapes = {name: sizes for name, sizes in self._profiles[function].items() if name in dynamic}
        with tempfile.TemporaryDirectory() as folder:
            write_pool({function: graph}, folder)
            file = Path(folder) / f"{function}.onnx"
            try:
                built = build(self._library, file, [shapes] if shapes else [], self.target.build)
            except ExportError as error:
                raise PassError(str(error)) from error
            self._hashes[function] = _digest(Path(folder))
        self.graphs[function] = f"{path}.{self.target.name}.engine"
        place = self._folder / self.graphs[function]
        place.parent.mkdir(parents=True, exist_ok=True)
        place.write_bytes(built.engine)
        self._layers[function] = built.layers
        self._tensors[function] = {"inputs": _tensors(graph.graph.input), "outputs": _tensors(graph.graph.output)}
        if widened:
            self._widened[function] = sorted(widened)

    def record(self) -> dict[str, Any]:
        """What the manifest keeps: builder, architectures and options, and by function the profile, the hash of the
        graph it was built from, its inputs and outputs (name -> dtype and sizes, null where one varies), the layers of
        the parsed network, and those whose weights became float16.
        """
        options = asdict(self.target.build)
        return {
            "builder": version(self._library),
            "architectures": list(options.pop("architectures")),
            "options": options,
            "profiles": {
                name: {key: [list(shape) for shape in shapes] for key, shapes in self._profiles[name].items()}
                for name in self.graphs
            },
            "onnx_sha256": self._hashes,
            "tensors": self._tensors,
            "layers": self._layers,
            "float16": self._widened,
        }


def _tensors(values: Iterable[onnx.ValueInfoProto]) -> dict[str, Any]:
    import onnx

    return {
        value.name: [
            onnx.helper.tensor_dtype_to_np_dtype(value.type.tensor_type.elem_type).name,
            [each.dim_value if each.HasField("dim_value") else None for each in _dimensions(value)],
        ]
        for value in values
    }


def _dimensions(value: onnx.ValueInfoProto) -> Any:
    return value.type.tensor_type.shape.dim


def _digest(folder: Path) -> str:
    """SHA-256 of a graph and the pool beside it."""
    import hashlib

    files = sorted(path for path in folder.iterdir() if path.is_file())
    return hashlib.sha256("".join(sha256_of(path) for path in files).encode()).hexdigest()
