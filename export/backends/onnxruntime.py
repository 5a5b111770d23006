"""ONNX Runtime, on the CPU or, where the package onnxruntime-gpu is installed, on an NVIDIA GPU."""

from __future__ import annotations

import functools
import json
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import onnxruntime

from export.backends import Kernel, LoadedGraph, TensorSpec, check_options, feeds
from export.errors import EngineError

if TYPE_CHECKING:
    from export.loop import WholeLoop
    from export.step_plan import StepPlan

OPTIONS: dict[str, tuple[Any, ...]] = {
    "inference_precision": ("float32", "bfloat16"),
    "optimization": ("all", "none"),
    "provider": ("cpu", "cuda", "tensorrt"),
}
"""`inference_precision` is taken so that one manifest serves every backend; this one always computes in float32.
`optimization: none` runs the graph node by node as it is written, integers as rounded floats: slow, the reference.
`provider` is what computes; with another than `cpu`, nodes that it does not have run on the next of `PROVIDERS`."""

PROVIDERS: dict[str, tuple[str, ...]] = {
    "cpu": ("CPUExecutionProvider",),
    "cuda": ("CUDAExecutionProvider", "CPUExecutionProvider"),
    "tensorrt": ("TensorrtExecutionProvider", "CUDAExecutionProvider", "CPUExecutionProvider"),
}
"""Provider -> the execution providers of ONNX Runtime, the preferred one first."""

_DTYPES = {
    "tensor(float)": "float32",
    "tensor(float16)": "float16",
    "tensor(double)": "float64",
    "tensor(int64)": "int64",
    "tensor(int32)": "int32",
    "tensor(uint8)": "uint8",
    "tensor(int8)": "int8",
    "tensor(bool)": "bool",
}
_PRECISIONS = {"float": "f32", "float16": "f16", "double": "f64", "uint8": "int8"}
_FATAL = 4  # errors are raised too, and need not be printed

# This fusion turns `MatMul of dequantized tensors, Add of a float bias` into a Gemm, which no integer kernel matches;
# the layer would run in float, slower than if it had not been quantized (microsoft/onnxruntime issue 11961).
_DISABLED = ["MatMulAddFusion"]


class _Session:
    """One inference session. `run` may be called from several threads; each call owns its outputs."""

    def __init__(self, session: Any) -> None:
        self._session = session
        self.inputs = {value.name: _spec(value) for value in session.get_inputs()}
        self.outputs = {value.name: _spec(value) for value in session.get_outputs()}
        self._names = list(self.outputs)

    def __call__(self, arrays: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        given = feeds(arrays, self.inputs)
        try:
            computed = self._session.run(self._names, given)
        except Exception as error:
            raise EngineError(f"ONNX Runtime could not run the graph: {_sentence(error)}") from error
        return dict(zip(self._names, computed, strict=True))


def load(path: Path, threads: int | None, options: Mapping[str, Any]) -> _Session:
    """Read a graph and its weights, see `export.backends.Backend`."""
    check_options("onnxruntime", options, OPTIONS)
    return _Session(_session(path, _settings(threads, options), options.get("provider", "cpu")))


def joined(graphs: Sequence[LoadedGraph], outputs: Sequence[str]) -> LoadedGraph | None:
    """Never: sessions hand tensors over in the layout they compute in."""
    return None


def whole_loop(
    plan: StepPlan, graphs: Mapping[str, LoadedGraph], latent_input: str, timestep_rank: int
) -> WholeLoop | None:
    """Never: the updates between network calls cost nothing on a CPU."""
    return None


def executed_kernels(path: Path, inputs: Mapping[str, np.ndarray], options: Mapping[str, Any]) -> dict[str, Kernel]:
    """Node name -> kernel, from the profile of one run; the precision is that of the first tensor a kernel reads."""
    check_options("onnxruntime", options, OPTIONS)
    with tempfile.TemporaryDirectory() as folder:
        settings = _settings(1, options)
        settings.enable_profiling = True
        settings.profile_file_prefix = str(Path(folder) / "profile")
        session = _session(path, settings, options.get("provider", "cpu"))
        _Session(session)(inputs)
        events = json.loads(Path(session.end_profiling()).read_text())
    kernels = {}
    for event in events:
        name = event["name"].removesuffix("_kernel_time")
        if event.get("cat") != "Node" or name == event["name"]:
            continue
        shapes = event["args"].get("input_type_shape") or [{}]
        dtype = next(iter(shapes[0]), "none")
        kernels[name] = Kernel(event["args"]["op_name"], _PRECISIONS.get(dtype, dtype))
    return kernels


def _settings(threads: int | None, options: Mapping[str, Any]) -> Any:
    settings = onnxruntime.SessionOptions()
    settings.intra_op_num_threads = threads or 0
    settings.inter_op_num_threads = 1
    settings.execution_mode = onnxruntime.ExecutionMode.ORT_SEQUENTIAL
    level = onnxruntime.GraphOptimizationLevel
    plain = options.get("optimization") == "none"
    settings.graph_optimization_level = level.ORT_DISABLE_ALL if plain else level.ORT_ENABLE_ALL
    settings.log_severity_level = _FATAL
    # An engine is several sessions that run in turn: one that waits must not keep the cores of the next one busy.
    settings.add_session_config_entry("session.force_spinning_stop", "1")
    # Nor should each work in memory of its own, which the caches do not hold; weights go when their session goes.
    _share_memory()
    settings.add_session_config_entry("session.use_env_allocators", "1")
    settings.add_session_config_entry("session.use_device_allocator_for_initializers", "1")
    # Weights that are only stored in 8 bits meet float activations: the default rounds those to 8 bits on the way.
    settings.add_session_config_entry("session.qdq_matmulnbits_accuracy_level", "1")
    return settings


@functools.cache
def _share_memory() -> None:
    """Register the arena that the sessions of this process share."""
    memory = onnxruntime.OrtMemoryInfo(
        "Cpu", onnxruntime.OrtAllocatorType.ORT_ARENA_ALLOCATOR, 0, onnxruntime.OrtMemType.DEFAULT
    )
    onnxruntime.create_and_register_allocator(memory, None)


def _session(path: Path, settings: Any, provider: str) -> Any:
    asked = PROVIDERS[provider]
    missing = [name for name in asked if name not in onnxruntime.get_available_providers()]
    if missing:
        raise EngineError(
            f"this ONNX Runtime has no {missing[0]}, which provider {provider!r} needs: pip install onnxruntime-gpu "
            "in place of onnxruntime, on a machine with an NVIDIA GPU"
        )
    try:
        session = onnxruntime.InferenceSession(
            str(path), settings, providers=list(asked), disabled_optimizers=_DISABLED
        )
    except Exception as error:
        raise EngineError(f"ONNX Runtime cannot load {path.name}: {_sentence(error)}") from error
    if session.get_providers()[0] != asked[0]:  # it goes on without a provider that does not start
        raise EngineError(
            f"ONNX Runtime could not start {asked[0]} here: it needs an NVIDIA GPU, its driver, and the libraries of "
            f"{'TensorRT and ' if provider == 'tensorrt' else ''}CUDA that this onnxruntime-gpu was built for"
        )
    return session


def _spec(value: Any) -> TensorSpec:
    if value.type not in _DTYPES:
        raise EngineError(f"the graph has a tensor {value.name!r} of type {value.type}, which no engine has")
    return TensorSpec(_DTYPES[value.type], tuple(size if isinstance(size, int) else None for size in value.shape))


def _sentence(error: Exception) -> str:
    return " ".join(str(error).split())[:300]
