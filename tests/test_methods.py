"""Every caching method on every family: it builds a plan that runs, or says why it cannot."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from compress.caching.method import Forecast, cached_steps, spans
from compress.caching.methods import METHODS
from compress.errors import PassError, RefusedError
from compress.families import Layout
from compress.model.latent_diffusion import LatentDiffusion, load
from compress.passes.base import PassContext
from compress.passes.cache import Cache
from export.step_plan import Slot, Step, StepPlan
from tests import tiny
from tests.tiny_engine import sampled

STEPS = 12
REFUSED = {
    ("low-resolution-start", "dit"),
    ("low-resolution-start", "pixart"),
    ("encoder-propagation", "sd3"),
    ("encoder-propagation", "dit"),
    ("encoder-propagation", "pixart"),
    ("encoder-propagation", "flux"),
    ("t-gate", "sd3"),
    ("t-gate", "dit"),
    ("t-gate", "flux"),
    *(
        (name, unet)
        for unet in ("unet", "sdxl")
        for name in ("ddt", "delta-dit", "teacache", "first-block-cache", "dbcache", "magcache")
    ),
}
CALIBRATED = ("teacache", "first-block-cache", "dbcache", "magcache", "smoothcache")
LOOSE = {name: {"threshold": 3.0} for name in CALIBRATED}
"""Random weights change more from call to call than trained ones: the papers' thresholds would cache nothing."""


@pytest.fixture(scope="module")
def models(tiny_folder: Callable[[str], Path]) -> Callable[[str], LatentDiffusion]:
    """Family -> a sampled toy model; clone before changing it."""
    loaded: dict[str, LatentDiffusion] = {}

    def get(family: str) -> LatentDiffusion:
        if family not in loaded:
            loaded[family] = sampled(load(tiny_folder(family)), STEPS)
            if family == "sd3":
                loaded[family].conditioning["max_sequence_length"] = 1
        return loaded[family]

    return get


def prompts(family: str) -> list[str]:
    return ["1", "2"] if family == "dit" else ["a red circle", "a small blue square"]


def sample(model: LatentDiffusion) -> np.ndarray:
    return model.runtime().sample(prompts(model.family.name), [5, 6], 2 * tiny.SIDE, 2 * tiny.SIDE)


def cached(model: LatentDiffusion, method: str, **options: Any) -> LatentDiffusion:
    changed, step = model.clone(), Cache(method, **options)
    edits = step.plan(changed, [])
    assert changed.layout is None, "planning must not touch the model"
    step.apply(changed, edits, PassContext(prompts(model.family.name), 0, 2 * tiny.SIDE, 2 * tiny.SIDE))
    step.check(changed, edits)
    return changed


@pytest.mark.parametrize("family", ["unet", "sd3", "dit", "pixart", "flux", "sdxl"])
@pytest.mark.parametrize("method", METHODS)
def test_contract(models: Callable[[str], LatentDiffusion], method: str, family: str, tmp_path: Path) -> None:
    """The plan runs and differs; with all rows full it is the uncached model; it survives saving; or it refuses."""
    model = models(family)
    if (method, family) in REFUSED:
        with pytest.raises(RefusedError, match=r"^cache: a .* denoiser"):
            Cache(method).plan(model, [])
        return
    changed = cached(model, method, **LOOSE.get(method, {}))
    plan, original = changed.step_plan, sample(model)
    assert plan is not None
    assert np.abs(sample(changed) - original).max() > 1e-6
    full = [
        replace(old, path="full", write=new.write if new.path == "full" else ())
        for old, new in zip(model.step_plan.steps, plan.steps, strict=True)  # type: ignore[union-attr]
    ]
    uncached = replace(changed, step_plan=replace(plan, steps=tuple(full)))
    np.testing.assert_array_equal(sample(uncached), original)
    changed.save(tmp_path / "saved")
    again = load(tmp_path / "saved")
    assert (again.layout, again.step_plan) == (changed.layout, plan)
    assert StepPlan.from_json(plan.to_json()) == plan


