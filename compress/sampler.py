"""Compiles a diffusers scheduler into the rows of a step plan, by running it on basis vectors."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from itertools import product
from typing import Any

import numpy as np
import torch

from compress.errors import RefusedError
from compress.schedulers import (
    NONLINEAR,
    ExactLatent,
    GivenNoise,
    SchedulerSetup,
    exact,
    noise_level,
    plain,
    set_up,
    twin,
)
from export.step_plan import Segment, Slot, Step, StepPlan, Update

MAX_LAG = 16
"""How far back an update may reach; PNDM with its Runge-Kutta warm-up reaches 12 calls back."""

TOLERANCE = 1e-6
"""Largest difference between a row and the scheduler, relative to the largest value of that row."""

_NEGLIGIBLE = 1e-12
_EXACT = 1e-11
_SHORT = 5
_SETTLED = 2


def compile_sampler(
    scheduler_class_name: str,
    scheduler_config: Mapping[str, Any],
    steps: int,
    guidance_scale: float,
    guidance_interval: tuple[float, float] | None = None,
    *,
    segments: Mapping[str, Segment],
    paths: Mapping[str, tuple[str, ...]],
    slots: Mapping[str, Slot] | None = None,
    options: Mapping[str, Any] | None = None,
) -> StepPlan:
    """Turn a scheduler into coefficient rows, one per network call, all on the first path.

    The scheduler is run in float64 with every latent, network output and noise draw a unit vector, and the
    coefficients are read off; a second run on random vectors proves that the update is linear and does not depend
    on the data. Where a scheduler keeps a state of its own, so that its updates reach back without end (UniPC,
    SA-Solver), the smallest window of latents and outputs that reproduces its trajectory is solved for instead.

    Args:
        scheduler_class_name: a class of diffusers.
        scheduler_config: the model's scheduler configuration.
        steps: sampling steps; a second-order sampler calls the network about twice per step.
        guidance_scale: classifier-free guidance (Ho and Salimans 2022, arXiv 2207.12598) is on above 1.
        guidance_interval: (start, stop) as fractions of the network calls; rows not wholly inside run without
            guidance (Kynkaanniemi et al. 2024, arXiv 2404.07724).
        segments: of the denoiser, as the step plan holds them.
        paths: likewise.
        slots: likewise.
        options: of the scheduler's constructor, `set_timesteps` or `step` (see `compress.schedulers.set_up`).

    Raises:
        RefusedError: an unknown scheduler or option, or an update that is not linear; names the option to change.
    """
    what = set_up(scheduler_class_name, scheduler_config, steps, dict(options or {}))
    scheduler = what.build()
    updates, input_scales, read_off = _updates(what, scheduler)
    inside = _guided(len(updates), guidance_scale, guidance_interval)
    path = next(iter(paths))
    rows = []
    for row, update in enumerate(updates):
        signal, sigma = _noise_level(what, scheduler, row)
        rows.append(
            Step(
                t=float(scheduler.timesteps[row]),
                x=update.x,
                m=update.m,
                noise=update.noise,
                input_scale=input_scales[row],
                path=path,
                guidance="cfg" if inside[row] else "none",
                guidance_scale=float(guidance_scale) if inside[row] else 1.0,
                signal=signal,
                sigma=sigma,
            )
        )
    order = int(getattr(scheduler, "order", 1))
    plan = StepPlan(
        segments=dict(segments),
        paths=dict(paths),
        slots=dict(slots or {}),
        steps=tuple(rows),
        starts=_starts(what, scheduler, updates, order, read_off),
        init_noise_sigma=float(getattr(scheduler, "init_noise_sigma", 1.0)),
        prediction=_prediction(scheduler),
        key={
            "scheduler": scheduler_class_name,
            "options": dict(options or {}),
            "steps": steps,
            "order": order,
            "network_calls": len(rows),
            "guidance_scale": float(guidance_scale),
            "guidance_interval": None if guidance_interval is None else list(guidance_interval),
        },
    )
    plan.validate()
    return plan


def _guided(calls: int, scale: float, interval: tuple[float, float] | None) -> list[bool]:
    if not np.isfinite(scale) or scale < 0:
        raise RefusedError(f"the guidance scale must be a finite number of at least 0, not {scale!r}")
    start, stop = interval if interval is not None else (0.0, 1.0)
    if not 0.0 <= start <= stop <= 1.0:
        raise RefusedError(f"the guidance interval is [start, stop] with 0 <= start <= stop <= 1, not {interval!r}")
    margin = 1e-9
    return [scale > 1.0 and k / calls >= start - margin and (k + 1) / calls <= stop + margin for k in range(calls)]


def _prediction(scheduler: Any) -> str:
    declared = scheduler.config.get("prediction_type")
    if declared is not None:
        return {"flow_prediction": "flow"}.get(declared, declared)
    name = type(scheduler).__name__
    if hasattr(scheduler, "scale_noise") or name.startswith("LTX"):
        return "flow"
    return "sample" if name.startswith("CM") else "epsilon"


def _noise_level(what: SchedulerSetup, scheduler: Any, row: int) -> tuple[float, float]:
    try:
        return noise_level(twin(scheduler), row)
    except RefusedError:
        raise
    except Exception as error:
        raise _refusal(what, scheduler, error) from error


class _Run:
    """One run of a scheduler on vectors chosen by the caller.

    Attributes:
        scale: input scale of every call.
        after: the latent after every call, (calls, length).
        drew: whether each call drew noise.
    """

    def __init__(
        self,
        what: SchedulerSetup,
        prepared: Any,
        begin: int,
        calls: int,
        latent: torch.Tensor,
        outputs: torch.Tensor,
        noises: torch.Tensor,
        latents: torch.Tensor | None = None,
        noisy: bool = True,
    ) -> None:
        """Run calls `begin` to `begin + calls`.

        Args:
            what: the scheduler's name and step arguments.
            prepared: the scheduler with its timesteps set; it is copied.
            begin: the first call.
            calls: how many.
            latent: before the first call, (length,).
            outputs: the network output of every call, (calls, length).
            noises: the noise every call would draw, (calls, length).
            latents: the latent before every call, (calls, length); None feeds each result to the next call.
            noisy: whether the scheduler may draw noise; False saves the time of watching for it.
        """
        scheduler = twin(prepared)
        if begin and hasattr(scheduler, "set_begin_index"):
            scheduler.set_begin_index(begin)
        self.scale: list[float] = []
        self.drew = [False] * calls
        after = []
        row = 0

        def draw() -> torch.Tensor:
            if self.drew[row]:
                raise RefusedError(f"{what.name} draws noise twice in one call, which a step plan cannot hold")
            self.drew[row] = True
            return exact(noises[row])

        try:
            with GivenNoise(draw) if noisy else nullcontext():
                for row in range(calls):
                    x = exact(latent if latents is None else latents[row])
                    t = scheduler.timesteps[begin + row]
                    self.scale.append(_input_scale(what, scheduler, x, t))
                    latent = plain(scheduler.step(exact(outputs[row]), t, x, return_dict=False, **what.step)[0])
                    if latent.numel() != x.numel():
                        raise RefusedError(f"{what.name} returns a latent of another shape")
                    if not bool(torch.isfinite(latent).all()):
                        raise RefusedError(f"{what.name} with these options gives values that are not finite")
                    after.append(latent)
        except RefusedError:
            raise
        except Exception as error:
            raise _refusal(what, scheduler, error) from error
        self.after = torch.stack(after).numpy()


def _input_scale(what: SchedulerSetup, scheduler: Any, x: ExactLatent, t: torch.Tensor) -> float:
    if not hasattr(scheduler, "scale_model_input"):
        return 1.0
    result = scheduler.scale_model_input(x, t)
    if result is x:
        return 1.0
    before, scaled = plain(x), plain(result)
    scale = float(scaled @ before) / float(before @ before)
    if not torch.allclose(scaled, scale * before, rtol=0, atol=TOLERANCE * float(before.abs().max())):
        raise RefusedError(f"{what.name} does more to the input of the network than scale it")
    return scale


def _updates(what: SchedulerSetup, scheduler: Any) -> tuple[list[Update], list[float], bool]:
    """All rows, the input scale of each, and whether they were read off; proved on random vectors."""
    calls = len(scheduler.timesteps)
    rows, scale, draws = _read_off(what, scheduler, 0, calls)
    read_off = rows is not None and _reach(rows) < _SHORT
    if not read_off:
        solved = _solve(what, scheduler, 0, calls, draws)
        read_off = solved is None and rows is not None
        rows = solved if solved is not None else rows
    if rows is None:
        raise _refusal(what, scheduler, None)
    _prove(what, scheduler, rows, read_off)
    return rows, scale, read_off


def _reach(rows: Sequence[Update]) -> int:
    return max((lag for row in rows for lag in (*row.x, *row.m)), default=0)


def _prove(what: SchedulerSetup, scheduler: Any, rows: Sequence[Update], free: bool) -> None:
    """Compare the rows with the scheduler on random vectors; `free` gives every call a latent of its own."""
    rng = torch.Generator().manual_seed(0)
    latents, outputs, noises = (3.0 * torch.randn(len(rows), 64, generator=rng, dtype=torch.float64) for _ in range(3))
    run = _Run(what, scheduler, 0, len(rows), latents[0], outputs, noises, latents if free else None)
    given = latents.numpy() if free else np.concatenate([latents[:1].numpy(), run.after[:-1]])
    for row, update in enumerate(rows):
        got = update.noise * noises[row].numpy()
        got = got + sum(a * given[row - lag] for lag, a in update.x.items())
        got = got + sum(b * outputs[row - lag].numpy() for lag, b in update.m.items())
        if not np.abs(got - run.after[row]).max() <= TOLERANCE * np.abs(run.after[row]).max():
            raise _refusal(what, scheduler, None)


def _read_off(
    what: SchedulerSetup, scheduler: Any, begin: int, calls: int, noisy: bool = True
) -> tuple[list[Update] | None, list[float], bool]:
    """Read the rows as responses to unit vectors at every latent, output and noise; None if one reaches too far back.

    Such rows hold whatever happens to a latent between two calls (inpainting blends it).

    Returns:
        The rows, the input scale of every call, and whether any call drew noise.
    """
    unit = torch.eye(3 * calls, dtype=torch.float64)
    latents, outputs, noises = unit[:calls], unit[calls : 2 * calls], unit[2 * calls :]
    run = _Run(what, scheduler, begin, calls, latents[0], outputs, noises, latents, noisy)
    rows = []
    for row, response in enumerate(run.after):
        x, m, z = (_by_lag(part, row) for part in np.split(response, 3))
        if any(lag >= MAX_LAG for lag in (*x, *m)) or any(lag > 0 for lag in z):
            return None, run.scale, any(run.drew)
        rows.append(Update(x, m, z.get(0, 0.0)))
    return rows, run.scale, any(run.drew)


def _by_lag(response: np.ndarray, row: int) -> dict[int, float]:
    """The coefficients of one kind that count, keyed by lag."""
    kept = np.flatnonzero(np.abs(response) > _NEGLIGIBLE * np.abs(response).max())
    return {int(row - at): float(response[at]) for at in kept[::-1]}


def _solve(
    what: SchedulerSetup, scheduler: Any, begin: int, calls: int, noisy: bool, expected: Sequence[Update] = ()
) -> list[Update] | None:
    """Find for every row the fewest latents and outputs whose combination is the scheduler's next latent.

    Where the expected row reproduces it, that is taken.
    """
    unit = torch.eye(1 + 2 * calls, dtype=torch.float64)
    run = _Run(what, scheduler, begin, calls, unit[0], unit[1 : 1 + calls], unit[1 + calls :], None, noisy)
    states = np.concatenate([unit[:1].numpy(), run.after])
    rows = []
    for row in range(calls):
        update = next((update for update in expected[row : row + 1] if _reproduces(update, states, row, calls)), None)
        update = update or _solve_row(states, row, calls)
        if update is None:
            return None
        rows.append(update)
    return rows


def _reproduces(update: Update, states: np.ndarray, row: int, calls: int) -> bool:
    if max((*update.x, *update.m), default=0) > row:
        return False
    got = sum((a * states[row - lag] for lag, a in update.x.items()), np.zeros(states.shape[1]))
    for lag, b in update.m.items():
        got[1 + row - lag] += b
    got[1 + calls + row] += update.noise
    return bool(np.abs(got - states[row + 1]).max() <= _EXACT * np.abs(states[row + 1]).max())


def _solve_row(states: np.ndarray, row: int, calls: int) -> Update | None:
    """Express state `row + 1` by the last few states and outputs and this row's noise, as few as possible.

    Outputs and noises are unit vectors: once the states' coefficients are chosen, the others are what is left over. The
    states' coefficients must explain every coordinate outside the window, a small least-squares problem.
    """
    target = states[row + 1]
    size = np.abs(target).max()
    windows = sorted(product(range(1, _SHORT + 1), repeat=2), key=lambda window: (sum(window), window))
    for tolerance in (_EXACT, TOLERANCE):
        for latents, outputs in windows:
            if max(latents, outputs) > row + 1:
                continue
            free = np.zeros(states.shape[1], bool)
            free[2 + row - outputs : 2 + row] = True
            free[1 + calls + row] = True
            basis = states[row - latents + 1 : row + 1][::-1]
            a = np.linalg.lstsq(basis[:, ~free].T, target[~free], rcond=None)[0]
            left = target - a @ basis
            if np.abs(left[~free]).max() <= tolerance * size:
                m = _by_lag(np.where(free, left, 0.0)[1 : 1 + calls], row)
                x = {lag: float(value) for lag, value in enumerate(a) if abs(value) > _NEGLIGIBLE}
                return Update(x, m, float(left[1 + calls + row]))
    return None


def _starts(
    what: SchedulerSetup, scheduler: Any, updates: Sequence[Update], order: int, read_off: bool
) -> dict[int, tuple[Update, ...]]:
    """For every row where sampling may begin, the updates that differ from the full run's.

    A start that the scheduler itself cannot make is left out.
    """
    starts: dict[int, tuple[Update, ...]] = {}
    noisy = any(update.noise for update in updates)
    for begin in range(order, len(updates), order):
        left = len(updates) - begin
        window = min(left, _reach(updates) + _SETTLED)
        while True:
            try:
                if read_off:
                    rows, _, _ = _read_off(what, scheduler, begin, window, noisy)
                else:
                    rows = _solve(what, scheduler, begin, window, noisy, updates[begin:])
            except RefusedError:
                break
            if rows is None:
                break
            differ = [k for k, row in enumerate(rows) if not _same(row, updates[begin + k])]
            warm_up = 1 + max(differ, default=-1)
            if window == left or window - warm_up >= _SETTLED:
                starts[begin] = tuple(rows[:warm_up])
                break
            window = min(left, 2 * window)
    return starts


def _same(one: Update, other: Update) -> bool:
    return one == other or (
        all(_close(getattr(one, name), getattr(other, name)) for name in ("x", "m"))
        and _close({0: one.noise}, {0: other.noise})
    )


def _close(one: Mapping[int, float], other: Mapping[int, float]) -> bool:
    return all(
        abs(one.get(lag, 0.0) - other.get(lag, 0.0)) <= 1e-9 * max(abs(one.get(lag, 0.0)), abs(other.get(lag, 0.0)))
        for lag in {*one, *other}
    )


def _refusal(what: SchedulerSetup, scheduler: Any, error: Exception | None) -> RefusedError:
    culprits = [option for option in NONLINEAR if scheduler.config.get(option)]
    if culprits:
        return RefusedError(
            f"{what.name} with {' and '.join(f'{option}: true' for option in culprits)} is not linear in the latent; "
            f"set {' and '.join(f'{option}: false' for option in culprits)} in the sampler's options"
        )
    cause = "its update is not linear" if error is None else " ".join(str(error).split()) or type(error).__name__
    return RefusedError(f"{what.name} cannot become a table of coefficients: {cause}; choose another scheduler")
