"""The `cache` pass: parts of the denoiser are computed at some network calls and forecast at the others."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

from annotated_types import Ge, Interval
from pydantic import BaseModel, ConfigDict, Field
from typing_extensions import override

from compress.errors import PassError, RefusedError
from compress.nearest import listed, unknown
from compress.passes.base import Edit, Pass, PassContext
from export.step_plan import Segment, StepPlan, StepPlanError

if TYPE_CHECKING:
    from compress.caching.method import Cached, Job
    from compress.families import Layout
    from compress.model.latent_diffusion import LatentDiffusion
    from export.target import Target

ForecastName = Literal["reuse", "taylor1", "taylor", "hermite"]
GateName = Literal["static", "dynamic"]
ScheduleName = Literal["uniform", "signed-power"]


class Optimize(BaseModel):
    """A budget for the search of a plan; exactly one of the first two.

    Attributes:
        latency_ratio: network time at most, as a share of the uncached run's.
        psnr_db: latent PSNR against the uncached run at least (mean over held-out noises); the fastest plan wins.
        seconds: of one search, once the graphs are exported and timed.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)
    latency_ratio: float | None = Field(default=None, gt=0.0, lt=1.0)
    psnr_db: float | None = Field(default=None, gt=0.0, le=100.0)
    seconds: float = Field(default=35.0, gt=0.0, le=36000.0)


