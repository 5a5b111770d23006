"""Toy denoisers of NumPy functions, random plans over them, and a plain loop, one sample at a time, to compare with."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from export.noise import INITIAL, noise
from export.program import PartFunction
from export.resample import RISE, resample
from export.runtime import LatentSpec, Runtime
from export.step_plan import Segment, Slot, Step, StepPlan

SEGMENTS = {
    "entry": Segment(("sample", "timestep", "label"), ("skip",)),
    "deep": Segment(("skip", "label"), ("up",)),
    "exit": Segment(("up", "skip"), ("out",)),
}
PATHS = {"full": ("entry", "deep", "exit"), "shallow": ("entry", "exit")}
SLOTS = {
    "feature": Slot("up", history=3),
    "residual": Slot("up", "residual", base="skip", history=2),
    "output": Slot("out", "output", history=2),
}
SHAPE = (4, 8, 8)


def _wide(value: np.ndarray) -> np.ndarray:
    return value.reshape(len(value), 1, 1, 1)


def entry(tensors: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    return {"skip": np.tanh(tensors["sample"] * (1 + _wide(tensors["timestep"]) / 7) + tensors["label"])}


def deep(tensors: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    return {"up": np.sin(3 * tensors["skip"] - tensors["label"])}


def leave(tensors: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    return {"out": tensors["up"] * np.float32(1.25) - tensors["skip"] * np.float32(0.5)}


FUNCTIONS: dict[str, PartFunction] = {"entry": entry, "deep": deep, "exit": leave}

# A denoiser whose decoder takes the timestep, but not the latent.
SPLIT_SEGMENTS = {
    "encoder": Segment(("sample", "label"), ("mid",)),
    "embed": Segment(("timestep", "label"), ("emb",)),
    "decoder": Segment(("mid", "emb"), ("out",)),
}
SPLIT_PATHS = {"full": ("encoder", "embed", "decoder"), "decoder": ("embed", "decoder")}
SPLIT_SLOTS = {"mid": Slot("mid", history=3), "mid_emb": Slot("mid", "residual", base="emb", history=2)}


def encode(tensors: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    return {"mid": np.tanh(2 * tensors["sample"] + tensors["label"])}


def embed(tensors: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    return {"emb": np.cos(_wide(tensors["timestep"]) / np.float32(3) + tensors["label"])}


def decode(tensors: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    return {"out": tensors["mid"] * (tensors["emb"] + np.float32(0.5))}


SPLIT_FUNCTIONS: dict[str, PartFunction] = {"encoder": encode, "embed": embed, "decoder": decode}


def given(samples: int) -> tuple[np.ndarray, np.ndarray]:
    """Conditional and unconditional labels, each sample's another."""
    labels = np.linspace(-1, 1, 2 * samples, dtype=np.float32).reshape(2, samples, 1, 1, 1)
    return labels[0], labels[1]


