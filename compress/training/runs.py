"""The data-free latent source: the teacher's own denoising runs, kept on disk by content."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from safetensors.numpy import load_file, save_file
from torch import Tensor

from compress.errors import PassError, RefusedError
from compress.progress import Progress, silent
from export.conditioning import encode, of_size, unconditional
from export.loop import Lags
from export.plan_rows import Step
from export.step_plan import StepPlan

if TYPE_CHECKING:
    from compress.model.latent_diffusion import LatentDiffusion
    from compress.store import Store

CHUNK = 32
"""Runs in one entry of the store: a killed process loses no more than these, and more runs begin where fewer ended."""


@dataclass(frozen=True)
class Runs:
    """What a teacher did with prompts and noises, at some points of its plan and at the end.

    Attributes:
        states: float32 (runs, points + 1, channels, h, w), as the network takes them; the last is the clean latent.
            Of some only that is kept, (runs, 1, channels, h, w).
        times: timestep values of the points (points,).
        signal, sigma: of the points and of the end, 1 and 0, (points + 1,).
        prompts: of every run, rows of `conditioning`, int64 (runs,).
        conditioning: the other inputs of the denoiser by name, a prompt a row.
    """

    states: Tensor
    times: Tensor
    signal: Tensor
    sigma: Tensor
    prompts: Tensor
    conditioning: Mapping[str, Tensor]

    def level(self, at: Tensor) -> tuple[Tensor, Tensor]:
        """Signal and sigma (samples, 1, 1, 1) of some points (samples,)."""
        return self.signal[at].view(-1, 1, 1, 1), self.sigma[at].view(-1, 1, 1, 1)

    def conditioned(self, runs: Tensor) -> dict[str, Tensor]:
        """The conditioning of some runs (samples,)."""
        return {name: rows[self.prompts[runs]] for name, rows in self.conditioning.items()}

    def to(self, device: torch.device) -> Runs:
        """The same on another device."""
        moved = {name: getattr(self, name).to(device) for name in ("states", "times", "signal", "sigma", "prompts")}
        return replace(self, **moved, conditioning={name: rows.to(device) for name, rows in self.conditioning.items()})


@dataclass(frozen=True)
class Asked:
    """What runs are made of.

    Attributes:
        prompts: taken in turn.
        seed: of the first run; every run has the next one.
        count: of runs.
        height, width: of the pictures in pixels.
        batch: runs made at once.
    """

    prompts: Sequence[str]
    seed: int
    count: int
    height: int
    width: int
    batch: int = 8


def teacher_runs(
    model: LatentDiffusion,
    points: Sequence[int],
    asked: Asked,
    store: Store | None = None,
    progress: Progress = silent,
    *,
    ends_only: bool = False,
) -> Runs:
    """Run the model's step plan in float, and keep the latents before some of its rows and the last ones.

    Args:
        model: the teacher with its plan, whatever sampler and guidance that has.
        points: rows of the plan.
        asked: how many runs, and of what.
        store: keeps the runs by content; None computes them anew.
        progress: receives (what, runs, runs in all).
        ends_only: of the latents, keep the last alone.

    Raises:
        RefusedError: there are no prompts.
        PassError: the latents are not finite.
    """
    plan = _plan(model)
    if not asked.prompts:
        raise RefusedError("the teacher's own samples need at least one prompt: give calibration.prompts")
    pieces = []
    state, kept = model.state_hash(), [] if ends_only else list(points)
    for first in range(0, asked.count, CHUNK):
        size = min(CHUNK, asked.count - first)
        progress("sample the teacher", first, asked.count)
        chunk = functools.partial(_states, model, kept, asked, range(first, first + size))
        inputs = {
            "what": "teacher runs",
            "model": state,
            "points": kept,
            "prompts": [asked.prompts[(first + at) % len(asked.prompts)] for at in range(size)],
            "seed": asked.seed + first,
            "size": [asked.height, asked.width],
        }
        pieces.append(chunk() if store is None else store.fetch(inputs, functools.partial(_write, chunk), _read))
    progress("sample the teacher", asked.count, asked.count)
    states = np.concatenate(pieces)
    if not np.isfinite(states).all():
        raise PassError("the teacher's own samples are not finite, so nothing can be learned from them")
    steps = [plan.steps[row] for row in points]
    levels = [level_of(step) for step in steps] + [(1.0, 0.0)]
    conditioning = conditioned(model, asked.prompts, asked.height, asked.width)
    return Runs(
        states=torch.from_numpy(states),
        times=torch.tensor([step.t for step in steps], dtype=torch.float32),
        signal=torch.tensor([signal for signal, _ in levels], dtype=torch.float32),
        sigma=torch.tensor([sigma for _, sigma in levels], dtype=torch.float32),
        prompts=torch.arange(asked.count) % len(asked.prompts),
        conditioning=conditioning,
    )


def level_of(step: Step) -> tuple[float, float]:
    """Signal and sigma of the latent as the network takes it in a row."""
    return step.signal * step.input_scale, step.sigma * step.input_scale


def conditioned(model: LatentDiffusion, prompts: Sequence[str] | None, height: int, width: int) -> dict[str, Tensor]:
    """The denoiser's conditioning tensors of some prompts, or of no prompt (None), a prompt a row.

    Args:
        model: gives tokenizers and text encoders.
        prompts: see above.
        height: of the pictures in pixels.
        width: likewise.
    """
    runtime = model.runtime(simulate=False)
    given = unconditional(1) if prompts is None else list(prompts)
    tensors = encode(model.conditioning, runtime.tokenizers, runtime.functions, given)
    tensors |= of_size(model.conditioning, tensors, len(given), height, width)
    taken = model.family.inputs(model.denoiser)
    return {name: torch.from_numpy(np.ascontiguousarray(tensors[name])) for name in taken if name in tensors}


def _write(chunk: Callable[[], np.ndarray], folder: Path) -> None:
    save_file({"states": chunk()}, folder / "runs.safetensors")


def _read(folder: Path) -> np.ndarray:
    states: np.ndarray = load_file(folder / "runs.safetensors")["states"]
    return states


def _states(model: LatentDiffusion, points: Sequence[int], asked: Asked, runs: range) -> np.ndarray:
    """The states of some runs, float32 (runs, points + 1, channels, h, w)."""
    runtime, made = model.runtime(simulate=False), []
    for begin in range(0, len(runs), asked.batch):
        numbers = runs[begin : begin + asked.batch]
        seen: dict[int, np.ndarray] = {}

        def watch(row: int, step: Step, latents: Lags, outputs: Lags, seen: dict[int, np.ndarray] = seen) -> Step:
            if row in points:
                seen[row] = np.float32(step.input_scale) * latents[0]
            return step

        last = runtime.sample(
            [asked.prompts[number % len(asked.prompts)] for number in numbers],
            [asked.seed + number for number in numbers],
            asked.height,
            asked.width,
            revise=watch,
        )
        made.append(np.stack([*(seen[row] for row in points), last], axis=1))
    return np.concatenate(made)


def _plan(model: LatentDiffusion) -> StepPlan:
    if model.step_plan is None:
        raise PassError("the model has no step plan yet; compile its sampler first")
    return model.step_plan
