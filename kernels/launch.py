"""One launch of a kernel: its arguments, its grid, and the configuration chosen for an architecture."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, TypeAlias

import torch

from kernels.errors import KernelError
from kernels.language import Kernel

MOST_PROGRAMS = 65535
"""Along every axis of a grid but the first, by CUDA."""

Descriptor: TypeAlias = Any
"""A `TensorDescriptor` of Triton: address, shape and strides of a tensor, and the tile that is copied at once."""

Argument = torch.Tensor | Descriptor | int | float | bool | str | tuple[int, ...] | None


@dataclass(frozen=True)
class Configuration:
    """How a kernel is cut into programs.

    Attributes:
        warps: of 32 threads, per program.
        stages: of the software pipeline of its loop.
        blocks: compile-time parameters of the kernel by name: tile sizes.
    """

    warps: int
    stages: int = 1
    blocks: Mapping[str, int] = field(default_factory=dict)


Configurations = Mapping[str, Configuration]
"""Architecture (or `interpreter`) -> configuration; `default` serves those that are not named."""


def configuration_for(table: Configurations, architecture: str) -> Configuration:
    """The row of a table for an architecture."""
    return table[architecture if architecture in table else "default"]


@dataclass(frozen=True)
class Launch:
    """A kernel with all it needs to run, or to be compiled for an architecture.

    Attributes:
        kernel: the Triton function.
        grid: number of programs along each axis.
        arguments: every parameter of the kernel by name, but for the blocks of the configuration. Compile-time
            parameters are among them. Tensors on the `meta` device will do for compiling.
        configuration: the blocks, warps and stages.
    """

    kernel: Kernel
    grid: tuple[int, ...]
    arguments: Mapping[str, Argument]
    configuration: Configuration

    def __post_init__(self) -> None:
        if any(programs > MOST_PROGRAMS for programs in self.grid[1:]):
            raise KernelError(f"a grid of {self.grid} programs has an axis after the first longer than {MOST_PROGRAMS}")

    def tensors(self) -> list[torch.Tensor]:
        """The tensors among the arguments, those behind descriptors too."""
        behind = (getattr(value, "base", value) for value in self.arguments.values())
        return [value for value in behind if isinstance(value, torch.Tensor)]

    def run(self) -> None:
        """Start the kernel on the device of its tensors, in the current stream there."""
        device = self.tensors()[0].device
        with torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext():
            self.kernel[self.grid](
                **self.arguments,
                **self.configuration.blocks,
                num_warps=self.configuration.warps,
                num_stages=self.configuration.stages,
                enable_fp_fusion=True,
            )