def counting(functions: Mapping[str, PartFunction], calls: list[tuple[str, int]]) -> dict[str, PartFunction]:
    """The same functions, which note (segment, batch size) of every call."""

    def noting(name: str, function: PartFunction) -> PartFunction:
        def call(tensors: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
            calls.append((name, len(next(value for value in tensors.values() if np.ndim(value)))))
            return function(tensors)

        return call

    return {name: noting(name, function) for name, function in functions.items()}


def over_numpy(plan: StepPlan, functions: Mapping[str, PartFunction] = FUNCTIONS, **more: Any) -> Runtime:
    return Runtime(plan, functions, {}, LatentSpec(SHAPE[0], downscale=1), **more)


def sampled(runtime: Runtime, seeds: Sequence[int], which: Sequence[int] | None = None, **more: Any) -> np.ndarray:
    """Sample with the labels of `given`, only some of the samples if asked to."""
    labels, negative = given(len(seeds))
    chosen = list(range(len(seeds))) if which is None else list(which)
    return runtime.sample(
        {"label": labels[chosen]},
        [seeds[at] for at in chosen],
        *SHAPE[1:],
        negative_prompts={"label": negative[chosen]},
        **more,
    )


def random_update(rng: np.random.Generator, row: int, reach: int | None = None) -> dict[str, Any]:
    """Fields of a step: coefficients over a few lags, scales and noise."""
    lags = [lag for lag in range(min((row if reach is None else reach) + 1, 4)) if rng.random() < 0.6]
    guided = bool(rng.random() < 0.5)
    return {
        "t": float(rng.integers(0, 9)),
        "x": {lag: float(rng.normal() / 2) for lag in lags},
        "m": {lag: float(rng.normal() / 2) for lag in {0, *lags}},
        "noise": float(rng.choice([0.0, 0.1])),
        "input_scale": float(rng.uniform(0.5, 1)),
        "guidance": "cfg" if guided else "none",
        "guidance_scale": 2.5 if guided else 1.0,
    }


def random_plan(seed: int, rows: int = 12) -> StepPlan:
    """Rows that run the full path or read one slot, of all kinds, with one to three coefficients."""
    rng = np.random.default_rng(seed)
    written = dict.fromkeys(SLOTS, 0)
    steps = []
    for row in range(rows):
        readable = [name for name in SLOTS if written[name]]
        read: dict[str, tuple[float, ...]] = {}
        write: tuple[str, ...] = ()
        path = "full"
        if readable and rng.random() < 0.6:
            name = str(rng.choice(readable))
            count = int(rng.integers(1, min(written[name], SLOTS[name].history) + 1))
            read = {name: (1.0,) if count == 1 and rng.random() < 0.5 else tuple(rng.normal(size=count).tolist())}
            path = "shallow"
        if not read:
            write = tuple(name for name in SLOTS if rng.random() < 0.6)
        elif "output" not in read and rng.random() < 0.3:
            write = ("output",)
        for name in write:
            written[name] += 1
        steps.append(Step(path=path, write=write, read=read, **random_update(rng, row)))
    return StepPlan(SEGMENTS, PATHS, SLOTS, tuple(steps), init_noise_sigma=1.5)


def unguided(plan: StepPlan) -> StepPlan:
    return replace(plan, steps=tuple(replace(step, guidance="none", guidance_scale=1.0) for step in plan.steps))


def plain_loop(
    plan: StepPlan,
    labels: np.ndarray,
    negative: np.ndarray,
    seeds: Sequence[int],
    functions: Mapping[str, PartFunction] = FUNCTIONS,
    gates: list[dict[int, float]] | None = None,
) -> np.ndarray:
    """What a plan means, told as plainly as possible: every sample alone, both halves at every row, the same rounding.

    Every half has slots of its own, and every latent and output is kept. `gates` gains, per sample, the values that
    its gate compared.
    """
    return np.concatenate(
        [
            _plain_sample(plan, {"cond": labels[at : at + 1], "uncond": negative[at : at + 1]}, seed, functions, gates)
            for at, seed in enumerate(seeds)
        ]
    )


def _plain_sample(
    plan: StepPlan,
    labels: Mapping[str, np.ndarray],
    seed: int,
    functions: Mapping[str, PartFunction],
    gates: list[dict[int, float]] | None,
) -> np.ndarray:
    level = plan.steps[0].level
    first = np.float32(plan.init_noise_sigma) * noise([seed], INITIAL, _at_level(level))
    latents, outputs = [first], []
    kept: dict[str, dict[str, list[np.ndarray]]] = {half: {name: [] for name in plan.slots} for half in labels}
    reference: dict[str, np.ndarray] = {}
    run, total, judged = 0, 0.0, {}
    for row, step in enumerate(plan.steps):
        if step.level > level:
            level = step.level
            z = noise([seed], RISE + row, _at_level(level))
            latents = [np.float32(step.signal) * resample(latents[-1], z.shape[2:]) + np.float32(step.sigma) * z]
            outputs = []
        inputs = {
            half: {
                "sample": latents[-1] * np.float32(step.input_scale),
                "timestep": np.full(1, step.t, np.float32),
                "label": label,
            }
            for half, label in labels.items()
        }
        full = not step.read and not step.gated and step.path == "full"
        if plan.gate is not None:
            whole = {half: _run(plan, "full", tensors, {}, functions) for half, tensors in inputs.items()}
            halves = ("uncond", "cond") if step.guidance != "none" else ("cond",)
            now = {half: whole[half][plan.gate.tensor] for half in labels}
            if step.gated or (reference and not full and plan.gate.reference == "previous"):
                moved = sum(float(np.abs(now[h] - reference[h]).sum(dtype=np.float64)) for h in halves)
                size = sum(float(np.abs(reference[h]).sum(dtype=np.float64)) for h in halves)
                value = 0.0
                for coefficient in plan.gate.polynomial:
                    value = value * (moved / size) + coefficient
                if plan.gate.reference == "previous":
                    value += total
                total = value
            if step.gated:
                judged[row] = value
                full = not (value < plan.gate.threshold and run < plan.gate.max_run)
            if full or plan.gate.reference == "previous":
                reference = now
            run, total = (0, 0.0) if full else (run + 1, total)
        by_half = {}
        for half, tensors in inputs.items():
            slots = kept[half]
            forecast = {
                name: sum(np.float32(alpha) * slots[name][-1 - at] for at, alpha in enumerate(alphas))
                for name, alphas in step.read.items()
            }
            path = "full" if full else step.path
            computed = _run(plan, path, tensors, {} if full else forecast, functions)
            by_half[half] = computed[plan.output]
            for name in slots if step.gated and full else step.write:
                slot = plan.slots[name]
                value_kept = computed[slot.tensor] if slot.base is None else computed[slot.tensor] - computed[slot.base]
                if step.gated:
                    slots[name][-1] = value_kept
                else:
                    slots[name].append(value_kept)
        uncond, cond = by_half["uncond"], by_half["cond"]
        outputs.append(uncond + np.float32(step.guidance_scale) * (cond - uncond) if step.guidance != "none" else cond)
        after = np.zeros(latents[-1].shape)
        for lag, a in step.x.items():
            after += a * latents[-1 - lag].astype(np.float64)
        for lag, b in step.m.items():
            after += b * outputs[-1 - lag].astype(np.float64)
        if step.noise:
            after += step.noise * noise([seed], row + 1, _at_level(level)).astype(np.float64)
        if step.initial:
            after += step.initial * first.astype(np.float64)
        latents.append(after.astype(np.float32))
    if gates is not None:
        gates.append(judged)
    return latents[-1]


def _at_level(level: float) -> tuple[int, ...]:
    return SHAPE[0], round(SHAPE[1] * level), round(SHAPE[2] * level)


def _run(
    plan: StepPlan,
    path: str,
    inputs: Mapping[str, np.ndarray],
    forecast: Mapping[str, Any],
    functions: Mapping[str, PartFunction],
) -> dict[str, np.ndarray]:
    tensors = dict(inputs)
    waiting = dict(forecast)
    for name in waiting:
        if plan.slots[name].kind == "output":
            return {plan.output: waiting[name]}
    for segment in plan.paths[path]:
        for name in list(waiting):
            slot = plan.slots[name]
            if slot.tensor in plan.segments[segment].inputs:
                value = waiting.pop(name)
                tensors[slot.tensor] = value if slot.base is None else tensors[slot.base] + value
        tensors.update(functions[segment](tensors))
    return tensors
