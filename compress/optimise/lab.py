"""The laboratory: candidates run on the exported graphs, timed and compared with the uncached run of the same noise."""

from __future__ import annotations

import functools
import statistics
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from compress.caching.method import Forecast, cached_steps, rows_on
from compress.engine.export_engine import export_engine
from compress.errors import RefusedError
from compress.families.base import SHALLOW
from compress.measure.metrics import latent_peak, psnr_per_sample
from compress.optimise.candidate import Candidate, fewer_steps
from compress.optimise.fitting import fitted, targets_of, thinned
from compress.optimise.points import EMPHASES, best_points, point_errors
from compress.optimise.trajectory import Trajectory, watched
from compress.sampler import compile_sampler
from export.backends import available
from export.engine import Engine
from export.step_plan import Segment, StepPlan

if TYPE_CHECKING:
    from collections.abc import Iterable

    from compress.families import Layout
    from compress.model.latent_diffusion import LatentDiffusion
    from compress.passes.base import PassContext
    from export.runtime import Runtime

MOST, LEAST = 32, 4
"""Calibration noises: as many, unless the model is slow."""
RUNS = 0.5
"""Of the search's time: what one uncached run of all of them may take, one thread and one picture at a time."""
HELD_OUT = 1 << 20
"""Seeds of the held-out noises begin so far above those of calibration."""
ROUNDS = 9
_CALLS = 6


@dataclass(frozen=True)
class Times:
    """Milliseconds of one network call of one picture, one thread: the full path and the cached one."""

    full: float
    cached: float


@dataclass
class Bench:
    """One cut, exported.

    Attributes:
        layout: of the cut; None is uncut.
        runtime: over its graphs, as many threads as there are.
        times: of its paths.
    """

    layout: Layout | None
    runtime: Runtime
    times: Times