def strip(model: LatentDiffusion) -> str:
    assert model.step_plan is not None
    return "".join(step.path[0] if step.read else "F" for step in model.step_plan.steps)


@pytest.mark.parametrize(
    ("method", "options", "expected"),
    [
        ("deepcache", {}, "FssFssFssFss"),
        ("encoder-propagation", {}, "FFFFddFdFddd"),
        ("fora", {}, "FccFccFccFcF"),
        ("taylorseer", {}, "FFFcFcccFccc"),
        ("t-gate", {}, "FFssFccccccc"),
    ],
)
def test_paper_schedules(
    models: Callable[[str], LatentDiffusion], method: str, options: dict[str, Any], expected: str
) -> None:
    assert strip(cached(models("unet"), method, **options)) == expected


def test_encoder_propagation_spans_and_injects(models: Callable[[str], LatentDiffusion]) -> None:
    """Decoders of a span run as one batch and change nothing by it; what is injected is 0.003 of the first latent."""
    model = models("unet")
    spanned, single = cached(model, "encoder-propagation"), cached(model, "encoder-propagation", span=False)
    assert spanned.step_plan is not None
    assert [step.span for step in spanned.step_plan.steps] == [1, 1, 1, 1, 2, 1, 1, 1, 1, 3, 1, 1]
    np.testing.assert_allclose(sample(spanned), sample(single), atol=1e-5)
    steps = spanned.step_plan.steps
    late = [row for row, step in enumerate(steps) if step.t < 500]
    assert [row for row, step in enumerate(steps) if step.initial] == late
    assert all(steps[row].initial == pytest.approx(0.003 * steps[row].x[0]) for row in late)
    assert not any(step.initial for step in cached(model, "encoder-propagation", inject=0.0).step_plan.steps)  # type: ignore[union-attr]


def test_t_gate_ends_guidance_and_averages(models: Callable[[str], LatentDiffusion]) -> None:
    """From the gate on one half runs, and reads cross-attention averaged over both; self-attention is not averaged."""
    model = cached(models("unet"), "t-gate", gate_share=0.5)
    assert model.step_plan is not None
    assert [step.guidance for step in model.step_plan.steps] == ["cfg"] * 6 + ["none"] * 6
    halves = {name: slot.halves for name, slot in model.step_plan.slots.items()}
    assert {halves[name] for name in halves if "attn2" in name} == {"mean"}
    assert {halves[name] for name in halves if "attn1" in name} == {"each"}


def test_text_stream_outputs_are_never_kept_where_attention_was_cached(
    models: Callable[[str], LatentDiffusion],
) -> None:
    """With joint attention from the cache the text stream is not computed, so its MLP outputs must not be written."""
    layout = cached(models("sd3"), "smoothcache", threshold=3.0).layout
    assert layout is not None
    for name, path in layout.paths.items():
        if "attention" in name:
            assert not [slot for slot in path.write if "context" in slot]


def test_calibrated_thresholds_decide(models: Callable[[str], LatentDiffusion]) -> None:
    """A higher threshold caches more; one that leaves nothing is refused with the way out."""
    counts = [
        sum(letter != "F" for letter in strip(cached(models("sd3"), "first-block-cache", threshold=threshold)))
        for threshold in (0.3, 0.36, 3.0)
    ]
    assert counts == sorted(counts)
    assert counts[0] < counts[-1]
    with pytest.raises(RefusedError, match="raise `threshold`"):
        cached(models("sd3"), "first-block-cache", threshold=0.0)


