"""Recovery after pruning: what is learned and from what, what survives a kill, and what is refused."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from compress.errors import PassError, RecipeError, RefusedError
from compress.model.latent_diffusion import LatentDiffusion, load
from compress.passes.base import PassContext
from compress.passes.prune import Prune
from compress.passes.prune_recover import Recover, Whole
from compress.recipe.schema import Recipe
from compress.store import Store
from compress.training.features import Watched, normalised_error
from compress.training.recovery import Recovery, Terms
from compress.training.runs import conditioned, teacher_runs
from compress.training.student import unguided
from compress.training.teaching import network_of
from export.target import built_anywhere
from tests import tiny_engine as toy

CPU = built_anywhere()
PROMPTS = ["a red circle", "a small blue square", "a large green square"]
CONTEXT = PassContext(PROMPTS, 0, toy.SIDE, toy.SIDE, targets=CPU)
BRIEF: dict[str, Any] = {"updates": 30, "samples": 12, "batch": 8, "rate": 3e-4, "average": 0.8, "denoise": 0.0}
"""The toys were never trained: their own samples are far from what they estimate."""
Folder = Callable[[str], Path]


def sampled(folder: Path) -> LatentDiffusion:
    return toy.sampled(load(folder), steps=3)


def pruned(found: LatentDiffusion, context: PassContext = CONTEXT, **fields: Any) -> LatentDiffusion:
    step = Prune(**({"macs_ratio": 0.6, "importance": "magnitude", "multiple": 2} | fields))
    changed = found.clone()
    edits = step.plan(changed, CPU)
    step.apply(changed, edits, context)
    step.check(changed, edits)
    return changed


def latents(found: LatentDiffusion, prompts: list[str]) -> np.ndarray:
    return found.runtime().sample(prompts, [70, 71, 72], toy.SIDE, toy.SIDE)


def distance(one: np.ndarray, other: np.ndarray) -> float:
    return float(np.square(one - other).mean())


@pytest.mark.parametrize(("family", "features"), [("unet", 0.0), ("sd3", 0.1), ("dit", 0.0)])
def test_what_is_left_learns_what_was(family: str, features: float, tiny_folder: Folder) -> None:
    """Guided runs of noises that were not trained on come nearer to the whole model's."""
    prompts = ["1", "2", "3"] if family == "dit" else PROMPTS
    context = replace(CONTEXT, prompts=prompts)
    found = sampled(tiny_folder(family))
    before, whole = found.hash(), latents(found, prompts)
    axes = ("heads", "ffn", "resnet", "depth")
    cut = pruned(found, context, axes=axes)
    learned = pruned(found, context, axes=axes, recover=Recover(features=features, **BRIEF))
    assert found.hash() == before
    assert learned.structures == cut.structures
    assert distance(latents(learned, prompts), whole) < 0.8 * distance(latents(cut, prompts), whole)
    (said,) = [entry for entry in learned.provenance if "trained" in entry]
    assert said["trained"] == "recover"
    assert said["updates"] == BRIEF["updates"]
    assert len(said["loss"]) == BRIEF["updates"]
    assert not any(module._forward_hooks for module in learned.denoiser.modules())


class Killed(BaseException):
    """Stands for a kill, after which only what is on the disk is left."""


