"""The laboratory: candidates run on the exported graphs, timed and compared with the uncached run of the same noise."""

from __future__ import annotations

import statistics
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from compress.caching.method import Forecast, cached_steps, rows_on
from compress.engine.export_engine import export_engine
from compress.errors import RefusedError
from compress.families.base import SHALLOW
from compress.measure.metrics import latent_peak, psnr_per_sample
from compress.optimise.candidate import Candidate, fewer_steps
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

BATCH = 16
WARMED = (8, 16)
"""Batches that graphs are compiled for before anything is searched."""
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
        compiled: (calls, times) -> the sampler compiled for them.
        exact_times: whether the scheduler takes timesteps as they are given.
        references: noises -> what the whole run makes of them.
    """

    model: LatentDiffusion
    plan: StepPlan
    benches: dict[int | None, Bench]
    prompts: Sequence[str]
    height: int
    width: int
    compiled: dict[tuple[int, tuple[float, ...] | None], StepPlan] = field(default_factory=dict)
    exact_times: bool = False
    references: dict[tuple[int, int], np.ndarray] = field(default_factory=dict)

    @property
    def full_ms(self) -> float:
        """Milliseconds of the whole uncached run."""
        return self.benches[None].times.full * self.plan.network_calls

    def latency(self, candidate: Candidate) -> float:
        """Milliseconds of a candidate's network calls and updates, from the measured times of its paths."""
        times = self.benches[candidate.cut].times
        return candidate.full_calls * times.full + (candidate.calls - candidate.full_calls) * times.cached

    def sampler(self, calls: int, times: tuple[float, ...] | None) -> StepPlan:
        """The model's own sampler with other steps, uncached.

        Raises:
            RefusedError: the scheduler does not take them.
        """
        key = (calls, times)
        if key not in self.compiled:
            own = self.plan.key
            order = int(own.get("order", 1))
            options: dict[str, Any] = dict(own.get("options") or {})
            if times is not None:
                options["timesteps"] = list(times)
            self.compiled[key] = compile_sampler(
                own["scheduler"],
                self.model.scheduler_config,
                -(-calls // order),
                own["guidance_scale"],
                own["guidance_interval"],
                segments=self.plan.segments,
                paths=self.plan.paths,
                options=options,
            )
        return self.compiled[key]

    def build(self, candidate: Candidate) -> tuple[Layout | None, StepPlan]:
        """The layout and the step plan of a candidate.

        Raises:
            RefusedError: the scheduler does not take its steps.
        """
        plan = self.sampler(candidate.calls, candidate.times)
        bench = self.benches[candidate.cut]
        if bench.layout is None or all(candidate.full):
            return None, plan
        forecast = Forecast("reuse") if candidate.damping == 0.0 else Forecast("taylor1", damping=candidate.damping)
        slots = {name: replace(slot, history=forecast.history) for name, slot in bench.layout.slots.items()}
        layout = replace(bench.layout, slots=slots)
        chosen = [row for row, full in enumerate(candidate.full) if full]
        steps = cached_steps(plan.steps, layout, rows_on(chosen, candidate.calls, SHALLOW), forecast)
        return layout, over(self.model, layout, replace(plan, steps=tuple(steps)))

    def latents(self, candidate: Candidate, seed: int, samples: int) -> np.ndarray:
        """What a candidate makes of `samples` noises."""
        layout, plan = self.build(candidate)
        runtime = self.benches[candidate.cut if layout is not None else None].runtime.altered(plan=plan)
        made = []
        for first in range(0, samples, BATCH):
            count = min(BATCH, samples - first)
            prompts = [self.prompts[(first + i) % len(self.prompts)] for i in range(count)]
            made.append(runtime.sample(prompts, [seed + first + i for i in range(count)], self.height, self.width))
        return np.concatenate(made)

    def decibels(self, candidate: Candidate, seed: int, samples: int) -> np.ndarray:
        """The latent PSNR of every sample against the whole run of the same noise, in dB (samples,)."""
        known = self.references.get((seed, samples))
        if known is None:
            known = self.latents(fewer_steps(self.plan.network_calls), seed, samples)
            self.references[seed, samples] = known
        made = self.latents(candidate, seed, samples)
        if not np.isfinite(made).all():
            return np.zeros(samples)
        return psnr_per_sample(known, made, latent_peak(known))


def open_lab(model: LatentDiffusion, cuts: Iterable[int], context: PassContext, folder: Path) -> Lab:
    """Export every cut, and time its paths.

    Args:
        model: with its compiled sampler, uncached; quantization plans are lowered.
        cuts: to consider.
        context: prompts, size, targets and store; the first target that runs here is the one measured on.
        folder: for the graphs; may be deleted when the lab is no longer used.

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
    sizes = {"batch": (1, 1, 2 * BATCH), "height": (context.height,) * 3, "width": (context.width,) * 3}
    single: dict[int | None, Runtime] = {}
    runtimes: dict[int | None, Runtime] = {}
    for done, (cut, layout) in enumerate(layouts.items()):
        context.progress("export cuts", done, len(layouts))
        out = folder / ("uncut" if cut is None else f"cut-{cut}")
        changed = replace(model, layout=layout, step_plan=over(model, layout, plan))
        export_engine(changed, ready[:1], sizes, out, store=context.store)
        single[cut] = Engine.open(out, ready[0].name, threads=1).runtime
        runtimes[cut] = Engine.open(out, ready[0].name).runtime
    context.progress("export cuts", len(layouts), len(layouts))
    times = _timed(single, layouts, model, plan, context)
    benches = {cut: Bench(layout, runtimes[cut], times[cut]) for cut, layout in layouts.items()}
    lab = Lab(model, plan, benches, list(context.prompts), context.height, context.width)
    for done, cut in enumerate(benches):
        context.progress("compile cuts for batches", done, len(benches))
        for samples in WARMED:
            lab.latents(fewer_steps(2) if cut is None else Candidate((True, True, False), cut), 0, samples)
    lab.exact_times = _takes_times(lab)
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


def _takes_times(lab: Lab) -> bool:
    """Whether timesteps can be given to the scheduler and come back as they are."""
    if int(lab.plan.key.get("order", 1)) != 1:
        return False
    wanted = [step.t for step in lab.sampler(4, None).steps]
    wanted[1] -= 0.25 * (wanted[1] - wanted[2])
    try:
        got = [step.t for step in lab.sampler(4, tuple(wanted)).steps]
    except RefusedError:
        return False
    return bool(np.allclose(got, wanted, rtol=0, atol=0.51))
