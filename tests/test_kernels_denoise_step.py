"""The fused denoising step: its kernel against float64, forecasts and guidance against the runtime, and its table."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch

from export.errors import EngineError
from export.plan_table import plan_table
from export.runtime import LatentSpec, Runtime
from export.step_plan import Segment, Slot, Step, StepPlan
from kernels import denoise_step as fused
from kernels.errors import KernelError
from kernels.step_table import StepTable, step_table
from tests.interpreted import Interpreter, guarded, largest_error

SHAPE = (2, 3, 5, 7)


def randn(*shape: int, seed: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def plan(**changes: Any) -> StepPlan:
    """Seven rows, guided but for the last two; two forecast the network output, one draws noise, one looks far back."""

    def row(at: int, **own: Any) -> Step:
        guidance = {"guidance": "cfg", "guidance_scale": 3.0 + at} if at < 5 else {}
        return Step(**{"t": 7.0 - at, "x": {0: 0.9}, "m": {0: -0.3}, "input_scale": 1.0 - 0.1 * at, **guidance, **own})

    taylor = {"kept": (1.7, -0.7)}
    rows = (
        row(0, write=("kept",)),
        row(1, write=("kept",), x={0: 0.5, 1: 0.4}, m={0: 0.2, 1: -0.6}),
        row(2, read=taylor, noise=0.8),
        row(3, write=("kept",), m={0: 1.1, 3: 0.4}, initial=0.3),
        row(4, read={"kept": (1.2, -0.4)}, x={0: 0.7, 2: -0.5}),
        row(5, read={"kept": (1.0,)}, noise=0.4),
        row(6, m={0: 0.9, 2: -0.2}),
    )
    graph: dict[str, Any] = {
        "segments": {"denoiser": Segment(("sample", "timestep", "cond"), ("out",))},
        "paths": {"full": ("denoiser",)},
        "slots": {"kept": Slot("out", "output", history=2)},
    }
    return StepPlan(**{**graph, "steps": rows, **changes})


def run(op: ModuleType, table: StepTable, outputs: torch.Tensor, dtype: torch.dtype, mode: str) -> torch.Tensor:
    """The latents after every row; that the next network input is made of them is checked on the way.

    Args:
        op: the module of the operation.
        table: of the sampler.
        outputs: (rows, halves * samples, ...) what the network answers.
        dtype: of the network.
        mode: which implementation.
    """
    noise = guarded(randn(table.rows, *SHAPE, seed=1).float()[table.indices[:, 1] >= 0])
    state = op.begin(table, guarded(3 * randn(*SHAPE, seed=0).float()), noise, dtype)
    after = []
    for row, output in enumerate(outputs):
        op.denoise_step(state, guarded(output.to(dtype)), mode=mode)
        after.append(state.latent(row + 1).clone())
        following = (float(table.coefficients[row][3]) * after[-1]).to(dtype)
        assert float(state.timestep) == float(table.coefficients[row][4])
        assert torch.equal(state.network_input.view(state.halves, *SHAPE), torch.stack([following] * state.halves))
    assert state.progress.tolist() == [table.rows, 0]
    return torch.stack(after)


def in_float64(plan: StepPlan, outputs: torch.Tensor) -> torch.Tensor:
    """The latents after every row, by the words of `export.plan_rows.Step`."""
    noises = randn(len(plan.steps), *SHAPE, seed=1).float().double()
    latents, guided, kept = [3 * randn(*SHAPE, seed=0).float().double()], [], []
    for row, step in enumerate(plan.steps):
        halves = outputs[row].double().view(-1, *SHAPE)
        for coefficients in step.read.values():
            halves = sum(c * value for c, value in zip(coefficients, kept[::-1], strict=False))  # type: ignore[assignment]
        if step.write:
            kept.append(halves)
        of_guidance = halves[-1] if step.guidance == "none" else halves[0].lerp(halves[-1], step.guidance_scale)
        guided.append(of_guidance)
        total = step.noise * noises[row] + step.initial * latents[0]
        total = total + sum(c * latents[row - lag] for lag, c in step.x.items())
        latents.append(total + sum(c * guided[row - lag] for lag, c in step.m.items()))
    return torch.stack(latents[1:])


def error(op: ModuleType, plan: str, dtype: str, mode: str = "triton") -> float:
    """The largest error of any row against float64."""
    read = StepPlan.from_json(plan)
    table, kind = plan_table(read), getattr(torch, dtype)
    halves = 2 if table.indices[:, 0].any() else 1
    outputs = randn(table.rows, halves * SHAPE[0], *SHAPE[1:], seed=2).to(kind)
    got = run(op, table, outputs, kind, mode)
    truth = in_float64(read, outputs)
    return max(largest_error(ours, theirs) for ours, theirs in zip(got, truth, strict=True))


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_the_kernel_agrees_with_float64(interpreter: Interpreter, dtype: str) -> None:
    assert interpreter.run(error, "denoise_step", plan=plan().to_json(), dtype=dtype) <= 1e-6
    assert error(fused, plan().to_json(), dtype, mode="reference") <= 1e-6


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("cond - uncond), cond)", "uncond - cond), cond)"),
        ("inside = (at < count) & (row < rows)", "inside = row < rows"),
        ("at = tl.program_id(0) * BLOCK +", "at = 1 + tl.program_id(0) * BLOCK +"),
        ("tl.store(latents + (row + 1) % LATENTS", "tl.store(latents + row % LATENTS"),
        ("past = outputs + (row + OUTPUTS - lag)", "past = outputs + (row + OUTPUTS - 1)"),
        ("(read + FORECASTS - lag) % FORECASTS", "read"),
        ("drawn = noise + tl.load(indices + row * INDICES + 1)", "drawn = noise + tl.load(indices + 2 * INDICES + 1)"),
        ("share = tl.load(numbers + 2)", "share = tl.load(numbers + 1)"),
        ("scaled = (tl.load(numbers + 3) * total)", "scaled = total"),
        ("if finished == tl.num_programs(0) - 1:", "if finished == 0:"),
        ("tl.store(progress + 1, 0)", "tl.store(progress + 1, 1)"),
        ("tl.load(numbers + 4)", "tl.load(numbers + 3)"),
    ],
)
def test_a_broken_kernel_is_seen(interpreter: Interpreter, old: str, new: str) -> None:
    source = plan().to_json()
    assert interpreter.sees("denoise_step", old, new, error, above=1e-6, plan=source, dtype="float16")


def test_the_runtime_makes_the_same_latents() -> None:
    """Both run the same network over the same plan, whose rows skip, forecast, guide and draw."""
    whole, table = plan(), plan_table(plan())
    weight = randn(3, 3, seed=5).float()

    def network(sample: torch.Tensor, t: float, cond: torch.Tensor) -> torch.Tensor:
        return torch.einsum("nchw,cd->ndhw", sample, weight).tanh() + 0.1 * t * cond.reshape(-1, 1, 1, 1)

    def function(tensors: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        given = {name: torch.from_numpy(value) for name, value in tensors.items()}
        return {"out": network(given["sample"], float(given["timestep"][0]), given["cond"]).numpy()}

    def noise(draw: int, shape: tuple[int, ...]) -> np.ndarray:
        return randn(*shape, seed=100 + draw).float().numpy()

    cond, uncond = (np.array(values, np.float32) for values in ([1.0, 2.0], [0.0, 0.0]))
    runtime = Runtime(whole, {"denoiser": function}, {}, LatentSpec(3, downscale=1))
    expected = runtime.sample({"cond": cond}, noise=noise, height=5, width=7, negative_prompts={"cond": uncond})
    noises = np.stack([noise(row + 1, SHAPE) for row, step in enumerate(whole.steps) if step.noise])
    state = fused.begin(table, torch.from_numpy(noise(0, SHAPE)), torch.from_numpy(noises))
    both = torch.from_numpy(np.concatenate([uncond, cond]))
    for _ in whole.steps:
        fused.denoise_step(state, network(state.network_input, float(state.timestep), both), mode="reference")
    assert largest_error(state.latent(table.rows), torch.from_numpy(expected)) <= 1e-6


def test_a_finished_run_changes_nothing_and_can_be_begun_again(interpreter: Interpreter) -> None:
    assert interpreter.run(replayed, "denoise_step", mode="triton") == 0.0
    assert replayed(fused, "reference") == 0.0


def replayed(op: ModuleType, mode: str) -> float:
    """The difference between two runs in the same buffers, the first made a row too many."""
    window = np.tril(np.full((3, 2), 0.5))
    table = step_table(window, window, np.ones(3), np.ones(3), np.ones(3), guidance_scale=np.full(3, np.nan))
    outputs = randn(3, *SHAPE, seed=2).float()
    first = randn(*SHAPE, seed=0).float()
    state = op.begin(table, first, randn(3, *SHAPE, seed=1))
    results = []
    for _ in range(2):
        state.restart(first)
        for output in (*outputs, outputs[0]):
            op.denoise_step(state, output, mode=mode)
        assert state.progress.tolist() == [3, 0]
        results.append(state.latent(3).clone())
    return float((results[0] - results[1]).abs().max())


def test_what_a_table_cannot_hold_is_refused() -> None:
    steps = plan().steps
    levels = plan(steps=(replace(steps[0], level=0.5), *steps[1:]))
    with pytest.raises(EngineError, match="changes its size"):
        plan_table(levels)
    gated = plan(steps=(*steps[:2], replace(steps[2], gated=True), *steps[3:]))
    with pytest.raises(EngineError, match="gate"):
        plan_table(gated)
    with pytest.raises(EngineError, match="mean of the guidance halves"):
        plan_table(plan(slots={"kept": Slot("out", "output", history=2, halves="mean")}))
    twice = plan(slots={name: Slot("out", "output") for name in ("kept", "other")})
    with pytest.raises(EngineError, match="in 2"):
        plan_table(replace(twice, steps=(*steps[:2], replace(steps[2], read={"kept": (1.0,), "other": (1.0,)}))))


def test_what_does_not_fit_is_refused_in_one_sentence() -> None:
    numbers: dict[str, Any] = {
        **{name: np.ones((2, 1)) for name in ("x", "m")},
        **{name: np.ones(2) for name in ("noise", "timestep", "input_scale", "guidance_scale")},
    }
    table = step_table(**numbers)
    with pytest.raises(KernelError, match="every coefficient for each"):
        step_table(**{**numbers, "noise": np.ones(3)})
    with pytest.raises(KernelError, match="not finite"):
        step_table(**{**numbers, "x": np.full((2, 1), np.inf)})
    with pytest.raises(KernelError, match="before the first row"):
        step_table(**{**numbers, "m": np.ones((2, 2))})
    with pytest.raises(KernelError, match="row 0 forecasts from 1 network outputs, 0 were kept"):
        step_table(**numbers, forecast=[(1.0,), ()], keep=[False, True])
    first = torch.zeros(SHAPE)
    with pytest.raises(KernelError, match="none is given"):
        fused.begin(table, first)
    state = fused.begin(table, first, torch.zeros(2, *SHAPE))
    with pytest.raises(KernelError, match="the network output must be"):
        fused.denoise_step(state, torch.zeros(SHAPE))
