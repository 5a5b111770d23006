"""Tracing of a module with dynamic sizes, which every lowering begins with."""

from __future__ import annotations

import contextlib
import logging
import warnings
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING

from export.errors import ExportError

if TYPE_CHECKING:
    from torch import Tensor, nn
    from torch.export import ExportedProgram


def require_other_sizes(
    name: str,
    example_inputs: Mapping[str, Tensor],
    dynamic_axes: Mapping[str, Mapping[int, str]],
    check_inputs: Mapping[str, Tensor],
) -> None:
    """Refuse check inputs that have the size of the example on a dynamic axis.

    Raises:
        ExportError: names the input and the axis.
    """
    if list(example_inputs) != list(check_inputs):
        raise ExportError(f"{name}: the check inputs are not those of the example")
    for tensor, axes in dynamic_axes.items():
        if tensor not in example_inputs:
            raise ExportError(f"{name} has no input {tensor!r}, which the dynamic axes name")
        for dimension, axis in axes.items():
            if example_inputs[tensor].shape[dimension] == check_inputs[tensor].shape[dimension]:
                raise ExportError(f"{name}: the check inputs have the same {axis} as the example, so prove nothing")


def trace(
    name: str, module: nn.Module, example_inputs: Mapping[str, Tensor], dynamic_axes: Mapping[str, Mapping[int, str]]
) -> ExportedProgram:
    """Trace with anonymous dynamic dimensions, which infer how sizes depend on each other; where that fails (masks
    whose batch is not seen to be the latent's), with one shared dimension per axis name.

    Raises:
        ExportError: neither works.
    """
    import torch
    from torch.export import Dim

    anonymous = {tensor: dict.fromkeys(dynamic_axes.get(tensor, {}), Dim.DYNAMIC) for tensor in example_inputs}
    shared = {axis: Dim(axis) for axes in dynamic_axes.values() for axis in axes.values()}
    named = {tensor: {d: shared[axis] for d, axis in dynamic_axes.get(tensor, {}).items()} for tensor in example_inputs}
    failures = []
    for shapes in (anonymous, named):
        try:
            return torch.export.export(module, (), dict(example_inputs), dynamic_shapes=shapes, strict=False)
        except Exception as error:
            failures.append(error)
    raise ExportError(f"{name} cannot be traced: {in_one_line(failures[0])}") from failures[0]


@contextlib.contextmanager
def quietly() -> Iterator[None]:
    """Keep the tracer's and the exporter's remarks about themselves from the user; errors are raised as ever."""
    logger = logging.getLogger("torch.onnx")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)


def in_one_line(error: Exception) -> str:
    """The beginning of an error's message, without line breaks."""
    return " ".join(str(error).split())[:300]
