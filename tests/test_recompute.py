"""Gradient checkpointing: the same gradients from less memory, measured, for every family of denoisers."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from compress.model.latent_diffusion import LatentDiffusion, load
from compress.passes.base import PassContext
from compress.passes.distill import Distill
from compress.training.cost import TRIED, sample_cost
from compress.training.recompute import Recomputed
from tests import tiny_engine as toy

FAMILIES = ["unet", "sd3", "dit", "pixart", "flux"]
Call = Callable[..., tuple[Tensor, ...]]


def opened(folder: Path) -> tuple[LatentDiffusion, Call, dict[str, Tensor]]:
    """The model, its denoiser as one segment, and inputs of it."""
    torch.manual_seed(0)
    found = load(folder)
    whole = found.family.segments(found.denoiser, None).segments[0].module
    inputs = found.family.example_inputs(found.denoiser, batch=4, height=16, width=16, prompt_tokens=8)
    return found, whole, inputs


def gradients(call: Call, inputs: Mapping[str, Tensor], parameters: list[Tensor]) -> list[Tensor | None]:
    with torch.enable_grad():
        return list(torch.autograd.grad(call(**inputs)[0].square().mean(), parameters, allow_unused=True))


def peak(run: Callable[[], object]) -> int:
    """Bytes that were alive at once, of those that a call allocates on the CPU."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as seen:
        run()
    assert seen.profiler is not None
    results = seen.profiler.kineto_results
    assert results is not None
    events = sorted((e for e in results.events() if e.name() == "[memory]"), key=lambda event: event.start_ns())
    most = now = 0
    for event in events:
        now += event.nbytes()
        most = max(most, now)
    return most


@pytest.mark.parametrize("name", FAMILIES)
def test_gradients_are_the_same(name: str, tiny_folder: Callable[[str], Path]) -> None:
    found, whole, inputs = opened(tiny_folder(name))
    again = Recomputed(found.family, found.denoiser)
    with torch.no_grad():
        assert torch.allclose(again(**inputs)[0], whole(**inputs)[0], rtol=0, atol=1e-5)
    found.denoiser.requires_grad_(True)
    parameters = list(found.denoiser.parameters())
    pairs = zip(gradients(again, inputs, parameters), gradients(whole, inputs, parameters), strict=True)
    seen = 0
    for one, other in pairs:
        assert (one is None) == (other is None)
        if one is not None and other is not None:
            assert torch.allclose(one, other, rtol=1e-3, atol=1e-6)
            seen += 1
    assert seen > len(parameters) / 2


@pytest.mark.parametrize("name", ["unet", "sd3"])
def test_less_memory_is_needed_and_the_estimate_knows(name: str, tiny_folder: Callable[[str], Path]) -> None:
    found, whole, inputs = opened(tiny_folder(name))
    found.denoiser.requires_grad_(True)
    parameters = list(found.denoiser.parameters())
    again = Recomputed(found.family, found.denoiser)
    full, less = (peak(lambda call=call: gradients(call, inputs, parameters)) for call in (whole, again))  # type: ignore[misc]
    assert less < 0.5 * full
    for call, bytes_ in ((whole, full), (again, less)):
        cost = sample_cost(found.denoiser, call, inputs)
        assert TRIED * cost.kept < bytes_ < 1.2 * (TRIED * cost.kept + cost.weights)


def test_a_student_learns_the_same(tiny_folder: Callable[[str], Path]) -> None:
    found = toy.sampled(load(tiny_folder("unet")), 8)
    context = PassContext(["a red circle", "a blue square"], 0, toy.SIDE, toy.SIDE)
    made = []
    for recompute in (False, True):
        step = Distill(objective="segment", steps=2, updates=6, samples=4, batch=4, recompute=recompute)
        changed = replace(found.clone())
        step.apply(changed, step.plan(changed, []), context)
        made.append(changed.denoiser.state_dict())
    for name, weight in made[0].items():
        assert torch.allclose(weight, made[1][name], rtol=0, atol=1e-5)
