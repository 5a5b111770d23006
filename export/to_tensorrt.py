"""Builds a TensorRT engine from a strongly typed ONNX graph: TensorRT 10 and 11, and TensorRT for RTX, by one path."""

from __future__ import annotations

import importlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from export.errors import EngineError, ExportError

Shape = tuple[int, ...]
Profile = Mapping[str, tuple[Shape, Shape, Shape]]
"""Input -> its least, best and greatest shape."""

RTX = "tensorrt_rtx"
"""Begins the name of the module that TensorRT for RTX is imported as."""


@dataclass(frozen=True)
class BuildOptions:
    """What is asked of a builder beside the graph.

    Attributes:
        architectures: `sm_89`, ...: what the engine is to run on. TensorRT for RTX compiles for every one of them;
            none leaves the choice to it. Classic TensorRT builds for the GPU it runs on, and takes none.
        weight_streaming: weights may stay in host memory while the engine runs.
        version_compatible: later versions of the library may open the engine.
        refit: weights can be replaced in the built engine.
    """

    architectures: tuple[str, ...] = ()
    weight_streaming: bool = False
    version_compatible: bool = False
    refit: bool = False


@dataclass(frozen=True)
class Built:
    """An engine.

    Attributes:
        engine: its bytes.
        builder: name and version of what built it.
        layers: of the network that the parser made of the graph.
        timing_cache: what the builder learnt, for the next build on the same GPU; empty where it times nothing.
    """

    engine: bytes
    builder: str
    layers: int
    timing_cache: bytes


def build(
    trt: Any,
    graph: Path,
    profiles: Sequence[Profile] = (),
    options: BuildOptions | None = None,
    *,
    timing_cache: bytes = b"",
) -> Built:
    """Parse a graph and build its engine. Types are the graph's own: no precision is asked for.

    Equal graphs of fixed sizes give TensorRT for RTX equal bytes; where a size is dynamic, engines differ in the
    numbers within the names that it gives to tensors of its own (`__mye1234`).

    Args:
        trt: the module of the library: `tensorrt`, `tensorrt_rtx` or `tensorrt_rtx_bindings`.
        graph: of standard ONNX nodes and those of the parser; its weight pool lies beside it.
        profiles: of a graph with dynamic inputs, one at least; each names every dynamic input.
        options: what is asked for.
        timing_cache: of an earlier build.

    Raises:
        EngineError: the library does not offer what is asked for.
        ExportError: the parser or the builder refuses the graph: names the node, or gives the builder's own reason.
    """
    options = options or BuildOptions()
    log = _logger(trt)
    builder = trt.Builder(log)
    network = builder.create_network(_network_flags(trt))
    parser = trt.OnnxParser(network, log)
    if not parser.parse_from_file(str(graph)):
        raise ExportError(f"TensorRT's parser refuses {graph.stem}: {_refusal(parser)}")
    config = builder.create_builder_config()
    for flag in _flags(options):
        config.set_flag(_flag(trt, flag))
    _set_architectures(trt, config, options.architectures)
    for shapes in profiles:
        profile = builder.create_optimization_profile()
        for name, (least, best, greatest) in shapes.items():
            profile.set_shape(name, least, best, greatest)
        if config.add_optimization_profile(profile) < 0:
            raise ExportError(f"TensorRT refuses the sizes of {graph.stem}: {log.said() or dict(shapes)}")
    cache = None if _is_rtx(trt) else config.create_timing_cache(timing_cache)
    if cache is not None:
        config.set_timing_cache(cache, ignore_mismatch=False)
    elif timing_cache:
        raise EngineError("TensorRT for RTX times nothing while it builds: give no timing cache")
    engine = builder.build_serialized_network(network, config)
    if engine is None:
        raise ExportError(f"TensorRT does not build {graph.stem}: {log.said()}")
    learnt = b"" if cache is None else bytes(cache.serialize())
    return Built(bytes(engine), version(trt), network.num_layers, learnt)


def library(name: str) -> Any:
    """Import a library that builds engines.

    Raises:
        EngineError: it is not installed, or broken.
    """
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise EngineError(f"{name} cannot be imported ({error}): {_INSTALL[name]}") from error


_INSTALL = {
    "tensorrt_rtx_bindings": "pip install 'latent-compress[tensorrt]'",
    "tensorrt": "install TensorRT 10 or later from NVIDIA, on a machine with the GPU to build for",
}


def version(trt: Any) -> str:
    """Name and version of a library."""
    return f"TensorRT{' for RTX' if _is_rtx(trt) else ''} {trt.__version__}"


def _is_rtx(trt: Any) -> bool:
    return str(trt.__name__).startswith(RTX)


def _flags(options: BuildOptions) -> list[str]:
    asked = {
        "WEIGHT_STREAMING": options.weight_streaming,
        "VERSION_COMPATIBLE": options.version_compatible,
        "REFIT": options.refit,
    }
    return [flag for flag, wanted in asked.items() if wanted]


def _network_flags(trt: Any) -> int:
    """Strong typing, which TensorRT 10 must be asked for; where the flag is gone there is nothing else."""
    flag = getattr(trt.NetworkDefinitionCreationFlag, "STRONGLY_TYPED", None)
    return 0 if flag is None else 1 << int(flag)


def _flag(trt: Any, name: str) -> Any:
    if not hasattr(trt.BuilderFlag, name):
        raise EngineError(f"{version(trt)} has no {name.lower()}: leave it out")
    return getattr(trt.BuilderFlag, name)


def _set_architectures(trt: Any, config: Any, architectures: Sequence[str]) -> None:
    if not architectures:
        return
    if not _is_rtx(trt):
        raise EngineError("classic TensorRT builds for the GPU it runs on: name no architectures")
    known = {f"sm_{name.removeprefix('SM')}": value for name, value in trt.ComputeCapability.__members__.items()}
    config.num_compute_capabilities = len(architectures)
    for at, name in enumerate(architectures):
        if name not in known:
            offered = ", ".join(one for one in known if one[3:].isdigit())
            raise EngineError(f"{version(trt)} does not build for {name!r}; it builds for {offered}")
        config.set_compute_capability(known[name], at)


def _refusal(parser: Any) -> str:
    """The first error of a parser, with the node it is about, where it is about one."""
    error = parser.get_error(0)
    said = " ".join(error.desc().split())[:300]
    return f"node {error.node_name()!r} ({error.node_operator()}): {said}" if error.node_operator() else said


def _logger(trt: Any) -> Any:
    """A logger of the library that keeps errors, and shows nothing."""

    class Log(trt.ILogger):
        def __init__(self) -> None:
            trt.ILogger.__init__(self)
            self.errors: list[str] = []

        def log(self, severity: Any, message: str) -> None:
            if severity <= trt.ILogger.ERROR:
                self.errors.append(message)

        def said(self) -> str:
            """The first error, as one sentence."""
            return " ".join(self.errors[0].split())[:300] if self.errors else ""

    return Log()
