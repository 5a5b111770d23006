"""UNets that take what a ControlNet adds: exact at every cut and in encoder propagation, and given by the caller."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import ControlNetModel, DDIMScheduler
from torch import Tensor

from compress import compiler
from compress.errors import RefusedError
from compress.families import CONTROLLED_UNET, segments
from compress.model.latent_diffusion import LatentDiffusion, load
from compress.passes.base import PassContext
from compress.passes.cache import Cache
from compress.passes.quantize import Quantize
from compress.recipe.schema import Recipe
from export.noise import INITIAL, noise
from export.runtime import RuntimeInputError
from tests import tiny
from tests.test_families import THREE, TWO, UNETS, keeping, run
from tests.tiny_engine import sampled

MAKERS = {"unet": tiny.unet, "sdxl": tiny.sdxl}
PROMPTS = ["a red circle", "a small blue ring"]


def make(name: str) -> Any:
    torch.manual_seed(0)
    denoiser = MAKERS[name]()
    tiny.shake(denoiser)
    return denoiser


def theirs(denoiser: Any, inputs: dict[str, Tensor]) -> Tensor:
    """`UNet2DConditionModel.forward` with everything it is given."""
    residuals = [inputs[f"residual_{i}"] for i in range(len(inputs)) if f"residual_{i}" in inputs]
    with torch.inference_mode():
        return denoiser(
            inputs["sample"],
            inputs["timestep"],
            encoder_hidden_states=inputs["encoder_hidden_states"],
            added_cond_kwargs={key: inputs[key] for key in ("text_embeds", "time_ids") if key in inputs},
            down_block_additional_residuals=residuals,
            mid_block_additional_residual=inputs["residual_mid"],
        ).sample


@pytest.mark.parametrize("name", UNETS)
def test_residuals_are_those_a_controlnet_gives(name: str) -> None:
    """As many, of the same shapes, in the same order (a ControlNet pools text with 64 heads, so the toy does not)."""
    denoiser = make(name) if name == "sdxl" else tiny.unet(addition_embed_type=None)
    inputs = CONTROLLED_UNET.example_inputs(denoiser, 2, 8, 12, 5)
    assert tuple(inputs) == CONTROLLED_UNET.inputs(denoiser)
    added = {key: inputs[key] for key in ("text_embeds", "time_ids") if key in inputs}
    net = ControlNetModel.from_unet(denoiser, conditioning_channels=3)
    down, mid = net(
        inputs["sample"],
        inputs["timestep"],
        inputs["encoder_hidden_states"],
        controlnet_cond=torch.zeros(2, 3, 64, 96),
        added_cond_kwargs=added,
        return_dict=False,
    )
    assert [tuple(tensor.shape) for tensor in (*down, mid)] == [
        tuple(inputs[name].shape) for name in CONTROLLED_UNET.residuals(denoiser)
    ]
    assert list(CONTROLLED_UNET.residuals(denoiser)) == [
        "residual_0",
        "residual_1",
        "residual_2",
        "residual_3",
        "residual_mid",
    ]


@pytest.mark.parametrize("share", [THREE, TWO])
@pytest.mark.parametrize("name", UNETS)
def test_every_cut_is_exact(name: str, share: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """Bit for bit, full and shallow; the shallow path takes the residuals of the skips it computes, and no others."""
    monkeypatch.setattr(segments, "PAIR_SHARE", share)
    denoiser = make(name)
    inputs = CONTROLLED_UNET.example_inputs(denoiser, 2, tiny.SIDE, 12, 5)
    original = theirs(denoiser, inputs)
    bare = theirs(denoiser, {k: torch.zeros_like(v) if k.startswith("residual") else v for k, v in inputs.items()})
    assert (original - bare).abs().max() > 1e-2
    (whole,) = CONTROLLED_UNET.segments(denoiser, None).segments
    assert torch.equal(run([whole], ("denoiser",), inputs)["out_sample"], original)
    for cut in range(4):
        layout = CONTROLLED_UNET.cut_layout(denoiser, cut)
        found, paths, slots = CONTROLLED_UNET.segments(denoiser, layout)
        assert len(found) == (2 if share == TWO else 3)
        full = run(found, paths["full"], inputs)
        assert torch.equal(full["out_sample"], original)
        kept = full[slots["deep"].tensor]
        taken = {key for segment in found if segment.name in paths["shallow"] for key in segment.inputs}
        assert {key for key in taken if key.startswith("residual")} == {f"residual_{i}" for i in range(cut + 1)}
        fresh = {key: inputs[key] for key in taken if key in inputs}
        shallow = run(found, paths["shallow"], fresh, slots["deep"], kept)
        assert torch.equal(shallow["out_sample"], original)


@pytest.mark.parametrize("share", [THREE, TWO])
@pytest.mark.parametrize("name", UNETS)
def test_encoder_propagation_keeps_the_control(name: str, share: float, monkeypatch: pytest.MonkeyPatch) -> None:
    denoiser = make(name)
    layout = CONTROLLED_UNET.encoder_layout(denoiser)
    keeping(CONTROLLED_UNET, denoiser, layout, share, monkeypatch)
    found, paths, _ = CONTROLLED_UNET.segments(denoiser, layout)
    taken = {key for segment in found if segment.name in paths["decoder"] for key in segment.inputs}
    assert not [key for key in taken if key.startswith(("residual", "sample"))]


@pytest.fixture(params=["unet", "sdxl"])
def controlled(request: pytest.FixtureRequest, tiny_folder: Callable[[str], Path], tmp_path: Path) -> Path:
    """A pipeline with a ControlNet, whose own weights are not read."""
    folder = shutil.copytree(tiny_folder(request.param), tmp_path / "controlled")
    index = json.loads((folder / "model_index.json").read_text())
    name = index["_class_name"].replace("Pipeline", "ControlNetPipeline")
    index |= {"_class_name": name, "controlnet": ["diffusers", "ControlNetModel"]}
    (folder / "model_index.json").write_text(json.dumps(index))
    return folder


def test_the_folder_of_a_pipeline_with_a_controlnet(controlled: Path, tmp_path: Path) -> None:
    model = load(controlled)
    assert model.family is CONTROLLED_UNET
    assert "controlnet" in model.provenance[0]["ignored"]
    widths = {"residual_0": [16, 2], "residual_1": [16, 2], "residual_2": [16, 4], "residual_3": [32, 4]}
    assert model.conditioning["residuals"] == widths | {"residual_mid": [32, 4]}
    model.save(tmp_path / "saved")
    again = load(tmp_path / "saved")
    assert (again.hash(), again.family) == (model.hash(), CONTROLLED_UNET)


def loop(model: LatentDiffusion, cond: dict[str, np.ndarray], uncond: dict[str, np.ndarray]) -> np.ndarray:
    """Guided sampling with diffusers' UNet and scheduler."""
    scheduler = DDIMScheduler.from_config(model.scheduler_config, clip_sample=False)
    scheduler.set_timesteps(4)
    latents = torch.from_numpy(noise([5, 6], INITIAL, (4, 12, 8)))
    both = {key: torch.from_numpy(np.concatenate([uncond[key], value])) for key, value in cond.items()}
    for t in scheduler.timesteps:
        inputs = both | {"sample": torch.cat([latents] * 2), "timestep": t.expand(4)}
        without, with_prompt = theirs(model.denoiser, inputs).chunk(2)
        latents = scheduler.step(without + 3.0 * (with_prompt - without), t, latents).prev_sample
    return latents.numpy()


