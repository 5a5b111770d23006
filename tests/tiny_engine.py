"""A toy engine with all that engines can have: cut, cached, quantized, two targets; and the model it was built from."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from compress.engine.export_engine import export_engine
from compress.model.latent_diffusion import LatentDiffusion, load
from compress.model.tokenizers import portable
from compress.sampler import compile_sampler
from compress.schedulers import completed
from compress.store import Store
from export.manifest import Manifest
from export.quant_plan import Affine, LayerQuant, QuantPlan, WeightGrid
from export.runtime import LatentSpec, Runtime
from export.step_plan import Segment
from export.target import built_anywhere

SIDE = 16  # of the pictures
SHAPES = {"batch": (1, 1, 4), "height": (SIDE, SIDE, SIDE), "width": (SIDE, SIDE, SIDE)}
STEPS = 4


def sampled(model: LatentDiffusion, steps: int = STEPS, scheduler: str | None = None) -> LatentDiffusion:
    """The model with the step plan of a scheduler, its own unless another is named, guided."""
    segments, paths, slots = model.family.segments(model.denoiser, model.layout)
    name = scheduler or model.scheduler_config["_class_name"]
    told = model.family.sampler_options(model.denoiser, SIDE // 2, SIDE // 2)
    model.step_plan = compile_sampler(
        name,
        model.scheduler_config,
        steps,
        3.0,
        segments={segment.name: Segment(segment.inputs, segment.outputs) for segment in segments},
        paths=paths,
        slots=slots,
        options=completed(name, model.scheduler_config, {}, told),
    )
    return model


def cached(model: LatentDiffusion, cut: int) -> LatentDiffusion:
    """Every other network call runs the shallow path on what the call before it kept."""
    model.layout = model.family.cut_layout(model.denoiser, cut)
    plan = sampled(model).step_plan
    assert plan is not None
    rows = [
        replace(step, path="shallow", read={"deep": (1.0,)}) if row % 2 else replace(step, write=("deep",))
        for row, step in enumerate(plan.steps)
    ]
    model.step_plan = replace(plan, steps=tuple(rows))
    return model


def quantized(model: LatentDiffusion, part: str, layers: Sequence[str]) -> LatentDiffusion:
    """The named layers of a part compute in int8, on the ranges of its example inputs."""
    module: Any = model.parts()[part]
    component = module.component
    ranges: dict[str, list[float]] = {}
    hooks = []
    for name in layers:

        def record(_: nn.Module, given: Any, result: Any, name: str = name) -> None:
            ranges[name] = [float(f(x)) for x in (given[0], result) for f in (torch.min, torch.max)]

        hooks.append(component.get_submodule(name).register_forward_hook(record))
    with torch.no_grad():
        if part == "denoiser":
            module(**model.family.example_inputs(component, 2, SIDE // 2, SIDE // 2, 12))
        else:
            module(**module.example_inputs(2, SIDE // 2, SIDE // 2, 12))
    for hook in hooks:
        hook.remove()
    plan = {}
    for name in layers:
        weight = component.get_submodule(name).weight.detach().numpy()
        scale = np.abs(weight).reshape(len(weight), -1).max(axis=1) / 127
        conv = weight.ndim == 4
        low, high, out_low, out_high = ranges[name]
        output = Affine.of_range(out_low, out_high) if conv else None
        scales = np.maximum(scale, 1e-8)
        plan[name] = LayerQuant(
            "conv" if conv else "linear",
            "int8-w8a8",
            WeightGrid.per_channel(scales),
            Affine.of_range(low, high),
            output,
        )
    model.quant_plans[part] = QuantPlan(plan)
    return model


def tiny_model(folder: Path) -> LatentDiffusion:
    """The toy UNet, cut at 1, cached, with its attention and some convolutions in int8."""
    model = cached(load(folder), cut=1)
    layers = [
        name
        for name, module in model.denoiser.named_modules()
        if (".attn" in name and isinstance(module, nn.Linear)) or name.endswith(("resnets.0.conv1", "resnets.0.conv2"))
    ]
    return quantized(model, "denoiser", layers)


def build(model: LatentDiffusion, folder: Path, store: Store | None = None) -> Manifest:
    """An engine of the model for every target that is built on any machine, with golden latents."""
    return export_engine(
        model,
        built_anywhere(),
        SHAPES,
        folder,
        files={"recipe.yaml": "schema_version: 1\n"},
        golden_prompts=["a red circle"],
        store=store,
    )


def torch_runtime(model: LatentDiffusion) -> Runtime:
    """The same loop over PyTorch functions, quantized layers simulated."""
    assert model.step_plan is not None
    tokenizers = {name: portable(tokenizer) for name, tokenizer in model.tokenizers.items()}
    return Runtime(model.step_plan, model.functions(), model.conditioning, LatentSpec(**model.latent), tokenizers)
