"""The cache pass: which calls are full, how the others forecast, what is refused, and what the runtime makes of it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from compress.errors import PassError, RefusedError
from compress.families import segments
from compress.model.latent_diffusion import LatentDiffusion, load
from compress.model.tokenizers import portable
from compress.passes.base import PassContext
from compress.passes.cache import Cache
from compress.sampler import compile_sampler
from export.runtime import LatentSpec, Runtime
from export.step_plan import Segment, StepPlan
from tests import tiny

FAMILY_NAMES = ["unet", "sd3", "dit", "pixart"]
CONTEXT = PassContext(prompts=[], seed=0, height=2 * tiny.SIDE, width=2 * tiny.SIDE)
Sampled = Callable[..., LatentDiffusion]


@pytest.fixture
def sampled(tiny_folder: Callable[[str], Path]) -> Sampled:
    """A toy model with its own scheduler compiled."""

    def make(family: str, steps: int = 10, **options: Any) -> LatentDiffusion:
        model = load(tiny_folder(family))
        segments = {segment.name: Segment(segment.inputs, segment.outputs) for segment in model.segments()}
        scheduler = model.scheduler_config
        model.step_plan = compile_sampler(
            scheduler["_class_name"], scheduler, steps, 3.0, segments=segments, paths={"full": ("denoiser",)}, **options
        )
        if family == "sd3":
            model.conditioning["max_sequence_length"] = 1
        return model

    return make


def apply(model: LatentDiffusion, cache: Cache) -> StepPlan:
    edits = cache.plan(model, [])
    cache.apply(model, edits, CONTEXT)
    cache.check(model, edits)
    assert model.step_plan is not None
    return model.step_plan


def sample(model: LatentDiffusion) -> np.ndarray:
    assert model.step_plan is not None
    tokenizers = {name: portable(tokenizer) for name, tokenizer in model.tokenizers.items()}
    runtime = Runtime(model.step_plan, model.functions(), model.conditioning, LatentSpec(**model.latent), tokenizers)
    prompts = ["1", "2"] if model.family.name == "dit" else ["a red circle", "a small blue square"]
    return runtime.sample(prompts, [0, 1], 2 * tiny.SIDE, 2 * tiny.SIDE)


def paths(plan: StepPlan) -> str:
    return "".join(step.path[0] for step in plan.steps)


@pytest.mark.parametrize(
    ("cache", "expected"),
    [
        (Cache(cut=0, interval=2), "fsfsfsfsfs"),
        (Cache(cut=0, interval=3), "fssfssfssf"),
        (Cache(cut=0, interval=3, warmup=3), "fffssfssfs"),
        (Cache(cut=0, interval=2, forecast="taylor1"), "ffsfsfsfsf"),
        (Cache(cut=0, interval=4, forecast="taylor1"), "ffsssfsssf"),
        (Cache(cut=0, interval=20), "fsssssssss"),
        (Cache(cut=0, interval=5, schedule="signed-power"), "fssfssssss"),
    ],
)
def test_schedule(sampled: Sampled, cache: Cache, expected: str) -> None:
    assert paths(apply(sampled("unet"), cache)) == expected


@pytest.mark.parametrize("family", FAMILY_NAMES)
@pytest.mark.parametrize("forecast", ["reuse", "taylor1"])
def test_rewrites_cut_and_plan(sampled: Sampled, family: str, forecast: Any) -> None:
    """The rows keep everything of the sampler; slots and segments are those of the cut; both survive JSON."""
    model = sampled(family)
    before = model.step_plan
    assert before is not None
    after = apply(model, Cache(cut=1, interval=3, forecast=forecast))
    assert model.layout is not None
    expected = model.family.cut_layout(model.denoiser, 1).slots["deep"]
    assert model.layout.slots == {"deep": replace(expected, history=2 if forecast == "taylor1" else 1)}
    assert set(after.segments) == {segment.name for segment in model.segments()}
    assert after.slots["deep"].history == (2 if forecast == "taylor1" else 1)
    for old, new in zip(before.steps, after.steps, strict=True):
        assert replace(new, path="full", write=(), read={}) == old
        assert new.write == () or new.path == "full"
        assert bool(new.read) == (new.path == "shallow")
    assert StepPlan.from_json(after.to_json()) == after


@pytest.mark.parametrize("damping", [1.0, 0.5])
def test_taylor_coefficients(sampled: Sampled, damping: float) -> None:
    """At distance k from the last full call, g after the one before: (1 + d k/g, -d k/g), by the rows of the plan."""
    plan = apply(sampled("unet", steps=13), Cache(cut=0, interval=4, forecast="taylor1", damping=damping))
    full = [row for row, step in enumerate(plan.steps) if step.path == "full"]
    assert full == [0, 1, 5, 9]
    expected = {2: 1 / 1, 3: 2 / 1, 4: 3 / 1, 6: 1 / 4, 7: 2 / 4, 8: 3 / 4, 10: 1 / 4, 11: 2 / 4, 12: 3 / 4}
    for row, slope in expected.items():
        assert plan.steps[row].read["deep"] == pytest.approx((1 + damping * slope, -damping * slope), abs=1e-15)


def test_taylor_reuses_until_two_calls_were_full(sampled: Sampled) -> None:
    plan = apply(sampled("unet"), Cache(cut=0, interval=3, forecast="taylor1", warmup=1))
    reads = [step.read.get("deep") for step in plan.steps[:5]]
    assert reads == [None, (1.0,), (1.0,), None, pytest.approx((1 + 1 / 3, -1 / 3))]


@pytest.mark.parametrize("share", [0.0, 1.0])
@pytest.mark.parametrize("family", FAMILY_NAMES)
def test_runs(sampled: Sampled, family: str, share: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """The runtime runs the cached plan; all-full rows through the cut equal the uncut model bit for bit."""
    monkeypatch.setattr(segments, "PAIR_SHARE", share)
    model = sampled(family, steps=6)
    original = sample(model)
    plan = apply(model, Cache(cut=1, interval=2))
    cached = sample(model)
    assert np.isfinite(cached).all()
    assert np.abs(cached - original).max() > 1e-6
    steps = tuple(replace(step, path="full", read={}, write=("deep",)) for step in plan.steps)
    model.step_plan = replace(plan, steps=steps)
    np.testing.assert_array_equal(sample(model), original)


@pytest.mark.parametrize("family", ["unet", "sd3"])
def test_a_deeper_cut_is_closer(sampled: Sampled, family: str) -> None:
    """The more of the denoiser runs at every call, the smaller the error of caching; and short intervals are closer."""
    original = sample(sampled(family, steps=8))

    def error(cache: Cache) -> float:
        model = sampled(family, steps=8)
        apply(model, cache)
        return float(np.square(sample(model) - original).mean())

    assert error(Cache(cut=3, interval=2)) < error(Cache(cut=0, interval=2)) < error(Cache(cut=0, interval=8))


def test_edits_say_what_is_saved(sampled: Sampled) -> None:
    model = sampled("unet")
    share = model.family.cuts(model.denoiser)[1].macs_share
    cut, *rows = Cache(cut=1, interval=2).plan(model, [])
    assert (cut.module, cut.action) == ("denoiser", "cut")
    assert f"{0.5 * (1 - share):.1%} of all MACs are saved" in cut.reason
    assert "5 of 10 calls" in cut.reason
    assert [edit.module for edit in rows] == ["step 1", "step 3", "step 5", "step 7", "step 9"]
    assert model.layout is None, "planning must not touch the model"
    assert model.step_plan is not None
    assert not model.step_plan.slots


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"cut": 4}, "no cut 4: the cuts of this denoiser are 0 to 3"),
        ({"cut": -1}, "no cut -1"),
        ({"interval": 0}, "interval is 0"),
        ({"warmup": 10}, "none is left to skip"),
        ({"method": "magic"}, "^method: 'magic' is not a caching method.* \\(did you mean 'magcache'\\?\\)"),
        ({"method": "fora", "cut": 1}, "^cut: the method fora has no such option; its own: interval"),
        ({"method": "guidance-interval", "sigma": [3.0, 1.0]}, r"^sigma: \[3.0, 1.0\] is not \[low, high\]"),
        ({"method": "guidance-interval", "sigma": [0.0, 1e9]}, "nothing would be saved"),
        ({"method": "encoder-propagation", "key_steps": "49ls"}, "'49ls' is not a set of key steps"),
        ({"method": "encoder-propagation", "key_steps": 1}, "every one of the 10 network calls is a key step"),
        ({"method": "ddt"}, "no sequence of equal blocks"),
    ],
)
def test_refuses(sampled: Sampled, options: dict[str, Any], reason: str) -> None:
    with pytest.raises(RefusedError, match=reason):
        Cache(**options).plan(sampled("unet"), [])


def test_refuses_too_few_steps(sampled: Sampled) -> None:
    with pytest.raises(RefusedError, match="more sampling steps"):
        Cache(cut=0, interval=2, forecast="taylor1").plan(sampled("unet", steps=2), [])


def test_refuses_without_a_sampler_and_twice(sampled: Sampled, tiny_folder: Callable[[str], Path]) -> None:
    cache = Cache(cut=0, interval=2)
    with pytest.raises(RefusedError, match="no step plan"):
        cache.plan(load(tiny_folder("unet")), [])
    model = sampled("unet")
    apply(model, cache)
    with pytest.raises(RefusedError, match="cached already"):
        cache.plan(model, [])


def test_check_notices_what_is_wrong(sampled: Sampled) -> None:
    cache = Cache(cut=1, interval=2)
    model = sampled("unet")
    edits = cache.plan(model, [])
    with pytest.raises(PassError, match="0 network calls read from slots"):
        cache.check(model, edits)
    cache.apply(model, edits, CONTEXT)
    good = model.step_plan
    assert good is not None
    model.step_plan = replace(good, steps=tuple(replace(step, path="full", read={}) for step in good.steps))
    with pytest.raises(PassError, match="0 network calls read from slots, but 5 were planned"):
        cache.check(model, edits)
    model.step_plan = replace(good, segments={"denoiser": Segment(("sample",), ("out_sample",))})
    with pytest.raises(PassError, match="other segments"):
        cache.check(model, edits)
    model.step_plan = replace(good, steps=(replace(good.steps[0], write=()), *good.steps[1:]))
    with pytest.raises(PassError, match="not valid"):
        cache.check(model, edits)


def test_survives_saving(sampled: Sampled, tmp_path: Path) -> None:
    model = sampled("sd3")
    apply(model, Cache(cut=2, interval=3, forecast="taylor1"))
    model.save(tmp_path / "cached")
    again = load(tmp_path / "cached")
    assert again.layout == model.layout
    assert again.step_plan == model.step_plan
    assert again.state_hash() == model.state_hash()
    np.testing.assert_array_equal(sample(again), sample(model))