@pytest.mark.parametrize("family", ["sd3", "dit", "pixart", "flux"])
@pytest.mark.parametrize(("method", "options"), [("first-block-cache", {}), ("teacache", {"polynomial": [1.0, 0.0]})])
def test_dynamic_gates_decide_per_sample(
    models: Callable[[str], LatentDiffusion], family: str, method: str, options: dict[str, Any]
) -> None:
    """A sample is the same alone and beside others; at a middling threshold some rows are full and some cached."""
    texts, size = prompts(family), 2 * tiny.SIDE

    def gated(threshold: float) -> tuple[Any, list[Any], list[Any]]:
        model = cached(models(family), method, gate="dynamic", max_run=4, threshold=threshold, **options)
        values: list[Any] = []
        full: list[Any] = []

        def see(_row: int, _after: np.ndarray, tensors: dict[str, np.ndarray]) -> None:
            if "gate" in tensors:
                values.append(tensors["gate"])
                full.append(tensors["gate_full"])

        runtime = model.runtime()
        return runtime.sample(texts, [5, 6], size, size, on_step=see), values, full

    _, values, never = gated(0.0)
    assert np.array(never).all()
    threshold = float(np.median(values))
    together, _, full = gated(threshold)
    assert np.array(full).any(), "no gated row ran full"
    assert not np.array(full).all(), "no gated row was cached"
    model = cached(models(family), method, gate="dynamic", max_run=4, threshold=threshold, **options)
    alone = model.runtime().sample(texts[1:], [6], size, size)
    np.testing.assert_allclose(together[1:], alone, atol=1e-6)


def test_cached_steps_keep_only_what_is_read() -> None:
    layout = Layout.of({"a": Slot("x", history=2), "b": Slot("y")}, {"cached": ("a",)})
    steps = [Step(t=1.0, x={0: 1.0}, m={0: 1.0})] * 6
    rows = cached_steps(steps, layout, ["full", "full", "full", "cached", "full", "full"], Forecast("taylor1"))
    assert [row.write for row in rows] == [(), ("a",), ("a",), (), (), ()]
    assert rows[3].read == {"a": (2.0, -1.0)}
    with pytest.raises(RefusedError, match="row 0 would read 'a'"):
        cached_steps(steps[:1], layout, ["cached"], Forecast())


def test_spans_break_where_rows_differ() -> None:
    step = Step(t=1.0, x={0: 1.0}, m={0: 1.0}, path="d", read={"a": (1.0,)})
    full, other = replace(step, path="full", read={}), replace(step, guidance="cfg")
    assert [row.span for row in spans([full, step, step, other, full, step], "d")] == [1, 2, 1, 1, 1, 1]


@pytest.mark.parametrize("family", ["unet", "sd3"])
def test_a_low_resolution_start_rises_once(models: Callable[[str], LatentDiffusion], family: str) -> None:
    """A third of the calls see half the height and width; then the clean estimate is enlarged and made noisy again."""
    shapes: list[tuple[int, ...]] = []
    model = cached(models(family), "low-resolution-start", level=0.5, share=1 / 3)
    latents = model.runtime().sample(
        prompts(family), [5, 6], 2 * tiny.SIDE, 2 * tiny.SIDE, on_step=lambda _row, after, _: shapes.append(after.shape)
    )
    assert [shape[-1] for shape in shapes] == [tiny.SIDE // 2] * 4 + [tiny.SIDE] * 8
    assert latents.shape[-2:] == (tiny.SIDE, tiny.SIDE)


def test_a_low_resolution_start_goes_with_a_sampler_that_looks_back_far(
    models: Callable[[str], LatentDiffusion],
) -> None:
    """UniPC's late starts reach over three rows; those before the rise are gone, since a picture has the full size."""
    model = sampled(models("unet").clone(), STEPS, "UniPCMultistepScheduler")
    plan = cached(model, "low-resolution-start", level=0.5, share=1 / 3).step_plan
    assert plan is not None
    assert model.step_plan is not None
    assert sorted(plan.starts) == [row for row in sorted(model.step_plan.starts) if row >= 4]


def test_calibration_needs_prompts(models: Callable[[str], LatentDiffusion]) -> None:
    model, step = models("sd3").clone(), Cache("magcache")
    with pytest.raises(PassError, match="at least one prompt"):
        step.apply(model, step.plan(model, []), PassContext([], 0, 16, 16))
