"""OpenVINO on the CPU."""

from __future__ import annotations

import functools
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import openvino

from export.backends import Kernel, TensorSpec, check_options, feeds
from export.errors import EngineError

OPTIONS: dict[str, tuple[Any, ...]] = {"inference_precision": ("float32", "bfloat16")}
"""What the float part of a graph is computed in."""

_HINTS = {"float32": "f32", "bfloat16": "bf16"}
_PRECISIONS = {"i8": "int8", "u8": "int8", "bf16": "bf16", "f16": "f16", "f32": "f32"}


class _Compiled:
    """One compiled graph with one infer request; calls from several threads take turns."""

    def __init__(self, compiled: Any) -> None:
        self._compiled = compiled
        self._request = compiled.create_infer_request()
        self._lock = threading.Lock()
        self.inputs = {port.get_any_name(): _spec(port) for port in compiled.inputs}
        self.outputs = {port.get_any_name(): _spec(port) for port in compiled.outputs}

    def __call__(self, arrays: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        given, request = feeds(arrays, self.inputs), self._request
        try:
            with self._lock:
                # A third of the time of `infer(given)`, which looks every name up anew.
                for i, array in enumerate(given.values()):
                    request.set_input_tensor(i, openvino.Tensor(array, shared_memory=True))
                request.infer()
                return {name: request.get_output_tensor(i).data.copy() for i, name in enumerate(self.outputs)}
        except Exception as error:
            raise EngineError(f"OpenVINO could not run the graph: {_sentence(error)}") from error


def load(path: Path, threads: int | None, options: Mapping[str, Any]) -> _Compiled:
    """Read a graph and its weights, see `export.backends.Backend`."""
    return _Compiled(_compile(path, threads, options))


def executed_kernels(path: Path, inputs: Mapping[str, np.ndarray], options: Mapping[str, Any]) -> dict[str, Kernel]:
    """Node name -> kernel, from the graph OpenVINO executes; the precision is that of the chosen implementation."""
    compiled = _compile(path, 1, options)
    _Compiled(compiled)(inputs)
    kernels = {}
    for node in compiled.get_runtime_model().get_ordered_ops():
        info = {key: str(node.rt_info[key].value) for key in ("layerType", "primitiveType", "runtimePrecision")}
        chosen = info["primitiveType"].rpartition("_")[2].lower()
        precision = chosen if chosen in _PRECISIONS else info["runtimePrecision"].lower()
        kernels[node.get_friendly_name()] = Kernel(info["layerType"], _PRECISIONS.get(precision, precision))
    return kernels


def _compile(path: Path, threads: int | None, options: Mapping[str, Any]) -> Any:
    check_options("openvino", options, OPTIONS)
    settings: dict[str, Any] = {
        "PERFORMANCE_HINT": "LATENCY",
        "INFERENCE_PRECISION_HINT": _HINTS[options.get("inference_precision", "float32")],
        # Two processes that pin their threads would share a core while another one idles.
        "ENABLE_CPU_PINNING": False,
        # Weights that are only stored in 8 bits meet float activations: the default rounds those to 8 bits on the way.
        "DYNAMIC_QUANTIZATION_GROUP_SIZE": 0,
    }
    if threads:
        settings["INFERENCE_NUM_THREADS"] = threads
    try:
        core = _core()
        return core.compile_model(core.read_model(str(path)), "CPU", settings)
    except Exception as error:
        raise EngineError(f"OpenVINO cannot load {path.name}: {_sentence(error)}") from error


@functools.cache
def _core() -> Any:
    return openvino.Core()


def _spec(port: Any) -> TensorSpec:
    shape = port.get_partial_shape()
    sizes = tuple(None if dimension.is_dynamic else dimension.get_length() for dimension in shape)
    return TensorSpec(np.dtype(port.get_element_type().to_dtype()).name, sizes)


def _sentence(error: Exception) -> str:
    return " ".join(str(error).split())[:300]
