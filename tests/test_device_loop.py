"""The loop on a device computes what the ordinary loop does: random plans, real denoisers; others it does not take."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from compress.model.latent_diffusion import load
from compress.passes.base import PassContext
from compress.passes.cache import Cache
from export.device_loop import RECORDINGS, DeviceLoop, obstacle
from export.loop import WholeLoop
from export.program import PartFunction
from export.step_plan import Gate, Slot, Step, StepPlan
from kernels.dispatch import Mode
from tests.interpreted import Interpreter
from tests.plain import FUNCTIONS, SPLIT_FUNCTIONS, given, over_numpy, random_plan, sampled
from tests.test_gate import gated_plan
from tests.test_guidance import sequential
from tests.test_spans import split_plan
from tests.tiny_engine import SIDE, torch_runtime
from tests.tiny_engine import sampled as with_plan

SEEDS = (1, 2, 3)
ROWS = 8  # the toy denoiser multiplies a difference by about three at every row
CPU = torch.device("cpu")


def over_tensors(function: PartFunction) -> Callable[[Mapping[str, Tensor]], dict[str, Tensor]]:
    """A NumPy function as one of tensors."""

    def call(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        computed = function({name: value.numpy() for name, value in tensors.items()})
        return {name: torch.from_numpy(np.asarray(value)) for name, value in computed.items()}

    return call


def looped(
    functions: Mapping[str, PartFunction], made: list[DeviceLoop], mode: Mode | None = None
) -> Callable[[StepPlan, str, int], WholeLoop]:
    """What makes device loops over NumPy functions; `made` gains them."""

    def factory(plan: StepPlan, latent_input: str, rank: int) -> WholeLoop:
        inputs = {name for segment in plan.segments.values() for name in segment.inputs}
        dtypes = {name: torch.int64 if name == "class_labels" else torch.float32 for name in inputs}
        on_tensors = {name: over_tensors(functions[name]) for name in plan.segments}
        made.append(DeviceLoop(plan, on_tensors, latent_input, rank, dtypes, CPU, mode))
        return made[-1]

    return factory


def both(
    plan: StepPlan, functions: Mapping[str, PartFunction] = FUNCTIONS, mode: Mode | None = None, **more: Any
) -> tuple[np.ndarray, ...]:
    """Latents of the ordinary loop, and of the one on the device."""
    assert obstacle(plan) is None
    made: list[DeviceLoop] = []
    ordinary = sampled(over_numpy(plan, functions), SEEDS, **more)
    device = over_numpy(plan, functions, whole_loop=looped(functions, made, mode))
    got = sampled(device, SEEDS, **more)
    assert made, "the ordinary loop ran"
    return ordinary, got


def close(ordinary: np.ndarray, got: np.ndarray) -> bool:
    return float(np.abs(ordinary - got).max()) <= 1e-5 * max(1.0, float(np.abs(ordinary).max()))


@pytest.mark.parametrize("seed", range(40))
def test_random_plans(seed: int) -> None:
    assert close(*both(random_plan(seed, ROWS)))


@pytest.mark.parametrize("seed", range(6))
def test_guidance_one_half_after_the_other(seed: int) -> None:
    assert close(*both(sequential(random_plan(seed, ROWS))))


@pytest.mark.parametrize("seed", range(8))
def test_spans(seed: int) -> None:
    assert close(*both(split_plan(seed, ROWS), SPLIT_FUNCTIONS))


def difference(_: ModuleType, seed: int) -> float:
    """Of the loop with the fused step as a kernel."""
    ordinary, got = both(random_plan(seed, ROWS), mode="triton")
    return float(np.abs(ordinary - got).max() / np.abs(ordinary).max())


@pytest.mark.parametrize("seed", [1, 10])
def test_the_kernel_makes_the_updates(interpreter: Interpreter, seed: int) -> None:
    assert interpreter.run(difference, "denoise_step", seed=seed) <= 1e-5


@pytest.mark.parametrize("row", [1, 5])
def test_the_comparison_notices_another_coefficient(row: int) -> None:
    plan = random_plan(3)
    steps = list(plan.steps)
    steps[row] = replace(steps[row], m={lag: 1.001 * value for lag, value in steps[row].m.items()})
    ordinary, _ = both(plan)
    _, got = both(replace(plan, steps=tuple(steps)))
    assert not close(ordinary, got)


def test_the_mean_of_the_halves_and_a_latent_that_is_kept() -> None:
    """A segment that hands on its input must not see it change; half a slot is not the mean of both."""
    functions = {**FUNCTIONS, "entry": lambda tensors: {"skip": tensors["sample"]}}
    slots = {"kept": Slot("skip", history=2), "mean": Slot("up", halves="mean")}
    rows = [Step(t=1.0, x={0: 0.9}, m={0: -0.3}, guidance="cfg", guidance_scale=2.0, write=("kept", "mean"))]
    rows += [Step(t=2.0, x={0: 0.9}, m={0: -0.3}, path="shallow", read={"mean": (0.8,)}) for _ in range(2)]
    plan = replace(random_plan(0), slots=slots, steps=tuple(rows))
    assert close(*both(plan, functions))
    late = replace(plan, segments={**plan.segments, "deep": replace(plan.segments["deep"], inputs=("skip", "label"))})
    reading = Step(
        t=3.0, x={0: 0.9}, m={0: -0.3}, guidance="cfg", guidance_scale=2.0, read={"mean": (1.0,)}, path="shallow"
    )
    assert close(*both(replace(late, steps=(*rows, reading)), functions))


def test_shapes_come_and_go_in_buffers_that_are_used_again() -> None:
    plan, made = random_plan(5), []
    device = over_numpy(plan, whole_loop=looped(FUNCTIONS, made))
    labels, negative = given(1)
    for side in (8, 4, 12, 8, 8):
        options: dict[str, Any] = {"negative_prompts": {"label": negative}}
        ordinary = over_numpy(plan).sample({"label": labels}, [7], side, side, **options)
        assert close(ordinary, device.sample({"label": labels}, [7], side, side, **options))
    assert len(made) == 1
    assert len(made[0]._recordings) == RECORDINGS


def test_what_watches_or_revises_rows_takes_the_ordinary_loop() -> None:
    plan, made = random_plan(1), []
    device = over_numpy(plan, whole_loop=looped(FUNCTIONS, made))
    seen: list[int] = []
    sampled(device, SEEDS, on_step=lambda row, latents, tensors: seen.append(row))
    assert seen == list(range(len(plan.steps)))
    assert not made


def test_plans_that_change_while_they_run_are_named() -> None:
    gated = gated_plan(Gate("skip", 0.5, 3), 0)
    assert "a gate decides while it runs" in str(obstacle(gated))
    plan = random_plan(0)
    levels = replace(plan, steps=(replace(plan.steps[0], level=0.5), *plan.steps[1:]))
    assert "changes its size" in str(obstacle(levels))
    full = replace(plan.steps[0], write=("feature",))
    idle = Step(t=1.0, x={0: 1.0}, m={0: 0.1}, read={"feature": (1.0,)}, path="entry_only")
    paths = {**plan.paths, "entry_only": ("entry",)}
    assert "row 1 reads a slot that no segment waits for" in str(
        obstacle(replace(plan, paths=paths, steps=(full, idle)))
    )


@pytest.mark.parametrize(
    ("family", "method"),
    [
        ("unet", "deepcache"),
        ("unet", "encoder-propagation"),
        ("unet", "t-gate"),
        ("sdxl", "deepcache"),
        ("sd3", "taylorseer"),
        ("dit", "ddt"),
        ("flux", "delta-dit"),
        ("pixart", None),
    ],
)
def test_real_denoisers(family: str, method: str | None, tiny_folder: Callable[[str], Path]) -> None:
    model = with_plan(load(tiny_folder(family)), 6)
    prompts = [1, 3] if family == "dit" else ["a red circle", "a large blue ring"]
    if method is not None:
        cache = Cache(method=method)
        cache.apply(model, cache.plan(model, []), PassContext(prompts, 0, SIDE, SIDE))
    made: list[DeviceLoop] = []
    ordinary, device = torch_runtime(model), torch_runtime(model)
    device.whole_loop = looped(device.functions, made)
    assert close(*(one.sample(prompts, [3, 4], SIDE, SIDE) for one in (ordinary, device)))
    assert made
