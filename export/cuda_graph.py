"""Records work on a GPU once, so that it can be replayed as one CUDA graph."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import torch

Result = TypeVar("Result")


def record(work: Callable[[], Result], again: Callable[[], None]) -> tuple[torch.cuda.CUDAGraph, Result]:
    """Run some work, which loads and compiles what it needs, and then record it.

    Args:
        work: launches kernels over tensors whose addresses stay; it must not wait for the GPU.
        again: puts the tensors back as they were before the work.

    Returns:
        The graph, and what the work gave while it was recorded: tensors that every replay fills.
    """
    aside = torch.cuda.Stream()
    aside.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(aside):
        work()
    torch.cuda.current_stream().wait_stream(aside)
    again()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result = work()
    return graph, result