def test_the_caller_gives_residuals_to_the_runtime(controlled: Path) -> None:
    model = load(controlled)
    model.scheduler_config = dict(DDIMScheduler(clip_sample=False, steps_offset=1).config) | {
        "_class_name": "DDIMScheduler"
    }
    runtime = sampled(model, steps=4).runtime()
    example = model.family.example_inputs(model.denoiser, 2, 12, 8, 12)
    residuals = {key: value.numpy() for key, value in example.items() if key.startswith("residual")}
    size = {"time_ids": np.tile(np.float32([24, 16, 0, 0, 24, 16]), (2, 1))} if "time_ids" in example else {}
    cond = runtime.encode(PROMPTS)
    uncond = runtime.encode([None] * 2)
    expected = loop(model, cond | size | residuals, uncond | size | residuals)
    got = runtime.sample(cond | residuals, [5, 6], 24, 16)
    assert np.abs(got - expected).max() <= 1e-5 * np.abs(expected).max()
    zero = {key: np.zeros_like(value) for key, value in residuals.items()}
    given = runtime.sample(cond | residuals, [5, 6], 24, 16, negative_prompts=uncond | zero)
    expected = loop(model, cond | size | residuals, uncond | size | zero)
    assert np.abs(given - expected).max() <= 1e-5 * np.abs(expected).max()
    np.testing.assert_array_equal(runtime.sample(PROMPTS, [5, 6], 24, 16), runtime.sample(cond | zero, [5, 6], 24, 16))
    with pytest.raises(RuntimeInputError, match="lacks 'residual_1'"):
        runtime.sample({key: value for key, value in (cond | residuals).items() if key != "residual_1"}, [5, 6], 24, 16)


def test_passes_take_it_without_control(controlled: Path) -> None:
    """Quantized on uncontrolled pictures, then cached at a cut."""
    model = sampled(load(controlled), steps=4)
    context = PassContext(PROMPTS, 0, 16, 16)
    for step in (Quantize("int8-w8a8", bias_correction=False), Cache(cut=1, interval=2)):
        edits = step.plan(model, [])
        step.apply(model, edits, context)
        step.check(model, edits)
    assert np.isfinite(model.runtime().sample(PROMPTS, [5, 6], 16, 16)).all()


def test_measuring_without_a_control_picture_is_refused(controlled: Path, tmp_path: Path) -> None:
    text = (
        f"schema_version: 1\nmodel: {controlled}\nsampler: {{scheduler: EulerDiscreteScheduler, steps: 2}}\n"
        f"targets: [onnxruntime-cpu]\nshapes: {{height: 16, width: 16}}\nout: {tmp_path / 'out'}\n"
    )
    assert compiler.run(Recipe.parse(text), dry_run=True, work_dir=tmp_path).edits == []
    (tmp_path / "held.txt").write_text("a ring\na circle\n")
    text += f"evaluate: {{samples: 2, prompts: {tmp_path / 'held.txt'}}}\n"
    with pytest.raises(
        RefusedError, match=r"evaluate: a StableDiffusion.*ControlNetPipeline follows a control picture"
    ):
        compiler.run(Recipe.parse(text), dry_run=True, work_dir=tmp_path)
