"""Mixed precision: sensitivities against injected errors, the knapsack against all choices, budgets kept or refused."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from compress.errors import RecipeError, RefusedError
from compress.measure.metrics import latent_peak, psnr_per_sample
from compress.mixed_precision import Budget, choose
from compress.model.latent_diffusion import LatentDiffusion, load
from compress.passes.base import Edit, PassContext
from compress.passes.quantize import LayerRule, Quantize
from compress.prospects import Option, Prospects, rank_correlation
from compress.quantization.allocation import allocate
from compress.sensitivity import sensitivities
from export.target import TARGETS
from tests.tiny_engine import SIDE, sampled

PROMPTS = ("a red circle", "large blue square", "a small green triangle", "yellow star")
CONTEXT = PassContext(PROMPTS, seed=0, height=SIDE, width=SIDE)
TARGET = [TARGETS["onnxruntime-cpu"]]


@pytest.fixture(scope="module")
def models(tiny_folder: Callable[[str], Path]) -> Callable[..., LatentDiffusion]:
    return lambda family, scheduler=None: sampled(load(tiny_folder(family)), 4, scheduler)


def budgeted(scheme: str = "int8-w8a8", **options: Any) -> Quantize:
    return Quantize("none", parts={"denoiser": scheme}, budget=Budget(**options.pop("budget")), **options)


def done(model: LatentDiffusion, step: Quantize) -> tuple[LatentDiffusion, list[Edit]]:
    made = model.clone()
    edits = step.plan(made, TARGET)
    step.apply(made, edits, replace(CONTEXT, targets=TARGET))
    step.check(made, edits)
    return made, edits


def size_ratio(model: LatentDiffusion, edits: list[Edit]) -> float:
    """Of the denoiser's weights as they are now; biases and norms are left out on both sides."""
    from compress.quantization.scheme import SCHEMES

    after = before = 0
    for name, layer in model.quant_plans["denoiser"].layers.items():
        weight = model.denoiser.get_submodule(name).weight
        before += 4 * weight.numel()
        after += SCHEMES[layer.scheme].weight.bytes_of(len(weight), weight[0].numel())
    return after / before


def test_the_knapsack_finds_what_trying_everything_finds() -> None:
    random = np.random.default_rng(0)
    for _ in range(40):
        sizes = random.integers(1, 50, (5, 3)).tolist()
        errors = random.random((5, 3)).tolist()
        budget = int(random.integers(5, 200))
        fitting = [
            sum(errors[layer][at] for layer, at in enumerate(choice))
            for choice in itertools.product(range(3), repeat=5)
            if sum(sizes[layer][at] for layer, at in enumerate(choice)) <= budget
        ]
        found = allocate(sizes, errors, budget)
        if not fitting:
            assert found is None
            continue
        assert found is not None
        assert sum(sizes[layer][at] for layer, at in enumerate(found)) <= budget
        assert sum(errors[layer][at] for layer, at in enumerate(found)) == pytest.approx(min(fitting))


def test_large_sizes_are_kept_within_the_budget() -> None:
    random = np.random.default_rng(1)
    sizes = (random.integers(1, 10**8, (300, 1)) * np.array([1, 2, 3])).tolist()
    errors = (random.random((300, 1)) * np.array([3.0, 2.0, 1.0])).tolist()
    budget = int(1.5 * sum(min(own) for own in sizes))
    found = allocate(sizes, errors, budget)
    assert found is not None
    used = sum(sizes[layer][at] for layer, at in enumerate(found))
    assert 0.98 * budget < used <= budget


@pytest.mark.parametrize(("family", "scheduler"), [("unet", None), ("unet", "DDIMScheduler"), ("sd3", None)])
def test_sensitivities_predict_what_injected_errors_do(
    family: str, scheduler: str | None, models: Callable[..., LatentDiffusion]
) -> None:
    model = models(family, scheduler)
    modulation = model.family.modulation(model.denoiser)
    plain = [name for name, layer in model.denoiser.named_modules() if isinstance(layer, torch.nn.Linear)]
    layers = [modulation[0], next(name for name in plain if name not in modulation), plain[-1]]
    # One probe of a run of a few numbers is a rough estimate, so several are averaged.
    several = [sensitivities(model, layers, replace(CONTEXT, seed=seed)) for seed in range(0, 96, 4)]
    for name in layers:
        found = torch.stack([one[name] for one in several]).mean(0)
        assert found.shape == (4, len(model.denoiser.get_submodule(name).weight))
        for call in (0, 3):
            injected = np.mean([change(model, name, call, seed) for seed in range(24)])
            assert float(found[call].sum()) == pytest.approx(injected, rel=0.5), (name, call)


def change(model: LatentDiffusion, name: str, call: int, seed: int) -> float:
    """The squared change of the final latents by unit errors of a layer at one call, from very small ones."""
    size, calls = 1e-3, [0]
    generator = torch.Generator().manual_seed(seed)

    def hook(_: Any, __: Any, output: torch.Tensor) -> torch.Tensor:
        calls[0] += 1
        return output + size * torch.randn(output.shape, generator=generator) if calls[0] == call + 1 else output

    prompts, seeds = list(PROMPTS), [4 * seed + at for at in range(4)]
    exact = model.runtime().sample(prompts, seeds, SIDE, SIDE)
    handle = model.denoiser.get_submodule(name).register_forward_hook(hook)
    try:
        made = model.runtime().sample(prompts, seeds, SIDE, SIDE)
    finally:
        handle.remove()
    return float(np.square(made.astype(np.float64) - exact).sum() / size**2 / len(prompts))