@dataclass
class Lab:
    """Everything candidates are judged with.

    Attributes:
        model: with its compiled sampler, uncached.
        plan: of that sampler.
        benches: cut -> its graphs; None is uncut.
        prompts, height, width: of the pictures.
        seed: of the calibration noises.
        samples: calibration noises; candidates that are not promising are judged on a quarter of them.
        compiled: calls -> the sampler compiled for them.
        references: noises -> what the whole run makes of them.
        fits: candidate -> its plan, fitted on all calibration noises.
    """

    model: LatentDiffusion
    plan: StepPlan
    benches: dict[int | None, Bench]
    prompts: Sequence[str]
    height: int
    width: int
    seed: int = 0
    samples: int = MOST
    compiled: dict[int, StepPlan] = field(default_factory=dict)
    references: dict[tuple[int, int], np.ndarray] = field(default_factory=dict)
    fits: dict[Candidate, StepPlan] = field(default_factory=dict)

    @property
    def full_ms(self) -> float:
        """Milliseconds of the whole uncached run."""
        return self.benches[None].times.full * self.plan.network_calls

    @property
    def few(self) -> int:
        """Calibration noises for a first look."""
        return max(2, self.samples // 4)

    @property
    def every(self) -> int:
        """Points may be multiples of this: a sampler of order 2 makes trial calls in between."""
        return int(self.plan.key.get("order", 1))

    @property
    def fitting(self) -> bool:
        """Whether updates can be fitted: a run that draws noise on the way leads nowhere in particular."""
        return not any(step.noise for step in self.plan.steps)

    @functools.cached_property
    def trajectory(self) -> Trajectory:
        """The uncached run of the calibration noises."""
        runtime = self.benches[None].runtime.altered(plan=self.plan)
        return watched(lambda see: runtime.sample(*self._noises(self.seed, self.samples), revise=see))

    @functools.cached_property
    def kept_points(self) -> list[list[tuple[int, ...]]]:
        """For every emphasis, the best points of the uncached run by their number, from 1 on."""
        errors = point_errors(self.trajectory, self.every)
        return [best_points(errors, self.trajectory.rows, emphasis) for emphasis in EMPHASES]

    def latency(self, candidate: Candidate) -> float:
        """Milliseconds of a candidate's network calls and updates, from the measured times of its paths."""
        times = self.benches[candidate.cut].times
        return candidate.full_calls * times.full + (candidate.calls - candidate.full_calls) * times.cached

    def sampler(self, calls: int) -> StepPlan:
        """The model's own sampler with another number of network calls, uncached.

        Raises:
            RefusedError: the scheduler does not take so few steps, or none of its numbers of steps makes so many calls.
        """
        if calls not in self.compiled:
            own = self.plan.key
            plan = compile_sampler(
                own["scheduler"],
                self.model.scheduler_config,
                -(-calls // self.every),
                own["guidance_scale"],
                own["guidance_interval"],
                segments=self.plan.segments,
                paths=self.plan.paths,
                options=own.get("options") or {},
            )
            if plan.network_calls != calls:
                raise RefusedError(f"{own['scheduler']} makes {plan.network_calls} network calls, and never {calls}")
            self.compiled[calls] = plan
        return self.compiled[calls]

    def build(self, candidate: Candidate) -> tuple[Layout | None, StepPlan]:
        """The layout and the step plan of a candidate, fitted on all calibration noises where it has points.

        Raises:
            RefusedError: the scheduler does not take its steps.
        """
        layout, plan = self._drawn(candidate)
        if candidate.points is None:
            return layout, plan
        if candidate not in self.fits:
            self._fitted(candidate, self.samples)
        return layout, self.fits[candidate]

    def _fitted(self, candidate: Candidate, samples: int) -> np.ndarray:
        """What a candidate with points makes of the first calibration noises while its updates are fitted on them."""
        _, plan = self._drawn(candidate)
        targets = targets_of(self.trajectory, candidate.points or (), samples)
        runtime = self._runtime(candidate, plan)
        made, plan = fitted(plan, targets, lambda fit: runtime.sample(*self._noises(self.seed, samples), revise=fit))
        if samples == self.samples:
            self.fits[candidate] = plan
        return made

    def _drawn(self, candidate: Candidate) -> tuple[Layout | None, StepPlan]:
        """The layout and the plan before anything is fitted."""
        points = candidate.points
        plan = self.sampler(candidate.calls) if points is None else thinned(self.plan, self.trajectory, points)
        bench = self.benches[candidate.cut]
        if bench.layout is None or all(candidate.full):
            return None, plan
        forecast = Forecast("reuse") if candidate.damping == 0.0 else Forecast("taylor1", damping=candidate.damping)
        slots = {name: replace(slot, history=forecast.history) for name, slot in bench.layout.slots.items()}
        layout = replace(bench.layout, slots=slots)
        chosen = [row for row, full in enumerate(candidate.full) if full]
        rows = range(candidate.calls) if points is None else points

        def at_points(row: int, done: Sequence[int]) -> tuple[float, ...]:
            return tuple(forecast(rows[row], [rows[earlier] for earlier in done]))

        steps = cached_steps(plan.steps, layout, rows_on(chosen, candidate.calls, SHALLOW), at_points)
        return layout, over(self.model, layout, replace(plan, steps=tuple(steps)))

    def _runtime(self, candidate: Candidate, plan: StepPlan) -> Runtime:
        cached = self.benches[candidate.cut].layout is not None and not all(candidate.full)
        return self.benches[candidate.cut if cached else None].runtime.altered(plan=plan)

    def _noises(self, seed: int, samples: int) -> tuple[list[str], list[int], int, int]:
        """Prompts, seeds and size of some noises."""
        prompts = [self.prompts[at % len(self.prompts)] for at in range(samples)]
        return prompts, [seed + at for at in range(samples)], self.height, self.width

    def latents(self, candidate: Candidate, seed: int, samples: int) -> np.ndarray:
        """What a candidate makes of `samples` noises."""
        runtime = self._runtime(candidate, self.build(candidate)[1])
        prompts, seeds, height, width = self._noises(seed, samples)
        parts = [slice(first, first + self.samples) for first in range(0, samples, self.samples)]
        return np.concatenate([runtime.sample(prompts[part], seeds[part], height, width) for part in parts])

    def calibrated(self, candidate: Candidate, samples: int) -> np.ndarray:
        """As `decibels`, on the first calibration noises, and fitted on these alone."""
        if candidate.points is None:
            return self.decibels(candidate, self.seed, samples)
        return _compared(self.trajectory.first(samples)[-1], self._fitted(candidate, samples))

    def decibels(self, candidate: Candidate, seed: int, samples: int) -> np.ndarray:
        """The latent PSNR of every sample against the whole run of the same noise, in dB (samples,)."""
        known = self.references.get((seed, samples))
        if known is None:
            known = self.latents(fewer_steps(self.plan.network_calls), seed, samples)
            self.references[seed, samples] = known
        return _compared(known, self.latents(candidate, seed, samples))


def _compared(known: np.ndarray, made: np.ndarray) -> np.ndarray:
    """The PSNR of every sample, in dB (samples,); zeros where something is not finite."""
    if not np.isfinite(made).all():
        return np.zeros(len(made))
    return psnr_per_sample(known, made, latent_peak(known))


def open_lab(model: LatentDiffusion, cuts: Iterable[int], context: PassContext, folder: Path, seconds: float) -> Lab:
    """Export every cut, and time its paths.

    Args:
        model: with its compiled sampler, uncached; quantization plans are lowered.
        cuts: to consider.
        context: prompts, size, targets and store; the first target that runs here is the one measured on.
        folder: for the graphs; may be deleted when the lab is no longer used.
        seconds: that a search may take; a slow model is judged on fewer noises.

    Raises:
        RefusedError: no target runs here, or there are no prompts.
    """
    plan = model.step_plan
    ready = [row for row in context.targets if available(row.backend)]
    if plan is None or not ready:
        raise RefusedError("cache: optimize measures on a target, and none of the recipe's runs here: install one")
    if not context.prompts:
        raise RefusedError("cache: optimize needs the key calibration, whose prompts it samples")
    layouts = {cut: None if cut is None else model.family.cut_layout(model.denoiser, cut) for cut in (None, *cuts)}
    sizes = {"batch": (1, 1, 2 * MOST), "height": (context.height,) * 3, "width": (context.width,) * 3}
    single: dict[int | None, Runtime] = {}
    runtimes: dict[int | None, Runtime] = {}
    for done, (cut, layout) in enumerate(layouts.items()):
        context.progress("export cuts", done, len(layouts))
        out = folder / ("uncut" if cut is None else f"cut-{cut}")
        changed = replace(model, layout=layout, step_plan=over(model, layout, plan))
        export_engine(changed, ready[:1], sizes, out, store=context.store)
        single[cut] = Engine.open(out, ready[0].name, threads=1, trusted=True).runtime
        runtimes[cut] = Engine.open(out, ready[0].name, trusted=True).runtime
    context.progress("export cuts", len(layouts), len(layouts))
    times = _timed(single, layouts, model, plan, context)
    benches = {cut: Bench(layout, runtimes[cut], times[cut]) for cut, layout in layouts.items()}
    lab = Lab(model, plan, benches, list(context.prompts), context.height, context.width, context.seed)
    lab.samples = int(np.clip(RUNS * seconds * 1e3 / lab.full_ms, LEAST, MOST))
    for done, cut in enumerate(benches):
        context.progress("compile cuts for batches", done, len(benches))
        for samples in (lab.few, lab.samples):
            lab.latents(fewer_steps(3) if cut is None else Candidate((True, True, False), cut), 0, samples)
    return lab


def over(model: LatentDiffusion, layout: Layout | None, plan: StepPlan) -> StepPlan:
    """The plan over the segments of a layout."""
    segments, paths, slots = model.family.segments(model.denoiser, layout)
    table = {segment.name: Segment(segment.inputs, segment.outputs) for segment in segments}
    return replace(plan, segments=table, paths=paths, slots=slots)


def _timed(
    runtimes: Mapping[int | None, Runtime],
    layouts: Mapping[int | None, Layout | None],
    model: LatentDiffusion,
    plan: StepPlan,
    context: PassContext,
) -> dict[int | None, Times]:
    """Time short runs of every cut, all calls full and most cached, all of them in turn."""
    first = plan.steps[0]
    step = replace(first, x={0: first.x.get(0, 1.0)}, m={0: first.m.get(0, 0.0)}, noise=0.0)
    runs: dict[tuple[int | None, str], Runtime] = {}
    for cut, layout in layouts.items():
        bare = replace(over(model, layout, plan), starts={}, steps=(step,) * _CALLS)
        runs[cut, "full"] = runtimes[cut].altered(plan=bare)
        if layout is not None:
            two = replace(layout, slots={name: replace(slot, history=2) for name, slot in layout.slots.items()})
            steps = cached_steps(bare.steps, two, rows_on([0, 1], _CALLS, SHALLOW), Forecast("taylor1"))
            runs[cut, "cached"] = runtimes[cut].altered(plan=replace(over(model, two, bare), steps=tuple(steps)))
    text = runtimes[None].encode(list(context.prompts[:1]))
    taken: dict[tuple[int | None, str], list[float]] = {key: [] for key in runs}
    for turn in range(ROUNDS + 1):
        context.progress("time cuts", turn, ROUNDS + 1)
        for key, runtime in runs.items():
            began = time.perf_counter()
            runtime.sample(text, [0], context.height, context.width)
            if turn:
                taken[key].append((time.perf_counter() - began) * 1e3)
    medians = {key: statistics.median(values) for key, values in taken.items()}
    found = {}
    for cut, layout in layouts.items():
        full = medians[cut, "full"] / _CALLS
        rest = full if layout is None else (medians[cut, "cached"] - 2 * full) / (_CALLS - 2)
        found[cut] = Times(full, max(1e-3, rest))
    return found
