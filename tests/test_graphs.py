"""Units that compute positions or sizes in the graph, exported to ONNX and compared at a size not traced."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from compress.engine.jobs import _axes
from compress.families import FAMILIES
from export.to_onnx import export_module
from tests import tiny

MAKERS: dict[str, tuple[Callable[[], Any], tuple[str, ...]]] = {
    "sdxl": (tiny.sdxl, ("time",)),
    "flux": (tiny.flux, ("embed", "rope", "head")),
}
TRACED = {"batch": 2, "height": 8, "width": 12, "prompt_tokens": 5}
OTHER = {"batch": 1, "height": 12, "width": 4, "prompt_tokens": 3}


@pytest.mark.parametrize("name", MAKERS)
def test_units_take_any_size(name: str) -> None:
    """`export_module` compares graph and module at both sizes."""
    torch.manual_seed(0)
    make, wanted = MAKERS[name]
    denoiser = make()
    tiny.shake(denoiser)
    family = FAMILIES[type(denoiser).__name__]
    known = [family.example_inputs(denoiser, **sizes) for sizes in (TRACED, OTHER)]
    for unit in family.units(denoiser):
        segment = unit.bind(denoiser)
        example, check = ({key: tensors[key] for key in segment.inputs} for tensors in known)
        if unit.name in wanted:
            axes = _axes(example, check, family.dynamic_axes(), {"batch", "height", "width", "prompt_tokens"})
            graph = export_module(segment.module, example, axes, segment.outputs, check, name=unit.name)
            assert tuple(value.name for value in graph.graph.input) == segment.inputs
        for tensors, given in zip(known, (example, check), strict=True):
            with torch.no_grad():
                tensors.update(zip(segment.outputs, segment.module(**given), strict=True))


@pytest.mark.slow
@pytest.mark.parametrize("name", MAKERS)
def test_denoisers_take_any_size(name: str) -> None:
    """The whole denoiser as one graph."""
    torch.manual_seed(0)
    denoiser = MAKERS[name][0]()
    tiny.shake(denoiser)
    family = FAMILIES[type(denoiser).__name__]
    example, check = (family.example_inputs(denoiser, **sizes) for sizes in (TRACED, OTHER))
    axes = {key: family.dynamic_axes()[key] for key in example}
    (segment,) = family.segments(denoiser, None).segments
    graph = export_module(segment.module, example, axes, segment.outputs, check, name=name)
    assert tuple(value.name for value in graph.graph.input) == family.inputs(denoiser)
