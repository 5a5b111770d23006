"""Lowering of a PyTorch module to an AOTInductor package: traced and checked on any machine, compiled where it runs."""

from __future__ import annotations

import copy
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import ExportedProgram

from export.errors import ExportError
from export.half_weights import HalfWeight
from export.tracing import in_one_line, quietly, require_other_sizes, trace

TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 3e-2, torch.float16: 4e-3}
"""Largest difference allowed between module and program, relative to the largest absolute value of the output."""

KEPT = ("timestep", "time_ids", "guidance")
"""Inputs that stay float32 whatever the network computes in: 16 bits do not hold all their values."""

METADATA = "latent_compress"
"""The key, in the metadata of a package, of what it takes and gives."""


@dataclass(frozen=True)
class Program:
    """A traced module, ready to be compiled on the device it was traced for.

    Attributes:
        name: of the function.
        exported: the program; takes its inputs by name.
        inputs, outputs: name -> (dtype as PyTorch names it, shape with None where a size may vary), in order.
    """

    name: str
    exported: ExportedProgram
    inputs: Mapping[str, tuple[str, tuple[int | None, ...]]]
    outputs: Mapping[str, tuple[str, tuple[int | None, ...]]]


def trace_module(
    module: nn.Module,
    example_inputs: Mapping[str, Tensor],
    dynamic_axes: Mapping[str, Mapping[int, str]],
    output_names: Sequence[str],
    check_inputs: Mapping[str, Tensor],
    *,
    name: str = "graph",
    device: str = "cpu",
    dtype: torch.dtype = torch.float32,
) -> Program:
    """Trace a copy of a module on a device and compare the program with it at another size.

    Args:
        module: its `forward` takes the inputs by name and returns a tensor or a tuple; it is not changed.
        example_inputs: input name -> tensor; dynamic dimensions are at least 2 here.
        dynamic_axes: input name -> {dimension: axis name}; other dimensions are fixed.
        output_names: of the tuple.
        check_inputs: the same inputs with another size on every dynamic axis.
        name: in errors.
        device: that the package will run on.
        dtype: that the network computes in; real inputs but `KEPT` have it, and so have the outputs.

    Raises:
        ExportError: the module cannot be traced, or the program does not compute what the module does.
    """
    require_other_sizes(name, example_inputs, dynamic_axes, check_inputs)
    moved = _moved(module, device, dtype).eval()
    example, check = (_cast(inputs, device, dtype) for inputs in (example_inputs, check_inputs))
    with torch.no_grad(), quietly():
        exported = trace(name, moved, example, dynamic_axes)
        for given in (example, check):
            _compare(name, moved, exported, given, dtype)
    values = [node.meta["val"] for node in exported.graph.nodes if node.op == "output" for node in node.args[0]]
    if len(values) != len(output_names):
        raise ExportError(f"{name} gives {len(values)} tensors, but {len(output_names)} were named")
    given_axes = {key: dynamic_axes.get(key, {}) for key in example}
    return Program(
        name=name,
        exported=exported,
        inputs={
            key: (_named(value), tuple(None if d in given_axes[key] else size for d, size in enumerate(value.shape)))
            for key, value in example.items()
        },
        outputs={
            key: (_named(value), tuple(size if isinstance(size, int) else None for size in value.shape))
            for key, value in zip(output_names, values, strict=True)
        },
    )


def build_package(program: Program, path: Path, options: Mapping[str, Any] | None = None) -> None:
    """Compile a program to machine code for the device it was traced on.

    The package holds a library for this very processor, or GPU architecture, and this version of PyTorch; beside the
    code it says what it takes and gives.

    Args:
        program: the traced module.
        path: of the `.pt2` file to write.
        options: further settings of Inductor.

    Raises:
        ExportError: it cannot be compiled (a C++ compiler is needed, and on a GPU also Triton).
    """
    said = {"inputs": dict(program.inputs), "outputs": dict(program.outputs), "torch": torch.__version__}
    settings = {"aot_inductor.metadata": {METADATA: json.dumps(said)}, **(options or {})}
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        with torch.no_grad(), quietly():
            torch._inductor.aoti_compile_and_package(
                program.exported, package_path=str(path), inductor_configs=settings
            )
    except Exception as error:
        raise ExportError(f"{program.name} cannot be compiled by AOTInductor: {in_one_line(error)}") from error


def _moved(module: nn.Module, device: str, dtype: torch.dtype) -> nn.Module:
    """A copy on a device, real weights in a dtype; the module itself stays as it is, and no weight is there thrice."""

    def place(tensor: Tensor) -> Tensor:
        values = tensor.stored if isinstance(tensor, HalfWeight) else tensor.detach()
        return values.to(device, dtype if tensor.is_floating_point() else tensor.dtype)

    tensors: dict[int, Any] = {id(p): nn.Parameter(place(p), requires_grad=False) for p in module.parameters()}
    tensors |= {id(buffer): place(buffer) for buffer in module.buffers()}
    return copy.deepcopy(module, tensors)


def _cast(inputs: Mapping[str, Tensor], device: str, dtype: torch.dtype) -> dict[str, Tensor]:
    """Contiguous, since a package takes the strides it was traced with: an output of a segment can be a view."""
    return {
        name: value.to(device, dtype if value.dtype == torch.float32 and name not in KEPT else value.dtype).contiguous()
        for name, value in inputs.items()
    }


def _compare(
    name: str, module: nn.Module, exported: ExportedProgram, inputs: Mapping[str, Tensor], dtype: torch.dtype
) -> None:
    wanted, got = (_tuple(function(**inputs)) for function in (module, exported.module()))
    for expected, value in zip(wanted, got, strict=True):
        scale = max(float(expected.abs().max()), 1e-30)
        error = float((value.double() - expected.double()).abs().max()) / scale
        if not error <= TOLERANCE[dtype]:
            sizes = {key: tuple(tensor.shape) for key, tensor in inputs.items()}
            raise ExportError(f"the program of {name} differs from its module by {error:.1e} at {sizes}")


def _tuple(result: Any) -> tuple[Tensor, ...]:
    return (result,) if isinstance(result, Tensor) else tuple(result)


def _named(value: Tensor) -> str:
    return str(value.dtype).removeprefix("torch.")
