"""The search of a plan: what it may choose from, that it keeps its budget, and when the simpler plan stays."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from compress.errors import RefusedError
from compress.model.latent_diffusion import LatentDiffusion, load
from compress.optimise import lab as laboratory
from compress.optimise.candidate import Candidate, fewer_steps, shifted, spread
from compress.optimise.lab import Lab, open_lab
from compress.optimise.search import Judged, Search, settle, uniform_caching
from compress.passes.base import PassContext
from compress.passes.cache import Cache, Optimize
from compress.store import Store
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
    return open_lab(model, [0], context, tmp_path_factory.mktemp("lab"))


@pytest.mark.parametrize(("calls", "full", "warmup"), [(10, 4, 2), (10, 10, 2), (7, 2, 2), (50, 13, 1)])
@pytest.mark.parametrize("power", [1.0, 1.4])
def test_spread_keeps_the_number(calls: int, full: int, warmup: int, power: float) -> None:
    flags = spread(calls, full, warmup, power)
    assert (len(flags), sum(flags)) == (calls, full)
    assert all(flags[:warmup])


def test_shifted_stays_between_its_neighbours() -> None:
    assert shifted((900.0, 500.0, 100.0), 1, 0.25) == (900.0, 400.0, 100.0)
    assert shifted((900.0, 500.0, 100.0), 1, -0.25) == (900.0, 600.0, 100.0)
    assert shifted((900.0, 500.0, 100.0), 2, 0.5) == (900.0, 500.0, 50.0)
    assert shifted((900.0, 500.0, 100.0), 0, 0.5) is None
    assert shifted((900.0, 500.0), 1, -1.0) is None


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
    search = Search(lab, 0.5 * lab.full_ms, seconds=2.0, seed=0)
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
    search = Search(lab, 0.5 * lab.full_ms, seconds=1.0, seed=0)
    poor = Judged(Candidate((True, *[False] * 3), 0, damping=0.0), 99.0, 0.0)
    finding = settle(search, [poor], samples=4)
    assert finding.chosen != finding.searched
    assert finding.searched.candidate == poor.candidate


def test_too_small_a_budget_is_refused(lab: Lab) -> None:
    with pytest.raises(RefusedError, match="not even one network call"):
        Search(lab, 1e-6, seconds=1.0, seed=0).run()


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


def test_held_out_noises_are_others(lab: Lab) -> None:
    first, held = lab.latents(fewer_steps(2), 0, 2), lab.latents(fewer_steps(2), laboratory.HELD_OUT, 2)
    assert np.abs(first - held).max() > 1e-3