@dataclass(frozen=True)
class Cache(Pass):
    """Cache by a published method. A field left out takes the default of the method's paper; see `METHODS`.

    Attributes:
        method: a row of `compress.caching.methods.METHODS`.
        optimize: search sampler points, cut, full calls and damping for a budget, in place of a method.
        cut: where; `compress inspect` lists the cuts of a model. For a UNet, cut k is branch k of DeepCache; for a
            transformer, the number of leading blocks that always run.
        interval: network calls from one full call to the next.
        schedule: of DeepCache: `uniform`, or `signed-power` (its non-uniform one), denser by `power` around `center`.
        forecast: what stands for skipped tensors: the last ones (`reuse`), or a polynomial through the last full calls
            (`taylor1`; `taylor` and `hermite` of some `order`).
        damping: factor on the slope of a Taylor forecast; scale of a Hermite one.
        warmup: full calls at the start.
        key_steps: of encoder propagation: a named set, every m-th call, or a list.
        inject: of encoder propagation: how much of the first latent is added in the second half.
        span: of encoder propagation: decoders between key steps run as one batch.
        front, back: leading and trailing transformer blocks outside the cached range.
        boundary: of Delta-DiT: share of the calls before which the rear blocks are cached.
        threshold: of what a cached call may miss, in the method's own measure.
        max_run, max_cached: most cached calls in a row, and in all.
        retention: of MagCache: share of leading calls that are full.
        gate: `static` decides once, in calibration; `dynamic` per sample at run time.
        polynomial: of TeaCache: coefficients, highest power first; fitted in calibration by default.
        cross_interval, timesteps: of PAB: the interval of cross-attention, and between which timesteps it caches.
        gate_share, later_interval: of T-GATE: the share of calls with cross-attention, and the interval of
            self-attention after them.
        level, share: of a low-resolution start: the share of height and width, and of the calls that run at it.
        sigma: of the guidance interval: noise over signal, (low, high], where guidance is on.
    """

    name: ClassVar[str] = "cache"
    paper: ClassVar[str] = "see compress/caching/methods.py"
    needs: ClassVar[frozenset[str]] = frozenset()
    changes: ClassVar[frozenset[str]] = frozenset({"graph", "plan"})

    method: str = "deepcache"
    optimize: Optimize | None = None
    cut: Annotated[int, Ge(0)] | None = None
    interval: Annotated[int, Ge(2)] | None = None
    schedule: ScheduleName | None = None
    center: Annotated[int, Ge(0)] | None = None
    power: Annotated[float, Ge(1.0)] | None = None
    forecast: ForecastName | None = None
    order: Annotated[int, Interval(ge=1, le=4)] | None = None
    damping: Annotated[float, Interval(ge=0.0, le=2.0)] | None = None
    warmup: Annotated[int, Ge(1)] | None = None
    key_steps: str | int | list[int] | None = None
    inject: Annotated[float, Interval(ge=0.0, le=0.1)] | None = None
    span: bool | None = None
    front: Annotated[int, Ge(1)] | None = None
    back: Annotated[int, Ge(0)] | None = None
    boundary: Annotated[float, Interval(ge=0.0, le=1.0)] | None = None
    threshold: Annotated[float, Ge(0.0)] | None = None
    max_run: Annotated[int, Ge(1)] | None = None
    max_cached: Annotated[int, Ge(1)] | None = None
    retention: Annotated[float, Interval(ge=0.0, le=1.0)] | None = None
    gate: GateName | None = None
    polynomial: list[float] | None = None
    cross_interval: Annotated[int, Ge(1)] | None = None
    timesteps: list[float] | None = None
    gate_share: Annotated[float, Interval(gt=0.0, le=1.0)] | None = None
    later_interval: Annotated[int, Ge(1)] | None = None
    level: Annotated[float, Interval(gt=0.0, lt=1.0)] | None = None
    share: Annotated[float, Interval(gt=0.0, lt=1.0)] | None = None
    sigma: list[float] | None = None

    def __post_init__(self) -> None:
        """Check the method's name, and that it knows the fields given.

        Raises:
            RefusedError: begins with the field.
        """
        from compress.caching.methods import METHODS

        if self.method not in METHODS:
            raise RefusedError(f"method: {unknown(self.method, 'a caching method', METHODS)}")
        if self.optimize is not None:
            if given := next(iter(self._given()), None):
                raise RefusedError(
                    f"{given}: is a method's option; optimize searches a plan itself, so give one or none"
                )
            if (self.optimize.latency_ratio is None) == (self.optimize.psnr_db is None):
                raise RefusedError("optimize: give latency_ratio or psnr_db, and not both")
        own = METHODS[self.method].options
        for key in self._given():
            if key not in own:
                raise RefusedError(f"{key}: the method {self.method} has no such option; its own: {listed(own)}")
        for key in ("timesteps", "sigma"):
            pair = getattr(self, key)
            if pair is not None and (len(pair) != 2 or not pair[0] < pair[1]):
                raise RefusedError(f"{key}: {pair} is not [low, high] with low < high")

    def _given(self) -> dict[str, Any]:
        """The options that are set."""
        names = [column.name for column in fields(self) if column.name not in ("method", "optimize")]
        return {name: getattr(self, name) for name in names if getattr(self, name) is not None}

    @property
    def options(self) -> Mapping[str, Any]:
        """The options of the method, its paper's defaults filled in."""
        from compress.caching.methods import METHODS

        return {**METHODS[self.method].options, **self._given()}

    @property
    def calibrated(self) -> bool:
        """Whether calibration decides which calls are full."""
        from compress.caching.methods import METHODS

        return self.optimize is not None or METHODS[self.method].calibrated(self.options)

    @override
    def required(self) -> frozenset[str]:
        return frozenset({"calibration"}) if self.calibrated else self.needs

    @override
    def plan(self, model: LatentDiffusion, targets: Sequence[Target]) -> list[Edit]:
        from compress.caching.methods import METHODS

        job = self._job(model)
        size = sum(parameter.numel() * parameter.element_size() for parameter in model.denoiser.parameters())
        if self.optimize is not None:
            from compress.optimise.optimise import candidate_cuts

            cuts = ", ".join(map(str, candidate_cuts(model)))
            why = (
                f"searched on this machine over cuts {cuts}, about {self.optimize.seconds:.0f} s once they are exported"
            )
            return [Edit(self.name, "denoiser", "optimize", size, size, why)]
        if self.calibrated:
            layout = self._refusing(METHODS[self.method].layout, job)
            why = f"{self.method}{_costs(model, layout)}; which calls take it is decided by calibration"
            return [Edit(self.name, "denoiser", "cut", size, size, why)]
        cached = self._refusing(METHODS[self.method].build, job)
        edits = [Edit(self.name, "denoiser", "cut", size, size, self._summary(model, cached))]
        for row, (before, after) in enumerate(zip(job.plan.steps, cached.steps, strict=True)):
            if after.read:
                edits.append(Edit(self.name, f"step {row}", after.path, 0, 0, _reads(after.read)))
            elif after.level != before.level:
                edits.append(Edit(self.name, f"step {row}", "smaller", 0, 0, f"runs at {after.level:g} of the size"))
            elif after.guidance != before.guidance:
                edits.append(Edit(self.name, f"step {row}", "unguided", 0, 0, "runs the conditional half alone"))
        return edits

    @override
    def apply(self, model: LatentDiffusion, edits: Sequence[Edit], context: PassContext) -> None:
        from compress.caching.methods import METHODS

        job, method = self._job(model), METHODS[self.method]
        if self.optimize is not None:
            from compress.optimise.optimise import Budget, optimise

            budget = Budget(self.optimize.latency_ratio, self.optimize.psnr_db, self.optimize.seconds)
            model.layout, model.step_plan = optimise(model, budget, context)
            return
        if method.recorder is not None and self.calibrated:
            from compress.caching.statistics import collect

            layout = method.layout(job)
            if layout is None:
                raise PassError(f"the method {self.method} has a recorder, but keeps nothing it could watch")
            job = replace(job, statistics=collect(model, layout, method.recorder(job), context))
        cached = self._refusing(method.build, job)
        model.step_plan = _replanned(model, job.plan, cached)
        model.layout = cached.layout

    @override
    def check(self, model: LatentDiffusion, edits: Sequence[Edit]) -> None:
        plan = model.step_plan
        if plan is None:
            raise PassError("the model has no step plan")
        segments = {segment.name: Segment(segment.inputs, segment.outputs) for segment in model.segments()}
        if segments != plan.segments:
            raise PassError("the step plan names other segments than the model has")
        found = {f"step {row}": step.path for row, step in enumerate(plan.steps) if step.read}
        planned = {edit.module: edit.action for edit in edits if edit.module.startswith("step ")}
        reading = {row: path for row, path in planned.items() if path not in ("unguided", "smaller")}
        if not self.calibrated and found != reading:
            raise PassError(f"{len(found)} network calls read from slots, but {len(reading)} were planned")
        if self.optimize is not None and "optimised" not in plan.key:
            raise PassError("no plan was searched")
        if self.calibrated and not found and self.optimize is None:
            raise PassError(f"the method {self.method} cached no network call")
        unguided = [row for row, path in planned.items() if path == "unguided"]
        if any(plan.steps[int(row.removeprefix("step "))].guidance != "none" for row in unguided):
            raise PassError("a network call that was to run without guidance is guided")
        smaller = {f"step {row}" for row, step in enumerate(plan.steps) if step.level < 1.0}
        if smaller != {row for row, path in planned.items() if path == "smaller"}:
            raise PassError(f"{len(smaller)} network calls run at a smaller size, but others were planned")
        try:
            plan.validate(model.family.inputs(model.denoiser))
        except StepPlanError as error:
            raise PassError(f"the rewritten step plan is not valid: {error}") from error

    def _refusing(self, build: Any, job: Job) -> Any:
        try:
            return build(job)
        except RefusedError as error:
            raise RefusedError(f"cache: {error}") from error

    def _job(self, model: LatentDiffusion) -> Job:
        from compress.caching.method import Job

        return Job(model.family, model.denoiser, _uncached(model), self.options)

    def _summary(self, model: LatentDiffusion, cached: Cached) -> str:
        calls = len(cached.steps)
        taken = Counter(step.path for step in cached.steps if step.read)
        if cached.layout is None:
            smaller = sum(step.level < 1.0 for step in cached.steps)
            if smaller:
                return f"{self.method}: {smaller} of {calls} calls run at {cached.steps[0].level:g} of the size"
            unguided = sum(step.guidance == "none" for step in cached.steps)
            return f"{self.method}: {unguided} of {calls} calls run the conditional half alone"
        costs = model.family.path_costs(model.denoiser, cached.layout)
        saved = sum(count * (1.0 - costs[path].macs_share) for path, count in taken.items()) / calls
        runs = ", ".join(
            f"{count} of {calls} calls run the {path} path, which has {costs[path].macs_share:.1%} of the MACs"
            for path, count in taken.items()
        )
        return f"{self.method}{self._place(model)}: {runs}; {saved:.1%} of all MACs are saved"

    def _place(self, model: LatentDiffusion) -> str:
        cut = self.options.get("cut")
        return "" if cut is None else f", cut {cut}, at {model.family.cut_names(model.denoiser)[cut]}"


