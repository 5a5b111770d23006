"""Runtimes behind one call: `load` a graph file, get a function from named arrays to named arrays."""

from __future__ import annotations

import functools
import importlib
import importlib.util
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Protocol

import numpy as np

from export.errors import EngineError
from export.gpu import gpu_here

if TYPE_CHECKING:
    from export.loop import WholeLoop
    from export.step_plan import StepPlan


@dataclass(frozen=True)
class TensorSpec:
    """One input or output of a graph: NumPy dtype name, and one size per dimension (None where it may vary)."""

    dtype: str
    shape: tuple[int | None, ...]

    @functools.cached_property
    def numpy_dtype(self) -> np.dtype:
        """The dtype itself, which compares ten times faster than its name."""
        return np.dtype(self.dtype)

    @functools.cached_property
    def fixed(self) -> tuple[tuple[int, int], ...]:
        """The dimensions that may not vary, with their sizes."""
        return tuple((dimension, size) for dimension, size in enumerate(self.shape) if size is not None)


@dataclass(frozen=True)
class Kernel:
    """What a runtime executed: the kind of operation, and the precision it computed in (`int8`, `bf16`, `f32`, ...)."""

    operation: str
    precision: str


class LoadedGraph(Protocol):
    """A graph ready to run. Thread-safe; keeps no reference to its inputs, and its outputs are the caller's own."""

    inputs: Mapping[str, TensorSpec]
    outputs: Mapping[str, TensorSpec]

    def __call__(self, arrays: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Run. Arrays the graph does not take are ignored.

        Raises:
            EngineError: an input is missing, or does not have the dtype or shape of the graph.
        """
        ...


class Backend(Protocol):
    """What a module of this package offers."""

    def load(self, path: Path, threads: int | None, options: Mapping[str, Any]) -> LoadedGraph:
        """Read a graph and its weights.

        Args:
            path: of the `.onnx` file, whose weight pool lies beside it, or of the `.pt2` file.
            threads: to compute with; None leaves the choice to the runtime.
            options: of this backend, as the manifest keeps them.

        Raises:
            EngineError: the graph cannot be read or compiled, or an option is unknown.
        """
        ...

    def joined(self, graphs: Sequence[LoadedGraph], outputs: Sequence[str]) -> LoadedGraph | None:
        """Several graphs, each of which takes outputs of those before it, as one graph.

        Args:
            graphs: loaded by this backend with the same threads and options.
            outputs: that the one graph is to give.

        Returns:
            None where this runtime gains nothing by it.
        """
        ...

    def whole_loop(
        self, plan: StepPlan, graphs: Mapping[str, LoadedGraph], latent_input: str, timestep_rank: int
    ) -> WholeLoop | None:
        """The denoising loop over loaded segments as one function.

        Args:
            plan: that it runs.
            graphs: of its segments, loaded by this backend.
            latent_input: the segment input that takes the latent.
            timestep_rank: 1 feeds `timestep` as (batch,), 0 as a scalar.

        Returns:
            None where this runtime has no such loop, or not for this plan; the reason is logged.
        """
        ...

    def executed_kernels(
        self, path: Path, inputs: Mapping[str, np.ndarray], options: Mapping[str, Any]
    ) -> dict[str, Kernel]:
        """Run once on one thread and tell what ran: node name -> kernel, from the runtime's own records."""
        ...


@dataclass(frozen=True)
class Row:
    """A backend.

    Attributes:
        module: of it, here.
        package: that it needs.
        install: what a user types to get that package.
        graphs: how its graphs are written: as data that a runtime compiles, or as machine code, which does whatever it
            was made to do, and was built for one machine.
        device: that it needs.
    """

    module: str
    package: str
    install: str
    graphs: Literal["onnx", "machine code"] = "onnx"
    device: Literal["cpu", "cuda"] = "cpu"


BACKENDS: dict[str, Row] = {
    "onnxruntime": Row("export.backends.onnxruntime", "onnxruntime", "pip install onnxruntime"),
    "openvino": Row("export.backends.openvino", "openvino", "pip install 'latent-compress[openvino]'"),
    "aotinductor": Row(
        "export.backends.aotinductor", "torch", "pip install 'latent-compress[gpu]'", "machine code", "cuda"
    ),
}


BUILT_ONLY = {
    "onnxruntime-web": "an engine for the web is run by a browser: serve its folder, for instance with `python -m "
    "http.server -d FOLDER`, and open the page, or open another target of the engine"
} | {
    name: f"engines of {title} are built by this version and not opened by it: run them with NVIDIA's own runtime on a "
    "GPU, or open another target of the engine"
    for name, title in (("tensorrt", "TensorRT"), ("tensorrt-rtx", "TensorRT for RTX"))
}
"""Backend that no module here opens -> what to do."""


def available(name: str) -> bool:
    """Whether the package of a backend is installed, and its device is there."""
    if name not in BACKENDS or importlib.util.find_spec(BACKENDS[name].package) is None:
        return False
    return BACKENDS[name].device == "cpu" or gpu_here()


def holds_machine_code(name: str) -> bool:
    """Whether the graphs of a backend are programs of their own, which are only opened on the user's word."""
    return name in BACKENDS and BACKENDS[name].graphs == "machine code"


def backend(name: str) -> Backend:
    """Import a backend.

    Raises:
        EngineError: it is unknown, or its package is missing or broken.
    """
    if name in BUILT_ONLY:
        raise EngineError(BUILT_ONLY[name])
    if name not in BACKENDS:
        raise EngineError(f"the backend {name!r} is unknown; known backends: {', '.join(BACKENDS)}")
    row = BACKENDS[name]
    try:
        module: Any = importlib.import_module(row.module)
    except ImportError as error:
        raise EngineError(f"the backend {name!r} cannot be imported ({error}): {row.install}") from error
    return module


def check_options(name: str, given: Mapping[str, Any], allowed: Mapping[str, tuple[Any, ...]]) -> None:
    """Refuse options a backend does not have.

    Raises:
        EngineError: names the option and what is allowed.
    """
    for key, value in given.items():
        if key not in allowed:
            known = ", ".join(allowed) or "none"
            raise EngineError(f"the backend {name!r} has no option {key!r}; its options: {known}")
        if value not in allowed[key]:
            raise EngineError(f"the option {key!r} of the backend {name!r} is one of {allowed[key]}, not {value!r}")


def feeds(arrays: Mapping[str, np.ndarray], inputs: Mapping[str, TensorSpec]) -> dict[str, np.ndarray]:
    """Pick the inputs of a graph from `arrays`, contiguous and checked.

    Raises:
        EngineError: one is missing, or has another dtype or shape.
    """
    found = {}
    for name, spec in inputs.items():
        array = arrays.get(name)
        if array is None:
            raise EngineError(f"the graph takes {name!r}, which was not given")
        if array.dtype != spec.numpy_dtype:
            raise EngineError(f"{name!r} is {array.dtype}, but the graph takes {spec.dtype}")
        shape = array.shape
        if len(shape) != len(spec.shape):
            raise _misshapen(name, array, spec)
        for dimension, size in spec.fixed:
            if shape[dimension] != size:
                raise _misshapen(name, array, spec)
        found[name] = array if array.flags.c_contiguous else np.ascontiguousarray(array)
    return found


def _misshapen(name: str, array: np.ndarray, spec: TensorSpec) -> EngineError:
    wanted = ", ".join("any" if size is None else str(size) for size in spec.shape)
    return EngineError(f"{name!r} has the shape {array.shape}, but the graph takes ({wanted})")
