"""The `config.pbtxt` of a model of Triton Inference Server (protobuf text of `inference.ModelConfig`)."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from compress.errors import RefusedError

DATA_TYPES = {
    "float32": "TYPE_FP32",
    "float16": "TYPE_FP16",
    "float64": "TYPE_FP64",
    "int64": "TYPE_INT64",
    "int32": "TYPE_INT32",
    "uint64": "TYPE_UINT64",
    "uint8": "TYPE_UINT8",
    "int8": "TYPE_INT8",
    "bool": "TYPE_BOOL",
    "string": "TYPE_STRING",
}
"""NumPy dtype name (`string` for bytes of any length) -> Triton's."""

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,127}")


@dataclass(frozen=True)
class Tensor:
    """An input or output.

    Attributes:
        name: of it.
        dtype: a key of `DATA_TYPES`.
        dims: without the batch dimension where the model has one; None where a size may vary.
        optional: an input that requests may leave out.
    """

    name: str
    dtype: str
    dims: tuple[int | None, ...]
    optional: bool = False

    def text(self) -> str:
        """As an entry of `input` or `output`."""
        if self.dtype not in DATA_TYPES or not self.dims:
            raise RefusedError(
                f"Triton has no tensor like {self.name!r} ({self.dtype}, {len(self.dims)} dimensions): it takes "
                f"{', '.join(DATA_TYPES)} of at least one dimension"
            )
        dims = ", ".join("-1" if size is None else str(size) for size in self.dims)
        optional = "\n    optional: true" if self.optional else ""
        return (
            f"  {{\n    name: {json.dumps(self.name)}\n    data_type: {DATA_TYPES[self.dtype]}\n    dims: [ {dims} ]"
            f"{optional}\n  }}"
        )


@dataclass(frozen=True)
class ModelConfig:
    """What Triton must know of a model.

    Attributes:
        name: of the model and of its folder.
        backend: `python`, `onnxruntime` or `tensorrt`.
        inputs, outputs: its tensors.
        kind: what its one instance runs on.
        max_batch_size: 0 where the tensors have no batch dimension that Triton may join requests along. From 2 on,
            requests are joined as they wait, without waiting for more.
    """

    name: str
    backend: str
    inputs: Sequence[Tensor]
    outputs: Sequence[Tensor]
    kind: Literal["KIND_CPU", "KIND_GPU"]
    max_batch_size: int = 0

    def text(self) -> str:
        """The file.

        Raises:
            RefusedError: the name cannot be that of a folder and of a route, or a tensor is none of Triton's.
        """
        check_name(self.name)
        lines = [
            f'name: "{self.name}"',
            f'backend: "{self.backend}"',
            f"max_batch_size: {self.max_batch_size}",
            *(
                f"{key} [\n" + ",\n".join(tensor.text() for tensor in tensors) + "\n]"
                for key, tensors in (("input", self.inputs), ("output", self.outputs))
            ),
            f"instance_group [\n  {{\n    count: 1\n    kind: {self.kind}\n  }}\n]",
        ]
        if self.max_batch_size > 1:
            lines.append("dynamic_batching {\n  max_queue_delay_microseconds: 0\n}")
        return "\n".join(lines) + "\n"


def check_name(name: str) -> None:
    """Refuse a name that cannot be that of a folder and of a route.

    Raises:
        RefusedError: says what a name may be made of.
    """
    if not _NAME.fullmatch(name):
        raise RefusedError(
            f"a model of Triton cannot be called {name!r}: take 128 letters, digits, '_', '-' and '.' at most, the "
            "first a letter or digit"
        )
