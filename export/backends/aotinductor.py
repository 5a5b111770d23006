"""AOTInductor packages on an NVIDIA GPU, or on the CPU that they were compiled for."""

from __future__ import annotations

import json
import logging
import threading
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from export.backends import Kernel, LoadedGraph, TensorSpec, check_options, feeds
from export.cuda_graph import record
from export.device_loop import DeviceLoop, obstacle
from export.errors import EngineError
from export.gpu import gpu_here
from export.loop import WholeLoop
from export.step_plan import StepPlan
from export.to_aotinductor import METADATA
from kernels import operators as operators  # registers what packages call

OPTIONS: dict[str, tuple[Any, ...]] = {"device": ("cuda", "cpu"), "inference_precision": ("float32", "bfloat16")}
"""What a package was built for; it can be nothing else when it is loaded."""

FORMS = 2
"""Sets of input shapes whose CUDA graph is kept, of each package."""

_ALIGNED = 16  # bytes
_MODEL = "model"  # the name that AOTInductor gives the one model of a package
_LOG = logging.getLogger("export")


class _Package:
    """One compiled function. NumPy sees 16-bit floats as float32; tensors that stay on the device are as they are."""

    def __init__(self, name: str, runner: Any, said: Mapping[str, Any], device: torch.device) -> None:
        self.device = device
        self.dtypes = {key: getattr(torch, dtype) for key, (dtype, _) in said["inputs"].items()}
        self.inputs: Mapping[str, TensorSpec] = {key: _spec(*value) for key, value in said["inputs"].items()}
        self.outputs: Mapping[str, TensorSpec] = {key: _spec(*value) for key, value in said["outputs"].items()}
        self._name, self._runner = name, runner
        self._forms: OrderedDict[Any, _Form] = OrderedDict()
        self._lock = threading.RLock()

    def __call__(self, arrays: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        given = feeds(arrays, self.inputs)
        with self._lock, torch.no_grad():
            try:
                computed = self._computed({name: torch.from_numpy(array) for name, array in given.items()})
            except RuntimeError as error:
                raise EngineError(f"AOTInductor could not run {self._name}: {_sentence(error)}") from error
            return {name: np.array(_seen(value).cpu().numpy()) for name, value in computed.items()}

    def run(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Run on tensors of this package's device and dtypes; waits for nothing."""
        with self._lock:
            computed = self._runner(**{name: _as_traced(tensors[name]) for name in self.inputs})
        return dict(zip(self.outputs, computed, strict=True))

    def _computed(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        placed = {name: value.to(self.device, self.dtypes[name]) for name, value in tensors.items()}
        if self.device.type != "cuda":
            return self.run(placed)
        key = tuple(value.shape for value in placed.values())
        if key not in self._forms:
            while len(self._forms) >= FORMS:
                self._forms.popitem(last=False)
            self._forms[key] = _Form(self, placed)
        self._forms.move_to_end(key)
        return self._forms[key](placed)


class _Form:
    """One call recorded as a CUDA graph, for inputs of the shapes it was made with."""

    def __init__(self, package: _Package, tensors: Mapping[str, Tensor]) -> None:
        self._tensors = {name: value.clone() for name, value in tensors.items()}
        self._graph, self._outputs = record(lambda: package.run(self._tensors), lambda: None)

    def __call__(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        for name, value in tensors.items():
            self._tensors[name].copy_(value)
        self._graph.replay()
        return self._outputs


def load(path: Path, threads: int | None, options: Mapping[str, Any]) -> _Package:
    """Load a package, see `export.backends.Backend`: from here on its machine code may do anything.

    The threads are those of PyTorch in this process; a GPU has none.
    """
    check_options("aotinductor", options, OPTIONS)
    device = torch.device(options.get("device", "cuda"))
    if device.type == "cuda" and not (gpu_here() and torch.cuda.is_available()):
        raise EngineError(
            f"{path.name} was compiled for an NVIDIA GPU, and there is none here, or this PyTorch has no CUDA: run it "
            "on the machine that built it, or open the engine with another target"
        )
    said = _metadata(path, device)
    if threads is not None and device.type == "cpu":
        torch.set_num_threads(threads)
    try:
        runner = torch._inductor.aoti_load_package(str(path), run_single_threaded=True)
    except (RuntimeError, OSError) as error:
        raise EngineError(f"AOTInductor cannot load {path.name}: {_sentence(error)}") from error
    return _Package(path.name, runner, said, device)


def joined(graphs: Sequence[LoadedGraph], outputs: Sequence[str]) -> LoadedGraph | None:
    """Never: tensors stay on the device between segments where the whole loop runs there."""
    return None


def whole_loop(
    plan: StepPlan, graphs: Mapping[str, LoadedGraph], latent_input: str, timestep_rank: int
) -> WholeLoop | None:
    """The loop on the device, see `export.device_loop`; None for plans that change while they run."""
    why = obstacle(plan)
    if why is not None:
        _LOG.warning("the loop runs row by row, with one CUDA graph per segment: %s", why)
        return None
    packages = {name: graph for name, graph in graphs.items() if isinstance(graph, _Package)}
    dtypes = {key: dtype for package in packages.values() for key, dtype in package.dtypes.items()}
    functions = {name: package.run for name, package in packages.items()}
    device = next(iter(packages.values())).device
    return DeviceLoop(plan, functions, latent_input, timestep_rank, dtypes, device)


def executed_kernels(path: Path, inputs: Mapping[str, np.ndarray], options: Mapping[str, Any]) -> dict[str, Kernel]:
    """Run once and tell what ran, from PyTorch's profiler; the precision is that of the package's first real input."""
    package = load(path, 1, options)
    kinds = [dtype for dtype in package.dtypes.values() if dtype.is_floating_point]
    precision = {torch.bfloat16: "bf16", torch.float16: "f16"}.get(kinds[0], "f32") if kinds else "none"
    with torch.profiler.profile() as profile:
        package(inputs)
    return {event.key: Kernel(event.key, precision) for event in profile.key_averages()}


def _metadata(path: Path, device: torch.device) -> Mapping[str, Any]:
    """What a package says of itself, read before any of its code is loaded.

    Raises:
        EngineError: it is no package of ours, or was compiled by another PyTorch, or for another GPU architecture.
    """
    try:
        loader: Any = torch._C._aoti.AOTIModelPackageLoader
        found = loader.load_metadata_from_package(str(path), _MODEL)
        said: Mapping[str, Any] = json.loads(found[METADATA])
    except (RuntimeError, KeyError, ValueError) as error:
        raise EngineError(f"{path.name} is no package of this project: {_sentence(error)}") from error
    again = "build the engine again on this machine"
    if said["torch"] != torch.__version__:
        raise EngineError(
            f"{path.name} was compiled by torch {said['torch']}, and this is {torch.__version__}: {again}"
        )
    built = found.get("AOTI_COMPUTE_CAPABILITY", "")
    if device.type == "cuda" and built:
        major, minor = torch.cuda.get_device_capability()
        if built not in (f"{major}{minor}", f"{major}.{minor}"):
            raise EngineError(f"{path.name} was compiled for sm_{built}, and this GPU is sm_{major}{minor}: {again}")
    return said


def _as_traced(value: Tensor) -> Tensor:
    """Contiguous and aligned, as what a package was traced with: its code relies on both."""
    value = value.contiguous()
    return value if value.data_ptr() % _ALIGNED == 0 else value.clone()


def _spec(dtype: str, shape: Sequence[int | None]) -> TensorSpec:
    return TensorSpec("float32" if dtype in ("bfloat16", "float16") else dtype, tuple(shape))


def _seen(value: Tensor) -> Tensor:
    return value.float() if value.dtype in (torch.bfloat16, torch.float16) else value


def _sentence(error: Exception) -> str:
    return " ".join(str(error).split())[:300]
