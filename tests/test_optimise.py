"""The search of a plan: what it may choose from, that it keeps its budget, and when the simpler plan stays."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from compress.errors import RefusedError
from compress.model.latent_diffusion import LatentDiffusion, load
from compress.optimise import lab as laboratory
from compress.optimise.candidate import Candidate, fewer_steps, spread
from compress.optimise.lab import Lab, open_lab
from compress.optimise.search import Judged, Search, settle, uniform_caching
from compress.passes.base import PassContext
from compress.passes.cache import Cache, Optimize
from compress.store import Store
from export.step_plan import StepPlan
from export.target import TARGETS
from tests.tiny_engine import SIDE, sampled

STEPS = 12
PROMPTS = ["a red circle", "a small blue square"]


@pytest.fixture(scope="module")
def model(tiny_folder: Callable[[str], Path]) -> LatentDiffusion:
    return sampled(load(tiny_folder("unet")), STEPS)


@pytest.fixture(scope="module")
def context(tmp_path_factory: pytest.TempPathFactory) -> PassContext:
    store = Store(tmp_path_factory.mktemp("store"))
    return PassContext(PROMPTS, 0, SIDE, SIDE, targets=[TARGETS["onnxruntime-cpu"]], store=store)


@pytest.fixture(scope="module")
def lab(model: LatentDiffusion, context: PassContext, tmp_path_factory: pytest.TempPathFactory) -> Lab:
    return open_lab(model, [0], context, tmp_path_factory.mktemp("lab"), seconds=2.0)


@pytest.mark.parametrize(("calls", "full", "warmup"), [(10, 4, 2), (10, 10, 2), (7, 2, 2), (50, 13, 1)])
@pytest.mark.parametrize("power", [1.0, 1.4])
def test_spread_keeps_the_number(calls: int, full: int, warmup: int, power: float) -> None:
    flags = spread(calls, full, warmup, power)
    assert (len(flags), sum(flags)) == (calls, full)
    assert all(flags[:warmup])


def test_the_lab_measures_and_compares(lab: Lab) -> None:
    """The whole run has no error, fewer steps have some, a cut with all calls full is the whole run again."""
    times = lab.benches[0].times
    assert 0.0 < times.cached < times.full
    whole = lab.decibels(fewer_steps(STEPS), 0, 2)
    assert (whole == 150.0).all()
    assert (lab.decibels(fewer_steps(4), 0, 2) < 100.0).all()
    assert (lab.decibels(Candidate((True,) * STEPS, 0), 0, 2) > 100.0).all()
    mixed = Candidate((True, True, False, False), 0)
    assert lab.latency(mixed) == pytest.approx(2 * times.full + 2 * times.cached)
    layout, plan = lab.build(mixed)
    assert layout is not None
    assert [step.path for step in plan.steps] == ["full", "full", "shallow", "shallow"]
    assert plan.steps[2].read["deep"] == pytest.approx((2.0, -1.0))


def test_every_candidate_is_within_the_budget_and_the_best_is_first(lab: Lab) -> None:
    search = Search(lab, 0.5 * lab.full_ms, seconds=2.0)
    found = search.run()
    assert found
    assert all(one.latency <= search.budget * (1 + 1e-9) for one in found)
    assert [one.decibels for one in found] == sorted((one.decibels for one in found), reverse=True)
    assert all(lab.latency(one) <= search.budget for one in uniform_caching(search))
    finding = settle(search, found, samples=4)
    assert finding.fewer.candidate.calls == search.steps_in_budget()
    simple = max(finding.fewer.decibels, finding.uniform.decibels if finding.uniform is not None else 0.0)
    assert finding.chosen.decibels >= simple


def test_the_simpler_plan_stays_where_the_search_is_no_better(lab: Lab) -> None:
    """A finalist that is worse on the held-out noises is not chosen, whatever calibration said of it."""
    search = Search(lab, 0.5 * lab.full_ms, seconds=1.0)
    poor = Judged(Candidate((True, *[False] * 3), 0, damping=0.0), 99.0, 0.0)
    finding = settle(search, [poor], samples=4)
    assert finding.chosen != finding.searched
    assert finding.searched.candidate == poor.candidate


def test_too_small_a_budget_is_refused(lab: Lab) -> None:
    with pytest.raises(RefusedError, match="not even one network call"):
        Search(lab, 1e-6, seconds=1.0).run()


def test_the_pass_searches_and_says_what_it_found(model: LatentDiffusion, context: PassContext) -> None:
    changed, step = model.clone(), Cache(optimize=Optimize(latency_ratio=0.6, seconds=1.0))
    edits = step.plan(changed, [])
    assert [edit.action for edit in edits] == ["optimize"]
    step.apply(changed, edits, context)
    step.check(changed, edits)
    assert changed.step_plan is not None
    said = changed.step_plan.key["optimised"]
    assert said["chosen"]["latency_ratio"] <= 0.6 + 1e-6
    assert said["chosen"]["held_out_psnr_db"] >= said["fewer_steps"]["held_out_psnr_db"]
    assert said["chosen"]["calls"] == changed.step_plan.network_calls
    latents = changed.runtime().sample(PROMPTS, [5, 6], SIDE, SIDE)
    assert np.isfinite(latents).all()


def test_a_quality_nobody_reaches_is_refused(
    model: LatentDiffusion, context: PassContext, monkeypatch: pytest.MonkeyPatch
) -> None:
    from compress.optimise import optimise

    monkeypatch.setattr(optimise, "RATIOS", (0.3,))
    step = Cache(optimize=Optimize(psnr_db=100.0, seconds=0.5))
    with pytest.raises(RefusedError, match="reaches 100 dB"):
        step.apply(model.clone(), step.plan(model, []), context)


def test_optimize_wants_a_target_and_one_budget(model: LatentDiffusion) -> None:
    step = Cache(optimize=Optimize(latency_ratio=0.5))
    with pytest.raises(RefusedError, match="none of the recipe's runs here"):
        step.apply(model.clone(), [], PassContext(PROMPTS, 0, SIDE, SIDE))
    with pytest.raises(RefusedError, match=r"^optimize: give latency_ratio or psnr_db"):
        Cache(optimize=Optimize())
    with pytest.raises(RefusedError, match=r"^cut: is a method's option"):
        Cache(cut=1, optimize=Optimize(latency_ratio=0.5))


def test_fitted_steps_come_closer_than_the_schedulers_own(lab: Lab) -> None:
    """On noises that were not fitted; and with every point kept, the updates of the sampler are found again."""
    own = lab.decibels(fewer_steps(4), laboratory.HELD_OUT, 4).mean()
    points = lab.kept_points[0][3]
    assert points[0] == 0
    assert len(points) == 4
    fitted = Candidate((True,) * 4, points=points)
    assert lab.decibels(fitted, laboratory.HELD_OUT, 4).mean() > own + 3.0
    every = Candidate((True,) * STEPS, points=tuple(range(STEPS)))
    assert lab.decibels(every, laboratory.HELD_OUT, 4).mean() > 70.0
    assert lab.calibrated(every, 2).mean() > 70.0


def test_a_fitted_plan_is_one_of_its_own(lab: Lab) -> None:
    """Its rows are those of the uncached run; it serialises, cached calls and image-to-image work."""
    candidate = Candidate((True, True, False, True, False), 0, points=(0, 3, 5, 8, 10))
    layout, plan = lab.build(candidate)
    assert layout is not None
    assert [step.t for step in plan.steps] == [lab.plan.steps[point].t for point in (0, 3, 5, 8, 10)]
    assert plan.key["steps"] == 5
    # The linear forecast counts the rows of the uncached run: from rows 0 and 3 to row 5.
    assert plan.steps[2].read["deep"] == pytest.approx((1 + 2 / 3, -2 / 3))
    assert StepPlan.from_json(plan.to_json()) == plan
    runtime = lab.benches[0].runtime.altered(plan=plan)
    picture = runtime.generate(PROMPTS, [1, 2], SIDE, SIDE)
    latents = runtime.encode_image(picture)
    nearly = runtime.sample(PROMPTS, [3, 4], SIDE, SIDE, image_latents=latents, strength=0.2)
    hardly = runtime.sample(PROMPTS, [3, 4], SIDE, SIDE, image_latents=latents, strength=0.8)
    assert np.abs(nearly - latents).mean() < np.abs(hardly - latents).mean()


def test_a_sampler_that_draws_noise_is_not_fitted(lab: Lab) -> None:
    noisy = replace(lab.plan, steps=tuple(replace(step, noise=0.1) for step in lab.plan.steps))
    assert lab.fitting
    other = replace(lab, plan=noisy)
    assert not other.fitting
    assert not any(one.points for one in [*Search(other, 0.5 * lab.full_ms, 1.0).seeds()])


def test_trial_calls_of_a_sampler_of_order_two_are_no_points(lab: Lab) -> None:
    heun = replace(lab, plan=replace(lab.plan, key={**lab.plan.key, "order": 2}))
    assert all(point % 2 == 0 for kept in heun.kept_points for points in kept for point in points)
    assert max(len(points) for points in heun.kept_points[0]) == STEPS // 2


def test_a_sampler_of_order_two_makes_an_odd_number_of_calls(lab: Lab, model: LatentDiffusion) -> None:
    """Heun's n steps make 2 n - 1 calls: the other numbers are refused, and fewer steps take the next below."""
    heun = sampled(model.clone(), STEPS // 2, "HeunDiscreteScheduler")
    assert heun.step_plan is not None
    other = replace(lab, model=heun, plan=heun.step_plan, compiled={}, references={}, fits={})
    assert heun.step_plan.network_calls == STEPS - 1
    with pytest.raises(RefusedError, match="makes 5 network calls, and never 6"):
        other.sampler(6)
    search = Search(other, 6.5 * other.benches[None].times.full, 1.0)
    assert search.steps_in_budget() == 5
    impossible = Candidate((True, False, True, False, True, False), 0)
    assert search.judge(impossible, 2) == -1.0
    search.seeds = lambda: iter([impossible, fewer_steps(5)])  # type: ignore[method-assign]
    assert [one.candidate.calls % 2 for one in search.run() if one.candidate.points is None] == [1]


def test_held_out_noises_are_others(lab: Lab) -> None:
    first, held = lab.latents(fewer_steps(2), 0, 2), lab.latents(fewer_steps(2), laboratory.HELD_OUT, 2)
    assert np.abs(first - held).max() > 1e-3
