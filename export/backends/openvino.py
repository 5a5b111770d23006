"""OpenVINO on the CPU."""

from __future__ import annotations

import contextlib
import functools
import threading
from collections import OrderedDict
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import openvino

from export.backends import Kernel, LoadedGraph, TensorSpec, check_options, feeds
from export.errors import EngineError

if TYPE_CHECKING:
    from export.loop import WholeLoop
    from export.step_plan import StepPlan

OPTIONS: dict[str, tuple[Any, ...]] = {"inference_precision": ("float32", "bfloat16")}
"""What the float part of a graph is computed in."""

FORMS = 8
"""Sets of input shapes that stay compiled at a time, each with its own copy of the weights; one size of picture and of
batch needs two: guidance runs both halves of the batch in some rows, one in others. A server draws in four sizes."""

Shapes = tuple[tuple[int, ...], ...]

_HINTS = {"float32": "f32", "bfloat16": "bf16"}
_PRECISIONS = {"i8": "int8", "u8": "int8", "bf16": "bf16", "f16": "f16", "f32": "f32"}


class _Graph:
    """One graph, compiled anew for each set of input shapes: with sizes known, OpenVINO chooses layouts and fusions
    that run a small network in two thirds of the time. What was used longest ago is dropped, so a result never
    depends on the calls before it.
    """

    def __init__(self, name: str, model: Any, settings: Mapping[str, Any]) -> None:
        self.name, self.model, self.settings = name, model, settings
        self._forms: OrderedDict[Shapes, _Form] = OrderedDict()
        self._lock = threading.Lock()
        self.inputs: Mapping[str, TensorSpec] = {port.get_any_name(): _spec(port) for port in model.inputs}
        self.outputs: Mapping[str, TensorSpec] = {port.get_any_name(): _spec(port) for port in model.outputs}

    def __call__(self, arrays: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        given = feeds(arrays, self.inputs)
        form = self.form({name: array.shape for name, array in given.items()})
        try:
            return dict(zip(self.outputs, form(list(given.values())), strict=True))
        except Exception as error:
            raise EngineError(f"OpenVINO could not run the graph: {_sentence(error)}") from error

    def form(self, shapes: Mapping[str, tuple[int, ...]]) -> _Form:
        """The compiled form that runs inputs of these shapes; compiled now where there is none."""
        key = tuple(shapes.values())
        with self._lock:
            if key not in self._forms:
                with _loading(self.name):
                    model = self.model.clone()
                    model.reshape({name: list(shape) for name, shape in shapes.items()})
                    self._forms[key] = _Form(_core().compile_model(model, "CPU", self.settings))
                if len(self._forms) > FORMS:
                    self._forms.popitem(last=False)
            self._forms.move_to_end(key)
            return self._forms[key]


class _Form:
    """One compiled form of a graph with one infer request and its arrays; calls from several threads take turns."""

    def __init__(self, compiled: Any) -> None:
        self.compiled = compiled
        self._request = compiled.create_infer_request()
        self._inputs = [np.empty(port.shape, port.element_type.to_dtype()) for port in compiled.inputs]
        self._outputs = [np.empty(port.shape, port.element_type.to_dtype()) for port in compiled.outputs]
        self._lock = threading.Lock()
        # Bound once and copied into: binding the caller's arrays at every call takes longer, for the sizes there are.
        for i, array in enumerate(self._inputs):
            self._request.set_input_tensor(i, openvino.Tensor(array, shared_memory=True))
        for i, array in enumerate(self._outputs):
            self._request.set_output_tensor(i, openvino.Tensor(array, shared_memory=True))

    def __call__(self, arrays: Sequence[np.ndarray]) -> list[np.ndarray]:
        with self._lock:
            for bound, array in zip(self._inputs, arrays, strict=True):
                np.copyto(bound, array)
            self._request.infer()
            return [array.copy() for array in self._outputs]


def load(path: Path, threads: int | None, options: Mapping[str, Any]) -> LoadedGraph:
    """Read a graph and its weights, see `export.backends.Backend`."""
    return _opened(path, threads, options)


def _opened(path: Path, threads: int | None, options: Mapping[str, Any]) -> _Graph:
    check_options("openvino", options, OPTIONS)
    with _loading(path.name):
        return _Graph(path.name, _core().read_model(str(path)), _settings(threads, options))


def joined(graphs: Sequence[LoadedGraph], outputs: Sequence[str]) -> LoadedGraph | None:
    """As one graph, tensors between the parts stay in the layout they are computed in: several percent of the time."""
    own = [graph for graph in graphs if isinstance(graph, _Graph)]
    name = " and ".join(graph.name for graph in own)
    made: dict[str, Any] = {}
    taken: dict[str, Any] = {}
    with _loading(name):
        for model in [graph.model.clone() for graph in own]:
            for port in model.inputs:
                tensor = port.get_any_name()
                if tensor in made:
                    port.replace(made[tensor])
                elif tensor in taken:
                    port.replace(taken[tensor].output(0))
                else:
                    taken[tensor] = port.get_node()
            for port in model.outputs:
                source = port.get_node().input_value(0)
                made[port.get_any_name()] = source
        results = [openvino.opset13.result(made[tensor]) for tensor in outputs]
        whole = openvino.Model(results, list(taken.values()), name)
        for port, tensor in zip(whole.outputs, outputs, strict=True):
            port.tensor.add_names({tensor})
    return _Graph(name, whole, own[0].settings)


@contextlib.contextmanager
def _loading(name: str) -> Iterator[None]:
    try:
        yield
    except Exception as error:
        raise EngineError(f"OpenVINO cannot load {name}: {_sentence(error)}") from error


def whole_loop(
    plan: StepPlan, graphs: Mapping[str, LoadedGraph], latent_input: str, timestep_rank: int
) -> WholeLoop | None:
    """Never: the updates between network calls cost nothing on a CPU."""
    return None


def executed_kernels(path: Path, inputs: Mapping[str, np.ndarray], options: Mapping[str, Any]) -> dict[str, Kernel]:
    """Node name -> kernel, from the graph OpenVINO executes; the precision is that of the chosen implementation."""
    graph = _opened(path, 1, options)
    graph(inputs)
    form = graph.form({name: inputs[name].shape for name in graph.inputs})
    kernels = {}
    for node in form.compiled.get_runtime_model().get_ordered_ops():
        info = {key: str(node.rt_info[key].value) for key in ("layerType", "primitiveType", "runtimePrecision")}
        chosen = info["primitiveType"].rpartition("_")[2].lower()
        precision = chosen if chosen in _PRECISIONS else info["runtimePrecision"].lower()
        kernels[node.get_friendly_name()] = Kernel(info["layerType"], _PRECISIONS.get(precision, precision))
    return kernels


def _settings(threads: int | None, options: Mapping[str, Any]) -> dict[str, Any]:
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
    return settings


@functools.cache
def _core() -> Any:
    return openvino.Core()


def _spec(port: Any) -> TensorSpec:
    shape = port.get_partial_shape()
    sizes = tuple(None if dimension.is_dynamic else dimension.get_length() for dimension in shape)
    return TensorSpec(np.dtype(port.get_element_type().to_dtype()).name, sizes)


def _sentence(error: Exception) -> str:
    return " ".join(str(error).split())[:300]
