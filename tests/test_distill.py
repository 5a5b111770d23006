"""The pass `distill`: what it teaches, what the plan then is, what survives a kill, and what is refused."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from compress.compiler import apply
from compress.engine.export_engine import export_engine
from compress.errors import PassError, RecipeError, RefusedError
from compress.measure.baselines import plan_with_steps
from compress.model.latent_diffusion import LatentDiffusion, load
from compress.passes.base import PassContext
from compress.passes.distill import Distill
from compress.passes.solver import Solver
from compress.recipe.schema import Recipe
from compress.store import Store
from export.engine import Engine
from export.runtime import RuntimeInputError
from export.step_plan import StepPlan, StepPlanError
from export.target import TARGETS
from tests import tiny_engine as toy

PROMPTS = ["a red circle", "a small blue square", "a large green square"]
CONTEXT = PassContext(PROMPTS, 0, toy.SIDE, toy.SIDE)
STEPS = 8
BRIEF = {"updates": 24, "samples": 24, "batch": 8, "rate": 1e-3, "average": 0.8}


def model(tiny_folder: Callable[[str], Path], family: str = "unet", steps: int = STEPS) -> LatentDiffusion:
    return toy.sampled(load(tiny_folder(family)), steps)


def applied(found: LatentDiffusion, step: Distill, context: PassContext = CONTEXT) -> LatentDiffusion:
    changed = found.clone()
    edits = step.plan(changed, [])
    assert [edit.action for edit in edits] == [step.label]
    step.apply(changed, edits, context)
    step.check(changed, edits)
    return changed


def latents(found: LatentDiffusion, plan: StepPlan | None = None) -> np.ndarray:
    runtime = found.runtime()
    return (runtime if plan is None else runtime.altered(plan=plan)).sample(PROMPTS, [70, 71, 72], toy.SIDE, toy.SIDE)


def distance(one: np.ndarray, other: np.ndarray) -> float:
    return float(np.square(one - other).mean())


def unlearned(found: LatentDiffusion, changed: LatentDiffusion) -> LatentDiffusion:
    """The student's plan over the teacher's weights."""
    return replace(found, step_plan=changed.step_plan)


@pytest.mark.parametrize("family", ["unet", "dit"])
def test_guidance_goes_into_the_weights(family: str, tiny_folder: Callable[[str], Path]) -> None:
    found = model(tiny_folder, family)
    before = found.hash()
    prompts = ["1", "2", "3"] if family == "dit" else PROMPTS
    context = replace(CONTEXT, prompts=prompts)
    changed = applied(found, Distill(objective="guidance", **BRIEF), context)  # type: ignore[arg-type]
    assert found.hash() == before != changed.hash()
    plan, old = changed.step_plan, found.step_plan
    assert plan is not None
    assert old is not None
    assert plan.contract is not None
    assert plan.contract.guidance_scale == 3.0
    assert {step.guidance for step in plan.steps} == {"none"}
    assert [(step.t, step.x, step.m) for step in plan.steps] == [(step.t, step.x, step.m) for step in old.steps]
    full, made, naive = (
        one.runtime().sample(prompts, [70, 71, 72], toy.SIDE, toy.SIDE)
        for one in (found, changed, unlearned(found, changed))
    )
    assert distance(made, full) < 0.85 * distance(naive, full)


@pytest.mark.parametrize(("family", "objective"), [("unet", "segment"), ("sd3", "progressive")])
def test_few_steps_land_where_many_do(family: str, objective: str, tiny_folder: Callable[[str], Path]) -> None:
    found = model(tiny_folder, family)
    changed = applied(found, Distill(objective=objective, steps=2, **BRIEF))  # type: ignore[arg-type]
    assert changed.step_plan is not None
    assert changed.step_plan.network_calls == 2
    full = latents(found)
    assert distance(latents(changed), full) < 0.85 * distance(latents(unlearned(found, changed)), full)
    rounds = [entry["trained"] for entry in changed.provenance if "trained" in entry]
    names = ["4 steps", "2 steps"] if objective == "progressive" else ["2 steps"]
    assert rounds == [f"distill {objective}, {name}" for name in names]


def test_a_step_that_is_a_whole_segment_is_the_deterministic_sampler(tiny_folder: Callable[[str], Path]) -> None:
    """Without training, the student's plan is DDIM at its timesteps, whatever the sampler of the teacher."""
    found = load(tiny_folder("unet"))
    spaced = {"timestep_spacing": "trailing", "set_alpha_to_one": True}
    found.scheduler_config |= spaced
    from compress.training.student import student_plan

    teacher = toy.sampled(found, 8).step_plan
    own = toy.sampled(found, 4).step_plan
    assert teacher is not None
    assert own is not None
    student = student_plan(teacher, [0, 2, 4, 6])
    for one, other in zip(student.steps, own.steps, strict=True):
        assert one.t == other.t
        assert one.x[0] == pytest.approx(other.x[0], abs=1e-6)
        assert one.m[0] == pytest.approx(other.m[0], abs=1e-6)