@pytest.mark.parametrize("family", ["unet", "sd3"])
def test_a_budget_of_bytes_is_kept_and_used(family: str, models: Callable[..., LatentDiffusion]) -> None:
    model = models(family)
    whole, _ = done(model, Quantize("none", parts={"denoiser": "int8-w8a8"}))
    made, edits = done(model, budgeted(budget={"size_ratio": 0.23}))
    assert sum(edit.bytes_before for edit in edits if edit.module.startswith("denoiser")) > 0
    schemes = set(made.quant_plans["denoiser"].schemes.values())
    assert len(schemes & {"int6-w6a8", "int5-w5a8", "int4-w4a8", "int3-w3a8"}) > 0
    assert schemes <= {row for row, how in TARGETS["onnxruntime-cpu"].formats.items() if how != "simulated"}
    assert size_ratio(made, edits) < size_ratio(whole, edits)
    assert any("formats" in entry for entry in made.provenance)
    chosen = {name: layer.scheme for name, layer in made.quant_plans["denoiser"].layers.items()}
    again, _ = done(model, budgeted(budget={"size_ratio": 0.23}))
    assert again.quant_plans["denoiser"].to_json() == made.quant_plans["denoiser"].to_json()
    kept = next(iter(chosen))
    ruled, _ = done(
        model, budgeted(budget={"size_ratio": 0.23}, layers=(LayerRule(match=f"denoiser.{kept}", scheme="fp8-w8a8"),))
    )
    assert ruled.quant_plans["denoiser"].layers[kept].scheme == "fp8-w8a8"


def test_a_budget_of_quality_is_measured(models: Callable[..., LatentDiffusion]) -> None:
    model = models("unet")

    def measured(made: LatentDiffusion) -> float:
        exact, found = (one.runtime().sample(list(PROMPTS), [0, 1, 2, 3], SIDE, SIDE) for one in (model, made))
        return float(psnr_per_sample(exact, found, latent_peak(exact)).mean())

    whole, edits = done(model, Quantize("none", parts={"denoiser": "int8-w8a8"}))
    most = measured(whole)
    made, edits = done(model, budgeted(budget={"latent_psnr_db": most - 6.0}))
    assert most - 6.0 <= measured(made) < most
    assert size_ratio(made, edits) < size_ratio(whole, edits)
    with pytest.raises(RefusedError, match="the largest formats reach"):
        done(model, budgeted(budget={"latent_psnr_db": most + 20.0}))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"budget": {"size_ratio": 0.05}}, "the fewest bits of every layer come to"),
        ({"budget": {"size_ratio": 0.2}, "scheme": "int3-w3a8", "modulation": "none"}, "no layer of the denoiser has"),
    ],
)
def test_what_no_format_can_do_is_refused_before_calibration(
    options: Mapping[str, Any], message: str, models: Callable[..., LatentDiffusion]
) -> None:
    with pytest.raises(RefusedError, match=message):
        budgeted(**options).plan(models("unet"), TARGET)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"budget": Budget(size_ratio=0.2, latent_psnr_db=30.0)}, "budget: give size_ratio or latent_psnr_db"),
        ({"budget": Budget()}, "budget: give size_ratio or latent_psnr_db"),
        ({"formats": ("int4-w4a8",)}, "formats: are for a budget"),
        ({"budget": Budget(size_ratio=0.2), "formats": ("int4-w4a9",)}, "formats.0: 'int4-w4a9' is not a scheme"),
    ],
)
def test_a_wrong_budget_names_its_field(options: dict[str, Any], message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        Quantize("int8-w8a8", **options)


def test_a_uniform_format_that_measures_better_is_kept() -> None:
    """Predictions prefer a mixture; measurements say that one format everywhere is better, or that it is not."""
    options = {
        "one": [Option("int8-w8a8", 80, 0.5), Option("fp8-w8a8", 80, 0.4)],
        "two": [Option("int8-w8a8", 80, 0.4), Option("fp8-w8a8", 80, 0.5), Option("int4-w4a8", 40, 90.0)],
    }
    found = Prospects(options, None)
    edits = [Edit("quantize", f"denoiser.{name}", "up to int8-w8a8", 320, 80, "") for name in options]
    assert found.within(160) == {"one": "fp8-w8a8", "two": "int8-w8a8"}
    for better, expected in (("int8-w8a8", {"int8-w8a8"}), ("mixture", {"fp8-w8a8", "int8-w8a8"})):
        measured: list[set[str]] = []

        def measure(tried: list[Edit], better: str = better, measured: list[set[str]] = measured) -> float:
            measured.append({edit.action for edit in tried})
            return 30.0 + (measured[-1] == ({better} if better != "mixture" else {"fp8-w8a8", "int8-w8a8"}))

        chosen = choose(edits, Budget(size_ratio=0.25), found, measure, lambda *_: None)
        assert {edit.action for edit in chosen} == expected
        assert len(measured) == 3
        assert sum(edit.bytes_after for edit in chosen) <= 160
    # A uniform format that is predicted to be much worse is not measured at all.
    assert found.rivals(120, 3.0) == []


def test_rank_correlation_of_known_orders() -> None:
    assert rank_correlation([1.0, 2.0, 3.0, 4.0], [10.0, 20.0, 30.0, 70.0]) == pytest.approx(1.0)
    assert rank_correlation([1.0, 2.0, 3.0, 4.0], [9.0, 8.0, 7.0, 1.0]) == pytest.approx(-1.0)
    assert rank_correlation([1.0, 2.0, 3.0, 4.0], [1.0, 3.0, 2.0, 4.0]) == pytest.approx(0.8)
