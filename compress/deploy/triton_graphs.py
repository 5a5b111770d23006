"""The graphs of an engine as models of their own, for the back ends that Triton Inference Server has."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from compress.deploy.triton_config import ModelConfig, Tensor
from compress.errors import RefusedError
from export.backends import BACKENDS, backend
from export.manifest import Manifest, TargetEntry
from export.weights import write_pool


@dataclass(frozen=True)
class BackEnd:
    """A back end of Triton's.

    Attributes:
        file: what its models are called in the folder of a version.
        kind: what it runs them on.
    """

    file: str
    kind: Literal["KIND_CPU", "KIND_GPU"]


BACK_ENDS = {"onnxruntime": BackEnd("model.onnx", "KIND_CPU"), "tensorrt": BackEnd("model.plan", "KIND_GPU")}
"""Backend of a target -> the back end of that name in Triton."""

UNUSED = "vae_encoder"
"""The Python model begins from no picture."""


def graph_models(folder: Path, manifest: Manifest, target: str, name: str) -> tuple[dict[str, bytes], str]:
    """The models of all graphs of a target, whose batch dimension is one like the others.

    Args:
        folder: of the engine.
        manifest: of it.
        target: one of its targets.
        name: begins the names of the models; that of the function follows.

    Returns:
        Path in the model repository -> content; and what `serve.triton_model.served` reads.

    Raises:
        EngineError: a graph cannot be read.
        RefusedError: Triton has no back end for the target, or a graph takes or gives what Triton has not.
    """
    row = manifest.targets[target]
    if row.backend not in BACK_ENDS:
        raise RefusedError(
            f"Triton has no back end that runs the graphs of {target}; it has one for {', '.join(BACK_ENDS)}: leave "
            "--backends out, or name another target"
        )
    chosen, files, told = BACK_ENDS[row.backend], dict[str, bytes](), dict[str, Any]()
    for function, path in row.graphs.items():
        if function == UNUSED:
            continue
        model = f"{name}-{function}"
        tensors = _tensors(folder, row, function)
        inputs, outputs = (
            [Tensor(key, dtype, tuple(dims)) for key, (dtype, dims) in tensors[side].items()]
            for side in ("inputs", "outputs")
        )
        config = ModelConfig(model, row.backend, inputs, outputs, chosen.kind)
        files[f"{model}/config.pbtxt"] = config.text().encode()
        written = _with_weights(folder / path) if row.backend in BACKENDS else {"": (folder / path).read_bytes()}
        files |= {f"{model}/1/{key or chosen.file}": content for key, content in written.items()}
        told[function] = {"model": model, **tensors}
    return files, json.dumps(told, indent=1) + "\n"


def _tensors(folder: Path, row: TargetEntry, function: str) -> Mapping[str, Mapping[str, Any]]:
    """`inputs` and `outputs` of a graph: name -> dtype and sizes, None where one varies."""
    if row.backend not in BACKENDS:
        if "tensors" not in row.build:
            raise RefusedError("this engine does not say what its graphs take: build it again with this version")
        return row.build["tensors"][function]
    graph = backend(row.backend).load(folder / row.graphs[function], None, row.options.get(function, {}))
    return {
        side: {name: [spec.dtype, list(spec.shape)] for name, spec in specs.items()}
        for side, specs in (("inputs", graph.inputs), ("outputs", graph.outputs))
    }


def _with_weights(path: Path) -> dict[str, bytes]:
    """A graph and a pool of the weights that it alone has: name of the file -> content."""
    import onnx

    with tempfile.TemporaryDirectory() as folder:
        write_pool({"model": onnx.load(path)}, folder)
        return {file.name: file.read_bytes() for file in sorted(Path(folder).iterdir())}