def test_a_chain_gives_an_engine_that_keeps_its_contract(tiny_folder: Callable[[str], Path], tmp_path: Path) -> None:
    found, store = model(tiny_folder), Store(tmp_path / "store")
    brief = BRIEF | {"updates": 2, "samples": 4}
    passes = [
        Distill(objective="guidance", **brief),  # type: ignore[arg-type]
        Distill(objective="segment", steps=2, **brief),  # type: ignore[arg-type]
    ]
    stages = apply(found, passes, [], replace(CONTEXT, store=store), store)
    assert list(stages) == ["distill-guidance", "distill-segment"]
    assert not list((tmp_path / "store" / "work").iterdir())
    last = stages["distill-segment"]
    assert last.step_plan is not None
    contract = last.step_plan.contract
    assert contract is not None
    assert contract.every
    assert contract.guidance_scale == 3.0
    assert contract.timesteps == tuple(step.t for step in last.step_plan.steps)
    target = TARGETS["onnxruntime-cpu"]
    export_engine(last, [target], toy.SHAPES, tmp_path / "engine")
    engine = Engine.open(tmp_path / "engine", target.name)
    made = engine.sample(PROMPTS, [1, 2, 3], toy.SIDE, toy.SIDE)
    expected = last.runtime().sample(PROMPTS, [1, 2, 3], toy.SIDE, toy.SIDE)
    assert np.abs(made - expected).max() <= 1e-4 * np.abs(expected).max()
    runtime = engine.runtime
    assert runtime.plan.contract == contract
    with pytest.raises(RuntimeInputError, match="give guidance of scale 3 by themselves"):
        runtime.sample(PROMPTS, [1, 2, 3], toy.SIDE, toy.SIDE, negative_prompts=["", "", ""])
    with pytest.raises(StepPlanError, match="were distilled for one sampler"):
        runtime.altered(plan=replace(runtime.plan, contract=None))
    picture = np.zeros((1, 4, toy.SIDE // 2, toy.SIDE // 2), np.float32)
    begun = runtime.sample(PROMPTS, [1, 2, 3], toy.SIDE, toy.SIDE, start_step=1, image_latents=picture)
    assert np.isfinite(begun).all()


def test_a_broken_contract_is_refused(tiny_folder: Callable[[str], Path]) -> None:
    found = model(tiny_folder)
    changed = applied(found, Distill(objective="segment", steps=2, **(BRIEF | {"updates": 1})))  # type: ignore[arg-type]
    plan = changed.step_plan
    assert plan is not None
    assert StepPlan.from_json(plan.to_json()) == plan
    first, last = plan.steps
    for broken, match in [
        (replace(plan, steps=(first,), starts={}), "distilled for 2 calls at the timesteps .* but the plan makes 1"),
        (replace(plan, steps=(first, replace(last, t=1.0))), "but the plan makes 2 at"),
        (replace(plan, prediction="epsilon"), "predict v_prediction, but the plan reads epsilon"),
        (replace(plan, steps=(replace(first, guidance="cfg"), last)), "step 0 is guided, but the distilled weights"),
    ]:
        with pytest.raises(StepPlanError, match=match):
            broken.validate()
        with pytest.raises(StepPlanError, match=match):
            StepPlan.from_json(broken.to_json())
    with pytest.raises(RefusedError, match="distilled for the calls of their plan"):
        Solver(calls=1).plan(changed, [])
    with pytest.raises(RefusedError):
        plan_with_steps(changed, 4)
    assert found.step_plan is not None
    with pytest.raises(StepPlanError, match="the plan is for distilled weights, and these are not"):
        found.runtime().altered(plan=plan)


def test_after_guidance_the_sampler_may_skip_but_not_move(tiny_folder: Callable[[str], Path]) -> None:
    found = model(tiny_folder)
    changed = applied(found, Distill(objective="guidance", **(BRIEF | {"updates": 1})))  # type: ignore[arg-type]
    plan = changed.step_plan
    assert plan is not None
    replace(plan, steps=plan.steps[:3], starts={}).validate()
    moved = (replace(plan.steps[0], t=3.5), *plan.steps[1:])
    with pytest.raises(StepPlanError, match=r"but the plan calls them at 3\.5"):
        replace(plan, steps=moved).validate()
    with pytest.raises(RefusedError, match="has no guidance to learn"):
        Distill(objective="guidance", **BRIEF).plan(changed, [])  # type: ignore[arg-type]


class Killed(BaseException):
    """Stands for a kill, after which only what is on the disk is left."""


def test_a_killed_pass_goes_on_and_ends_with_the_same_weights(
    tiny_folder: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from compress.training import trainer

    monkeypatch.setattr(trainer, "Schedule", functools.partial(trainer.Schedule, save_seconds=0.0))
    step = Distill(objective="segment", steps=2, **(BRIEF | {"updates": 12, "samples": 4}))  # type: ignore[arg-type]
    found = model(tiny_folder)
    whole = applied(found, step, replace(CONTEXT, store=Store(tmp_path / "whole")))
    seen: list[int] = []

    def dying(what: str, done: int, total: int) -> None:
        if what.startswith("distill"):
            seen.append(done)
            if done == 7 and seen.count(7) == 1:
                raise Killed

    context = replace(CONTEXT, store=Store(tmp_path / "killed"), progress=dying)
    with pytest.raises(Killed):
        applied(found, step, context)
    again = applied(found, step, context)
    assert seen == [*range(8), 7, *range(8, 13)]
    assert again.hash() == whole.hash()


def test_teacher_runs_are_kept_by_content(tiny_folder: Callable[[str], Path], tmp_path: Path) -> None:
    from compress.training.runs import Asked, teacher_runs

    found, store = model(tiny_folder), Store(tmp_path)
    asked = Asked(PROMPTS, 5, 6, toy.SIDE, toy.SIDE)
    first = teacher_runs(found, [0, 4], asked, store)
    entries = store.usage().entries
    assert torch.equal(teacher_runs(found, [0, 4], asked, store).states, first.states)
    assert store.usage().entries == entries
    other = teacher_runs(found, [0, 4], replace(asked, seed=6), store)
    assert store.usage().entries == entries + 1
    assert not torch.equal(other.states, first.states)
    for run in range(6):
        end = found.runtime().sample([PROMPTS[run % 3]], [5 + run], toy.SIDE, toy.SIDE)
        assert np.abs(end - first.states[run, -1].numpy()).max() <= 1e-4


def test_a_try_says_what_it_will_take(tiny_folder: Callable[[str], Path]) -> None:
    found = model(tiny_folder)
    before = found.hash(), [parameter.requires_grad for parameter in found.denoiser.parameters()]
    few = Distill(objective="segment", steps=2, **BRIEF).costs(found, [], CONTEXT)[0]  # type: ignore[arg-type]
    many = Distill(objective="segment", steps=2, **(BRIEF | {"updates": 4000})).costs(found, [], CONTEXT)[0]  # type: ignore[arg-type]
    parts = Distill(objective="segment", steps=2, accumulate=8, **BRIEF).costs(found, [], CONTEXT)[0]  # type: ignore[arg-type]
    assert many.seconds > 10 * few.seconds
    assert parts.bytes < few.bytes
    assert (found.hash(), [parameter.requires_grad for parameter in found.denoiser.parameters()]) == before
    with pytest.raises(RefusedError, match=r"would take \d+ minutes here, and minutes allows 0\.01"):
        Distill(objective="segment", steps=2, minutes=0.01, **(BRIEF | {"updates": 10**6})).costs(found, [], CONTEXT)  # type: ignore[arg-type]


def test_what_cannot_be_distilled_is_refused(tiny_folder: Callable[[str], Path]) -> None:
    found = model(tiny_folder)
    plan = found.step_plan
    assert plan is not None
    step = Distill(objective="segment", steps=STEPS, **BRIEF)  # type: ignore[arg-type]
    with pytest.raises(RefusedError, match="steps: 8 are no fewer than the 8 of the sampler"):
        step.plan(found, [])
    noisy = replace(plan, steps=tuple(replace(row, noise=0.1) for row in plan.steps))
    with pytest.raises(RefusedError, match="choose a deterministic scheduler"):
        Distill(objective="segment", steps=2, **BRIEF).plan(replace(found, step_plan=noisy), [])  # type: ignore[arg-type]
    half = replace(plan, steps=(replace(plan.steps[0], guidance="none", guidance_scale=1.0), *plan.steps[1:]))
    with pytest.raises(RefusedError, match=r"leave sampler\.guidance_interval out"):
        Distill(objective="guidance", **BRIEF).plan(replace(found, step_plan=half), [])  # type: ignore[arg-type]
    with pytest.raises(RefusedError, match="must be compiled first"):
        step.plan(replace(found, step_plan=None), [])
    with pytest.raises(RefusedError, match="put this pass first"):
        step.plan(toy.quantized(found.clone(), "denoiser", ["conv_out"]), [])
    with pytest.raises(RefusedError, match="needs the key calibration"):
        step.apply(found, [], replace(CONTEXT, prompts=[]))
    with pytest.raises(PassError, match="holds no contract"):
        step.check(found, [])


RECIPE = """schema_version: 1
model: m
sampler: {{steps: 20, guidance_scale: 3.0}}
passes:
{passes}
targets: [onnxruntime-cpu]
shapes: {{height: 64, width: 64}}
calibration: {{prompts: {prompts}, samples: 2}}
out: build/x
"""


@pytest.mark.parametrize(
    ("passes", "match"),
    [
        ("  - distill: {objective: segment, updates: 5}", r"distill\.steps: is missing; segment needs the number"),
        ("  - distill: {objective: guidance, steps: 4, updates: 5}", r"distill\.steps: guidance keeps the sampler's"),
        ("  - distill: {objective: guidance}", r"distill\.updates: is missing; give updates, or minutes"),
        ("  - distill: {objective: lcm, updates: 5}", r"distill\.objective: .*guidance, segment"),
        ("  - distill: {objective: guidance, updates: 5, accumulate: 40}", r"distill\.accumulate: a batch of 16 has"),
        (
            "  - quantize: {scheme: int8-w8a8}\n  - distill: {objective: guidance, updates: 5}",
            "legal order is .*distill < quantize",
        ),
        (
            "  - distill: {objective: guidance, updates: 5}\n  - distill: {objective: guidance, updates: 6}",
            "'distill-guidance' is there twice",
        ),
    ],
)
def test_a_recipe_is_read_closely(passes: str, match: str, tmp_path: Path) -> None:
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a\nb\n")
    with pytest.raises(RecipeError, match=match):
        Recipe.parse(RECIPE.format(passes=passes, prompts=prompts))
    chain = "  - distill: {objective: guidance, updates: 5}\n  - distill: {objective: segment, steps: 4, minutes: 2}"
    recipe = Recipe.parse(RECIPE.format(passes=chain, prompts=prompts))
    assert Recipe.parse(recipe.to_yaml()) == recipe
