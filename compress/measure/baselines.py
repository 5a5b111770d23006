"""What the engine is compared with: the original, the plain runtimes, and fewer steps at equal latency."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

from compress.errors import PassError, RefusedError
from compress.measure.environment import ran
from compress.measure.latency import Contestant, Timing, interleave, torch_threads
from compress.measure.quality import Judge, Quality, Stage, Workload, generate
from compress.progress import Progress, silent
from compress.report.report import Baseline, Latency, Role
from export.runtime import Runtime
from export.step_plan import StepPlanError

if TYPE_CHECKING:
    from compress.measure.original import Pipeline
    from compress.model.latent_diffusion import LatentDiffusion
    from export.step_plan import StepPlan

ORIGINAL = "diffusers pipeline, float32"

Opener = Callable[[str, int], Runtime]
"""Opens (target, threads) -> runtime."""


@dataclass(frozen=True)
class Task:
    """The one picture whose time is taken."""

    prompt: str | int
    height: int
    width: int
    seed: int = 0

    def on(self, runtime: Runtime) -> object:
        """Make it on a runtime, text to pixels."""
        return runtime.generate([self.prompt], [self.seed], self.height, self.width)


@dataclass(frozen=True)
class Contest:
    """The timings at one thread count.

    Attributes:
        threads: of every contestant.
        rows: for the report.
        timings: contestant -> its times.
        equal_steps: `original` or `plain <target>` -> the steps it may take in the engine's time.
    """

    threads: int
    rows: tuple[Latency, ...]
    timings: Mapping[str, Timing]
    equal_steps: Mapping[str, int] = field(default_factory=dict)


@dataclass(frozen=True)
class _Entry:
    name: str
    role: Role
    steps: int
    run: Callable[[], object]


def contest(
    task: Task,
    threads: int,
    pipeline: Pipeline,
    steps: int,
    engines: Sequence[str],
    open_engine: Opener,
    plain: Sequence[str] = (),
    open_plain: Opener | None = None,
    plan_with: Callable[[int], StepPlan] | None = None,
    rounds: int = 15,
    budget_s: float | None = None,
    progress: Progress = silent,
) -> Contest:
    """Time the original, the engine and the baselines in turn, in this process.

    Args:
        task: the picture.
        threads: of every contestant.
        pipeline: the original.
        steps: of the original.
        engines: targets of the engine folder, the one that is picked first.
        open_engine: opens the engine.
        plain: targets of the uncompressed float engine; none leaves the plain runtimes away.
        open_plain: opens the uncompressed engine.
        plan_with: compiles the original's step plan for another number of steps; None leaves "fewer steps" away.
        rounds: timed runs of each.
        budget_s: per timing, see `interleave`.
        progress: receives (what, done, in all).
    """
    entries = [_Entry(ORIGINAL, "original", steps, lambda: pipeline.generate(task.prompt))]
    for name in engines:
        engine = open_engine(name, threads)
        entries.append(_Entry(name, "engine", int(engine.plan.key.get("steps", steps)), _runs(task, engine)))
    floats: dict[str, Runtime] = {}
    if open_plain is not None:
        floats = {name: open_plain(name, threads) for name in plain}
    for name in floats:
        entries.append(_Entry(f"plain {name}", "plain runtime", steps, _runs(task, floats[name])))
    few = max(1, steps // 4)
    probes: dict[str, Callable[[int], Callable[[], object]]] = {}
    if plan_with is not None and steps > 1:
        probes["original"] = lambda n: _pipeline_runs(task, pipeline, n)
        for name, runtime in floats.items():
            probes[f"plain {name}"] = _plan_runs(task, runtime, plan_with)
    extra = [Contestant(f"{name}, {few} steps (probe)", probe(few)) for name, probe in probes.items()]
    what = f"latency, {threads} thread{'s' if threads > 1 else ''}"
    with torch_threads(threads):
        timings = interleave(
            [*(Contestant(e.name, e.run) for e in entries), *extra],
            rounds,
            budget_s=budget_s,
            progress=progress,
            what=what,
        )
        goal = timings[engines[0]].median
        equal: dict[str, int] = {}
        if plan_with is not None:
            for name in probes:
                whole = timings[ORIGINAL if name == "original" else name].median
                fitting = _equal_steps(goal, steps, whole, few, timings[f"{name}, {few} steps (probe)"].median)
                equal[name] = _takeable(fitting, steps, plan_with)
        fewer = [
            _Entry(f"{name}, {n} step{'s' if n > 1 else ''}", "fewer steps", n, probes[name](n))
            for name, n in equal.items()
        ]
        if fewer:
            again = [Contestant(entry.name, entry.run) for entry in fewer]
            timings |= interleave(again, rounds, budget_s=budget_s, progress=progress, what=f"{what}, fewer steps")
    rows = [
        Latency(
            name=entry.name,
            role=entry.role,
            threads=threads,
            steps=entry.steps,
            median=timings[entry.name].median,
            quartiles=timings[entry.name].quartiles,
            runs=len(timings[entry.name].times),
            evidence=ran(),
        )
        for entry in [*entries, *fewer]
    ]
    return Contest(threads, tuple(rows), timings, equal)


def _runs(task: Task, runtime: Runtime) -> Callable[[], object]:
    return lambda: task.on(runtime)


def _pipeline_runs(task: Task, pipeline: Pipeline, steps: int) -> Callable[[], object]:
    short = pipeline.with_steps(steps)
    return lambda: short.generate(task.prompt)


def _plan_runs(
    task: Task, runtime: Runtime, plan_with: Callable[[int], StepPlan]
) -> Callable[[int], Callable[[], object]]:
    return lambda steps: _runs(task, runtime.altered(plan=plan_with(steps)))


def _equal_steps(goal: float, steps: int, whole: float, few: int, short: float) -> int:
    """How many steps fit into `goal` ms, on the straight line through two timed step counts; at least one."""
    per_step = (whole - short) / (steps - few) if steps > few else whole / steps
    if per_step <= 0:
        raise PassError("the timing is too noisy to find the steps of equal latency: fewer steps took longer")
    return min(max(int((goal - (whole - per_step * steps)) / per_step), 1), steps - 1)


def _takeable(steps: int, most: int, plan_with: Callable[[int], StepPlan]) -> int:
    """The first number of steps from `steps` on that the scheduler can take."""
    for count in range(steps, most):
        try:
            plan_with(count)
        except RefusedError:
            continue
        return count
    return most


def plan_with_steps(model: LatentDiffusion, steps: int) -> StepPlan:
    """Compile the model's sampler for another number of steps, over the uncut denoiser.

    Raises:
        RefusedError: the scheduler cannot take so few steps.
    """
    from compress.sampler import compile_sampler
    from export.step_plan import Segment

    if model.step_plan is None:
        raise PassError("the model has no step plan yet; compile its sampler first")
    key = model.step_plan.key
    segments, paths, slots = model.family.segments(model.denoiser, None)
    interval = key.get("guidance_interval")
    plan = compile_sampler(
        key["scheduler"],
        model.scheduler_config,
        steps,
        key["guidance_scale"],
        None if interval is None else (interval[0], interval[1]),
        segments={segment.name: Segment(segment.inputs, segment.outputs) for segment in segments},
        paths=paths,
        slots=slots,
        options=key.get("options"),
    )
    try:
        plan = replace(plan, contract=model.step_plan.contract)
        plan.validate()
    except StepPlanError as error:
        raise RefusedError(str(error)) from error
    return plan


def fewer_steps_quality(
    equal_steps: Mapping[str, int],
    plain: Runtime,
    plan_with: Callable[[int], StepPlan],
    workload: Workload,
    judge: Judge,
    original: Stage,
    judged: Quality,
    progress: Progress = silent,
) -> dict[int, Quality]:
    """Judge the uncompressed model at fewer steps, against the original at all steps from the same noise.

    Args:
        equal_steps: see `Contest`.
        plain: any runtime of the uncompressed model: its pictures do not depend on who computes them.
        plan_with: compiles the step plan.
        workload: what to generate.
        judge: of the quality.
        original: what the original made of it.
        judged: the original's quality.
        progress: receives (what, done, in all).

    Returns:
        Steps -> quality.
    """
    found = {}
    for steps in sorted(set(equal_steps.values())):
        runtime = plain.altered(plan=plan_with(steps))
        name = f"{steps} step{'s' if steps > 1 else ''} of the original"
        stage = generate(runtime, workload, name, progress, allow_flat=True)
        found[steps] = judge.quality(stage, original, judged)
    return found


def baselines(
    contest: Contest,
    quality: Mapping[str, Quality],
    fewer: Mapping[int, Quality],
) -> list[Baseline]:
    """Put every contestant's quality beside its latency.

    Args:
        contest: the timings.
        quality: `original` and engine targets -> quality. The plain runtimes make the original's pictures.
        fewer: see `fewer_steps_quality`.
    """
    rows = []
    for row in contest.rows:
        if row.role == "fewer steps":
            judged = fewer.get(row.steps)
        else:
            judged = quality.get(row.name if row.role == "engine" else "original")
        if judged is None:
            continue
        estimates = judged.estimates
        rows.append(
            Baseline(
                name=row.name,
                role=row.role,
                steps=row.steps,
                threads=row.threads,
                latency_ms=row.median,
                quality={metric: estimate.value for metric, estimate in estimates.items()},
                interval={m: estimate.interval for m, estimate in estimates.items() if estimate.interval is not None},
                samples=max((estimate.n for estimate in estimates.values()), default=0),
            )
        )
    return rows
