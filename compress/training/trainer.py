"""The one training loop of all objectives: AdamW, averaged weights, accumulated gradients, checkpoints, progress."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from compress.errors import PassError, RefusedError
from compress.progress import Progress, silent
from compress.training.checkpoint import Checkpoint, read, write
from compress.training.randomness import generator

CURVE = 100
"""Points of the loss curve that are kept."""
_BETAS = (0.9, 0.99)


class Learnable(Protocol):
    """What is minimised; `compress.training.objective.Objective` is one."""

    def losses(self, random: torch.Generator, batch: int, parts: int) -> list[Callable[[], Tensor]]:
        """The loss of one update in parts of equal weight, each to be called once.

        Args:
            random: every draw of the update comes from here, before the first part is called.
            batch: samples in all parts.
            parts: how many; they add up to the same loss whatever their number.
        """
        ...


@dataclass(frozen=True)
class Schedule:
    """How long and how fast a student learns.

    Attributes:
        updates: in all.
        rate: the largest learning rate; it rises over the first `warmup` share of the updates and falls in a straight
            line to 0 after that.
        batch: samples an update.
        accumulate: parts that a batch is computed in, one after the other.
        warmup: see `rate`.
        average: decay of the averaged weights at most; min(average, (1 + n) / (10 + n)) at update n.
        weight_decay: of AdamW.
        clip: largest norm of a gradient.
        seed: of all random numbers.
        rank: of this process.
        save_seconds: between checkpoints.
    """

    updates: int
    rate: float
    batch: int
    accumulate: int = 1
    warmup: float = 0.05
    average: float = 0.99
    weight_decay: float = 0.0
    clip: float = 1.0
    seed: int = 0
    rank: int = 0
    save_seconds: float = 60.0

    def rate_at(self, step: int) -> float:
        """The learning rate of update `step`, counted from 0."""
        rise = max(1, round(self.warmup * self.updates))
        return self.rate * min((step + 1) / rise, (self.updates - step) / max(1, self.updates - rise))

    def decay_at(self, step: int) -> float:
        """The decay of the averaged weights at update `step`."""
        return min(self.average, (1 + step) / (10 + step))


@dataclass(frozen=True)
class Trained:
    """What came of a run.

    Attributes:
        average: the averaged weights by parameter name.
        curve: (updates done, smoothed loss).
        seconds: of all updates, those before a kill included.
    """

    average: dict[str, Tensor]
    curve: list[tuple[int, float]]
    seconds: float


@dataclass
class _State:
    """What changes from update to update, besides the student."""

    average: dict[str, Tensor]
    done: int = 0
    seconds: float = 0.0
    loss: float = math.nan
    curve: list[tuple[int, float]] = field(default_factory=list)


def train(
    student: nn.Module,
    objective: Learnable,
    schedule: Schedule,
    folder: Path,
    progress: Progress = silent,
    what: str = "train",
) -> Trained:
    """Train every parameter of `student` that wants a gradient, in place.

    A run that is killed and started again with the same arguments ends with the same bits: the checkpoint in `folder`
    holds weights, their average and the moments of AdamW, and random numbers follow from the number of the update.

    Args:
        student: in evaluation mode, so that nothing in it is drawn.
        objective: what is minimised; it calls the student itself.
        schedule: how long and how fast.
        folder: of the checkpoints.
        progress: receives (what, updates done, updates in all).
        what: is being done.

    Raises:
        PassError: the loss is not finite.
        RefusedError: the checkpoint is of another run, or cannot be read.
    """
    parameters = {name: p for name, p in student.named_parameters() if p.requires_grad}
    adam = torch.optim.AdamW(
        parameters.values(), lr=schedule.rate, betas=_BETAS, weight_decay=schedule.weight_decay, foreach=True
    )
    state = _resumed(parameters, adam, schedule, folder)
    progress(what, state.done, schedule.updates)
    began = saved = time.monotonic()
    spent = state.seconds
    for step in range(state.done, schedule.updates):
        for group in adam.param_groups:
            group["lr"] = schedule.rate_at(step)
        adam.zero_grad()
        loss = _backward(objective, schedule, step)
        if not math.isfinite(loss):
            raise PassError(f"{what}: the loss is {loss} at update {step}; give a lower rate")
        nn.utils.clip_grad_norm_(parameters.values(), schedule.clip)
        adam.step()
        _average(state.average, parameters, schedule.decay_at(step))
        state.done = step + 1
        state.loss = loss if math.isnan(state.loss) else state.loss + 0.05 * (loss - state.loss)
        if state.done % max(1, schedule.updates // CURVE) == 0 or state.done == schedule.updates:
            state.curve.append((state.done, state.loss))
        now = time.monotonic()
        state.seconds = spent + now - began
        if now - saved >= schedule.save_seconds or state.done == schedule.updates:
            write(folder, _checkpoint(state, parameters, adam, schedule))
            saved = now
        progress(what, state.done, schedule.updates)
    return Trained(state.average, state.curve, state.seconds)


def _backward(objective: Learnable, schedule: Schedule, step: int) -> float:
    """Add the gradients of one update up; returns its loss."""
    random = generator(schedule.seed, step, schedule.rank)
    total = 0.0
    with torch.enable_grad():
        for part in objective.losses(random, schedule.batch, schedule.accumulate):
            loss = part()
            loss.backward()
            total += float(loss.detach())
    return total


@torch.no_grad()
def _average(average: dict[str, Tensor], parameters: dict[str, nn.Parameter], decay: float) -> None:
    torch._foreach_lerp_(list(average.values()), [parameters[name] for name in average], 1.0 - decay)


def _run(schedule: Schedule) -> dict[str, Any]:
    """What a checkpoint must have been made for; how often it is written does not matter."""
    return {key: value for key, value in asdict(schedule).items() if key != "save_seconds"}


def _checkpoint(
    state: _State, parameters: dict[str, nn.Parameter], adam: torch.optim.AdamW, schedule: Schedule
) -> Checkpoint:
    tensors: dict[str, Tensor] = {}
    for name, parameter in parameters.items():
        tensors[f"weight/{name}"], tensors[f"average/{name}"] = parameter, state.average[name]
        if moments := adam.state.get(parameter):  # a parameter that nothing calls has none
            tensors[f"first/{name}"], tensors[f"second/{name}"] = moments["exp_avg"], moments["exp_avg_sq"]
    facts = {"run": _run(schedule), "seconds": state.seconds, "loss": state.loss, "curve": state.curve}
    return Checkpoint(state.done, tensors, facts)


@torch.no_grad()
def _resumed(parameters: dict[str, nn.Parameter], adam: torch.optim.AdamW, schedule: Schedule, folder: Path) -> _State:
    """The state after the newest checkpoint, loaded into student and optimiser; a fresh one where there is none."""
    state = _State({name: parameter.detach().clone() for name, parameter in parameters.items()})
    found = read(folder)
    if found is None:
        return state
    if found.facts.get("run") != _run(schedule) or {f"weight/{name}" for name in parameters} - set(found.tensors):
        raise RefusedError(f"{folder} holds the checkpoint of another run: delete it, or name another folder")
    for name, parameter in parameters.items():
        parameter.copy_(found.tensors[f"weight/{name}"])
        state.average[name].copy_(found.tensors[f"average/{name}"])
        if f"first/{name}" in found.tensors:
            adam.state[parameter] = {
                "step": torch.tensor(float(found.done)),
                "exp_avg": found.tensors[f"first/{name}"].to(parameter.device),
                "exp_avg_sq": found.tensors[f"second/{name}"].to(parameter.device),
            }
    state.done, state.seconds, state.loss = found.done, float(found.facts["seconds"]), float(found.facts["loss"])
    state.curve = [(int(done), float(loss)) for done, loss in found.facts["curve"]]
    return state
