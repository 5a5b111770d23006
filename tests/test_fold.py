"""What depends on no latent is taken out of the loop: exact on every family, cut and uncut, guided, started late."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from compress.engine.export_engine import export_engine, unfoldable
from compress.engine.jobs import jobs_of
from compress.measure.beforehand import Beforehand
from compress.measure.localise import Shadow
from compress.model.latent_diffusion import LatentDiffusion, load
from compress.store import Store
from export.engine import Engine, relative_error
from export.errors import EngineError
from export.step_plan import GuidanceMode, StepPlan, StepPlanError
from export.target import target
from tests import tiny_engine as toy

FAMILIES = ["unet", "sdxl", "dit", "pixart", "sd3", "flux"]
TARGETS = ["onnxruntime-cpu", "openvino-cpu"]
TOLERANCE = 1e-5
EXACT_DB = 90.0


@pytest.fixture
def engines(
    engine_store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Callable[[LatentDiffusion], tuple[Path, Path]]:
    """Model -> engines of its denoiser alone, as it is and folded."""
    whole = jobs_of
    monkeypatch.setattr(
        "compress.engine.export_engine.jobs_of",
        lambda model, shapes: (job for job in whole(model, shapes) if job.part == "denoiser"),
    )

    def build(model: LatentDiffusion) -> tuple[Path, Path]:
        folders = tmp_path / "plain", tmp_path / "folded"
        for fold, folder in enumerate(folders):
            rows = [target(name) for name in TARGETS]
            export_engine(model, rows, toy.SHAPES, folder, fold=bool(fold), store=engine_store)
        return folders

    return build


def prompts(model: LatentDiffusion) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
    """What two prompts and two negative ones become."""
    classes = model.family.name == "dit"
    texts = (["1", "2"], ["0", "1"]) if classes else (["a red circle", "the ring"], ["blue", "a small ring"])
    given, negative = map(model.runtime().encode, texts)
    return given, negative


def both(folders: tuple[Path, Path], name: str) -> tuple[Engine, Engine]:
    plain, folded = (Engine.open(folder, name, threads=1) for folder in folders)
    return plain, folded


def weights(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("weights.bin"))


@pytest.mark.parametrize("family", FAMILIES)
def test_a_folded_engine_computes_the_same(
    family: str, tiny_folder: Callable[[str], Path], engines: Callable[[LatentDiffusion], tuple[Path, Path]]
) -> None:
    model = toy.sampled(load(tiny_folder(family)))
    folders = engines(model)
    given, negative = prompts(model)
    for name in TARGETS:
        plain, folded = both(folders, name)
        expected = plain.sample(given, [1, 2], negative_prompts=negative)
        found = folded.sample(given, [1, 2], negative_prompts=negative)
        assert relative_error(found, expected) <= TOLERANCE
        t = plain.plan.steps[1].t
        outputs = [engine.denoise(expected, t, given) for engine in (plain, folded)]
        assert relative_error(outputs[1], outputs[0]) <= TOLERANCE
        with pytest.raises(EngineError, match=r"t must be a timestep of the plan .* `fold: false`"):
            folded.denoise(expected, t + 0.5, given)
        segments = [folded.plan.segments[part] for path in folded.plan.paths.values() for part in path]
        loop = {tensor for segment in segments for tensor in segment.inputs}
        assert not loop.intersection(["timestep", "pooled_projections", "text_embeds"])
    assert weights(folders[1]) < weights(folders[0])
    assert "tables of 4 rows" in folded.manifest.provenance["folded"]


@pytest.mark.parametrize("name", TARGETS)
def test_starts_guidance_and_pictures_to_keep(
    name: str, tiny_folder: Callable[[str], Path], engines: Callable[[LatentDiffusion], tuple[Path, Path]]
) -> None:
    """Rows without guidance, halves one after the other, a late start, a mask, a sample alone."""
    model = toy.sampled(load(tiny_folder("unet")))
    assert model.step_plan is not None
    modes: tuple[GuidanceMode, ...] = ("cfg", "cfg_sequential", "none", "cfg")
    steps = tuple(replace(s, guidance=mode) for s, mode in zip(model.step_plan.steps, modes, strict=True))
    model.step_plan = replace(model.step_plan, steps=steps)
    plain, folded = both(engines(model), name)
    given, negative = prompts(model)
    latents = np.random.default_rng(0).standard_normal((2, 4, 8, 8)).astype(np.float32)
    mask = np.zeros((2, 1, 8, 8), np.float32)
    mask[..., 4:] = 1.0
    options: list[dict[str, Any]] = [
        {},
        {"image_latents": latents, "start_step": 2},
        {"image_latents": latents, "mask": mask},
    ]
    for option in options:
        results = [one.sample(given, [1, 2], negative_prompts=negative, **option) for one in (plain, folded)]
        assert relative_error(results[1], results[0]) <= TOLERANCE, option
    second = [{key: array[1:] for key, array in tensors.items()} for tensors in (given, negative)]
    alone = folded.sample(second[0], [2], negative_prompts=second[1])
    whole = plain.sample(given, [1, 2], negative_prompts=negative)
    assert relative_error(alone, whole[1:]) <= TOLERANCE


@pytest.mark.parametrize("family", FAMILIES)
def test_a_cut_denoiser_is_folded_too(
    family: str, tiny_folder: Callable[[str], Path], engines: Callable[[LatentDiffusion], tuple[Path, Path]]
) -> None:
    """The embedding of one segment is read by another, whose own projections of it are folded as well."""
    model = toy.cached(load(tiny_folder(family)), cut=1)
    folders = engines(model)
    given, negative = prompts(model)
    for name in TARGETS:
        plain, folded = both(folders, name)
        results = [one.sample(given, [1, 2], negative_prompts=negative) for one in (plain, folded)]
        assert relative_error(results[1], results[0]) <= TOLERANCE
        assert folded.runtime.fallbacks == 0
    assert weights(folders[1]) < weights(folders[0])
    shadow = Shadow(plain.runtime.functions, Beforehand(folded.plan, folded.runtime.functions).functions())
    noise = np.random.default_rng(0).standard_normal(results[0].shape).astype(np.float32)
    plain.runtime.altered(functions=shadow.functions).sample(given, noise=noise, negative_prompts=negative)
    assert {layer.name.partition(":")[0] for layer in shadow.outputs} == set(plain.plan.segments)
    assert shadow.outputs[0].local_db > EXACT_DB


def test_spans_of_calls(
    tiny_folder: Callable[[str], Path], engines: Callable[[LatentDiffusion], tuple[Path, Path]]
) -> None:
    """Rows whose calls are one batch take their rows of what was computed for all."""
    model = load(tiny_folder("unet"))
    model.layout = model.family.encoder_layout(model.denoiser)
    plan = toy.sampled(model).step_plan
    assert plan is not None
    read = dict.fromkeys(plan.slots, (1.0,))
    first, *others = plan.steps
    late = [replace(step, path="decoder", read=read, span=1 if at else 3) for at, step in enumerate(others)]
    model.step_plan = replace(plan, steps=(replace(first, write=tuple(plan.slots)), *late))
    plain, folded = both(engines(model), "onnxruntime-cpu")
    given, negative = prompts(model)
    results = [one.sample(given, [1, 2], negative_prompts=negative) for one in (plain, folded)]
    assert relative_error(results[1], results[0]) <= TOLERANCE


def test_a_quantized_denoiser_is_folded(
    tiny_folder: Callable[[str], Path], engines: Callable[[LatentDiffusion], tuple[Path, Path]]
) -> None:
    """A value that rounds the other way changes all that follow: as much as noise changed by a millionth does."""
    model = toy.tiny_model(tiny_folder("unet"))
    folders = engines(model)
    generator = np.random.default_rng(0)
    noise = generator.standard_normal((2, 4, 8, 8)).astype(np.float32)
    shaken = [(noise * (1 + 1e-6 * generator.standard_normal(noise.shape))).astype(np.float32) for _ in range(4)]
    given, negative = prompts(model)
    for name in TARGETS:
        plain, folded = both(folders, name)
        expected = plain.sample(given, noise=noise, negative_prompts=negative)
        others = [plain.sample(given, noise=other, negative_prompts=negative) for other in shaken]
        sway = max(relative_error(other, expected) for other in others)
        found = folded.sample(given, noise=noise, negative_prompts=negative)
        assert relative_error(found, expected) <= max(2 * sway, TOLERANCE)
    assert weights(folders[1]) < weights(folders[0])


def test_targets_that_cannot_are_named() -> None:
    assert unfoldable([target("onnxruntime-cpu"), target("openvino-cpu")]) is None
    assert unfoldable([target("onnxruntime-cpu"), target("tensorrt-rtx")]) == (
        "tensorrt-rtx runs the segments of the denoiser as they are"
    )
    assert unfoldable([target("onnxruntime-cpu"), target("web")]) is not None


def test_what_runs_before_the_loop_is_checked(
    tiny_folder: Callable[[str], Path], engines: Callable[[LatentDiffusion], tuple[Path, Path]]
) -> None:
    plan = Engine.open(engines(toy.sampled(load(tiny_folder("unet"))))[1], threads=1).plan
    assert StepPlan.from_json(plan.to_json()) == plan
    assert plan.once == ("denoiser_prompt", "denoiser_calls")
    wrong = {
        "the unknown segment 'x'": replace(plan, once=("x",)),
        "no path may name it": replace(plan, once=("denoiser",)),
        "but takes": replace(plan, once=plan.once[::-1]),
    }
    for message, broken in wrong.items():
        with pytest.raises(StepPlanError, match=message):
            broken.validate()