def test_a_killed_recovery_goes_on_and_ends_with_the_same_weights(
    tiny_folder: Folder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from compress.training import trainer

    monkeypatch.setattr(trainer, "Schedule", functools.partial(trainer.Schedule, save_seconds=0.0))
    how = Recover(**(BRIEF | {"updates": 12, "samples": 4}))
    found = sampled(tiny_folder("unet"))
    whole = pruned(found, replace(CONTEXT, store=Store(tmp_path / "whole")), recover=how)
    seen: list[int] = []

    def dying(what: str, done: int, total: int) -> None:
        if what == "recover":
            seen.append(done)
            if done == 7 and seen.count(7) == 1:
                raise Killed

    context = replace(CONTEXT, store=Store(tmp_path / "killed"), progress=dying)
    with pytest.raises(Killed):
        pruned(found, context, recover=how)
    again = pruned(found, context, recover=how)
    assert seen == [*range(8), 7, *range(8, 13)]
    assert again.hash() == whole.hash()
    assert not list((tmp_path / "killed" / "work").iterdir())


def lesson(found: LatentDiffusion, terms: Terms, student: LatentDiffusion, *, watch: bool = False) -> Recovery:
    plan = found.step_plan
    assert plan is not None
    asked = Recover(**(BRIEF | {"samples": 3})).asked(CONTEXT)
    runs = teacher_runs(replace(found, step_plan=unguided(plan)), range(3), asked, ends_only=True)
    nothing = conditioned(found, None, toy.SIDE, toy.SIDE)
    networks = [network_of(found, one.denoiser, plan, False) for one in (found, student)]
    paths = list(Whole.of(found).blocks)
    watched = (Watched(found.denoiser, paths), Watched(student.denoiser, paths)) if watch else None
    return Recovery(runs, *networks, terms, nothing, watched)


def loss(found: Recovery, parts: int = 1) -> float:
    with torch.no_grad():
        return sum(float(part()) for part in found.losses(torch.Generator().manual_seed(3), 8, parts))


def test_the_terms_of_the_loss(tiny_folder: Folder) -> None:
    """The network as it was has none to itself but that of the noised latents; a changed one has all."""
    found = sampled(tiny_folder("unet"))
    same, other = found.clone(), found.clone()
    with torch.no_grad():
        for weight in other.denoiser.parameters():
            weight.mul_(1.1)
    output, denoise, features = Terms(1.0, 0.0, 0.0, 0.5), Terms(0.0, 1.0, 0.0, 0.5), Terms(0.0, 0.0, 1.0, 0.5)
    assert loss(lesson(found, output, same)) == 0.0
    assert loss(lesson(found, features, same, watch=True)) == 0.0
    assert loss(lesson(found, denoise, same)) > 0.0
    assert loss(lesson(found, output, other)) > 0.0
    assert loss(lesson(found, features, other, watch=True)) > 0.0
    both = lesson(found.clone(), Terms(1.0, 0.5, 0.1, 0.5), other, watch=True)
    assert loss(both) == pytest.approx(loss(both, parts=3), rel=1e-5)


def test_the_half_without_a_prompt_is_asked_too(tiny_folder: Folder) -> None:
    """A student that differs without a prompt alone is wrong as often as that is asked."""
    found = sampled(tiny_folder("dit"))
    found_context = replace(CONTEXT, prompts=["1", "2", "3"])
    plan = found.step_plan
    assert plan is not None
    asked = Recover(**(BRIEF | {"samples": 3})).asked(found_context)
    runs = teacher_runs(replace(found, step_plan=unguided(plan)), range(3), asked, ends_only=True)
    nothing = conditioned(found, None, toy.SIDE, toy.SIDE)
    seen = list[torch.Tensor]()
    network = network_of(found, found.denoiser, plan, False)

    def listening(**given: torch.Tensor) -> tuple[torch.Tensor, ...]:
        seen.append(given["class_labels"])
        return network.denoise(**given)

    for share, expected in ((0.0, 0.0), (0.3, 0.3), (1.0, 1.0)):
        seen.clear()
        student = replace(network, denoise=listening)
        loss_of = Recovery(runs, network, student, Terms(1.0, 0.0, 0.0, share), nothing)
        for part in loss_of.losses(torch.Generator().manual_seed(0), 200, 2):
            part()
        labels = torch.cat(seen)
        assert float((labels == nothing["class_labels"]).float().mean()) == pytest.approx(expected, abs=0.08)


def test_blocks_are_compared_by_their_size() -> None:
    wanted = [torch.ones(2, 3), 10.0 * torch.ones(2, 5, 5)]
    assert float(normalised_error([1.1 * one for one in wanted], wanted)) == pytest.approx(0.01)


def test_blocks_that_do_not_run_are_noticed(tiny_folder: Folder) -> None:
    found = sampled(tiny_folder("unet"))
    watched = Watched(found.denoiser, ["down_blocks"])
    found.parts()["denoiser"](**found.family.example_inputs(found.denoiser, 1, 8, 8, 5))
    with pytest.raises(PassError, match="0 of 1 blocks ran"):
        watched.taken()


def test_a_try_says_what_it_will_take(tiny_folder: Folder) -> None:
    found = sampled(tiny_folder("unet"))

    def seconds(**fields: Any) -> float:
        costs = Prune(macs_ratio=0.7, recover=Recover(**(BRIEF | fields))).costs(found, [], CONTEXT)
        assert costs is not None
        return sum(one.seconds for one in costs)

    assert seconds(updates=4000) > 10 * seconds()
    assert Prune(macs_ratio=0.7).costs(found, [], CONTEXT) is None
    with pytest.raises(RefusedError, match=r"prune\.recover: 1000000 updates .* minutes allows 0\.01"):
        seconds(updates=10**6, minutes=0.01)


RECIPE = """schema_version: 1
model: m
sampler: {{steps: 20, guidance_scale: 3.0}}
passes:
  - prune: {fields}
targets: [onnxruntime-cpu]
shapes: {{height: 64, width: 64}}
calibration: {{prompts: {prompts}, samples: 2}}
out: build/x
"""


@pytest.mark.parametrize(
    ("fields", "match"),
    [
        ("{size_ratio: 0.5, recover: {}}", r"prune\.recover: updates: is missing; give updates, or minutes"),
        ("{size_ratio: 0.5, recover: {updates: 5, step: 1}}", r"prune\.recover\.step: is not a known key; known: upd"),
        ("{size_ratio: 0.5, recover: {updates: 0}}", r"prune\.recover\.updates: 0 is not allowed"),
        ("{size_ratio: 0.5, recover: {updates: '5'}}", r"prune\.recover\.updates: is the text '5', not an integer"),
        ("{size_ratio: 0.5, recover: {updates: 5, output: 0.0, denoise: 0.0}}", "output: is 0, and denoise and"),
        (
            "{size_ratio: 0.5, part: vae_decoder, importance: magnitude, recover: {updates: 5}}",
            r"prune\.recover: trains the denoiser, and the part is vae_decoder",
        ),
    ],
)
def test_a_recipe_is_read_closely(fields: str, match: str, tmp_path: Path) -> None:
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a\nb\n")
    with pytest.raises(RecipeError, match=match):
        Recipe.parse(RECIPE.format(fields=fields, prompts=prompts))
    good = "{macs_ratio: 0.7, recover: {updates: 5, features: 0.1}}"
    recipe = Recipe.parse(RECIPE.format(fields=good, prompts=prompts))
    assert Recipe.parse(recipe.to_yaml()) == recipe
    (step,) = recipe.passes
    assert isinstance(step, Prune)
    assert isinstance(step.recover, Recover)
    assert (step.recover.updates, step.recover.features) == (5, 0.1)