def _costs(model: LatentDiffusion, layout: Layout | None) -> str:
    """What the cached paths of a layout cost, in words."""
    if layout is None:
        return ""
    costs = model.family.path_costs(model.denoiser, layout)
    shares = [
        f"the {path} path has {costs[path].macs_share:.1%} of the MACs" for path in layout.paths if path != "full"
    ]
    return f": {', '.join(shares)}"


def _reads(read: Mapping[str, Sequence[float]]) -> str:
    """The coefficients of a row: those of its first slot, and how many slots share them."""
    alphas = ", ".join(f"{alpha:.4g}" for alpha in next(iter(read.values())))
    kept = "the cached features" if len(read) == 1 else f"{len(read)} cached tensors"
    return f"reads {kept} times {alphas}"


def _replanned(model: LatentDiffusion, plan: StepPlan, cached: Cached) -> StepPlan:
    """The plan over the segments of the layout."""
    plan = replace(plan, steps=cached.steps, starts=cached.starts)
    if cached.layout is None:
        return plan
    segments, paths, slots = model.family.segments(model.denoiser, cached.layout)
    table = {segment.name: Segment(segment.inputs, segment.outputs) for segment in segments}
    return replace(plan, segments=table, paths=paths, slots=slots, gate=cached.gate)


def _uncached(model: LatentDiffusion) -> StepPlan:
    """The plan of a compiled sampler that nothing has cached yet."""
    if model.step_plan is None:
        raise RefusedError("cache: the model has no step plan; the sampler must be compiled first")
    if model.layout is not None or model.step_plan.slots:
        raise RefusedError("cache: the model is cached already; use one cache pass")
    return model.step_plan
