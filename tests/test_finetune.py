"""Finetuning a quantized denoiser: it comes nearer to the float one, changes what it may, and nothing of the model."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from compress.errors import PassError
from compress.finetune import Record, finetuned, recorded
from compress.model.latent_diffusion import LatentDiffusion, load
from compress.passes.base import PassContext
from compress.passes.quantize import Quantize
from compress.quantization.fake_quantize import fake_quantized
from export.quant_plan import QuantPlan
from tests.tiny_engine import SIDE, sampled

CONTEXT = PassContext(("a red circle", "large blue square"), seed=0, height=SIDE, width=SIDE)


@pytest.fixture(scope="module", params=["unet", "sd3"])
def quantized(request: pytest.FixtureRequest, tiny_folder: Callable[[str], Path]) -> tuple[LatentDiffusion, QuantPlan]:
    model = sampled(load(tiny_folder(request.param)), 3)
    step = Quantize("none", parts={"denoiser": "int4-w4a4"})
    other = model.clone()
    step.apply(other, step.plan(other, []), CONTEXT)
    return model, other.quant_plans["denoiser"]


def error(model: LatentDiffusion, plan: QuantPlan, records: Sequence[Record]) -> float:
    """The mean squared error of the quantized denoiser's outputs."""
    denoiser = fake_quantized(model.denoiser, plan)
    part = model.family.segments(denoiser, None).segments[0].module
    found = []
    with torch.no_grad():
        for record in records:
            output = part(**{name: torch.from_numpy(array) for name, array in record.inputs.items()})[0].numpy()
            found.append(np.square(output - record.output).mean())
    return float(np.mean(found))


def test_it_comes_nearer_and_leaves_the_model_alone(quantized: tuple[LatentDiffusion, QuantPlan]) -> None:
    model, plan = quantized
    before = model.hash()
    records = recorded(model, CONTEXT)
    assert model.step_plan is not None
    assert len(records) == model.step_plan.network_calls
    selected = list(plan.layers)[::2]
    found = finetuned(model, plan, records, selected, 60, CONTEXT)
    assert model.hash() == before
    assert error(model, found, records) < error(model, plan, records)
    changed = {name for name, layer in found.layers.items() if layer.weight.numbers is not None}
    assert changed == set(selected)
    for name, layer in found.layers.items():
        assert np.array_equal(layer.weight.scale, plan.layers[name].weight.scale)
    found.validate()


def test_it_gives_the_same_again(quantized: tuple[LatentDiffusion, QuantPlan]) -> None:
    model, plan = quantized
    records = recorded(model, CONTEXT)
    first, second = (finetuned(model, plan, records, list(plan.layers), 3, CONTEXT) for _ in range(2))
    assert first == second


def test_an_error_that_is_not_finite_stops_it(quantized: tuple[LatentDiffusion, QuantPlan]) -> None:
    model, plan = quantized
    records = [replace(record, output=np.full_like(record.output, np.nan)) for record in recorded(model, CONTEXT)]
    with pytest.raises(PassError, match="is not finite, so it cannot be finetuned"):
        finetuned(model, plan, records, [], 1, CONTEXT)
