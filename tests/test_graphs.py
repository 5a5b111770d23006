"""Denoisers that compute positions or sizes in the graph, exported to ONNX and compared at a size not traced."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from compress.families import FAMILIES
from export.to_onnx import export_module
from tests import tiny

MAKERS: dict[str, Callable[[], Any]] = {
    "flux": lambda: tiny.flux(num_layers=1, num_single_layers=1),
}
TRACED = {"batch": 2, "height": 8, "width": 12, "prompt_tokens": 5}
OTHER = {"batch": 1, "height": 12, "width": 4, "prompt_tokens": 3}


@pytest.mark.parametrize("name", MAKERS)
def test_a_denoiser_takes_any_size(name: str) -> None:
    """`export_module` compares graph and module at both sizes."""
    torch.manual_seed(0)
    denoiser = MAKERS[name]()
    tiny.shake(denoiser)
    family = FAMILIES[type(denoiser).__name__]
    example, check = (family.example_inputs(denoiser, **sizes) for sizes in (TRACED, OTHER))
    axes = {key: family.dynamic_axes()[key] for key in example}
    (segment,) = family.segments(denoiser, None).segments
    graph = export_module(segment.module, example, axes, segment.outputs, check, name=name)
    assert [value.name for value in graph.graph.input] == list(family.inputs(denoiser))
