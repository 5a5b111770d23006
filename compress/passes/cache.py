"""The `cache` pass: deep features are computed at some network calls and forecast at the others."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Annotated, ClassVar, Literal, get_args

from annotated_types import Ge, Interval
from typing_extensions import override

from compress.errors import PassError, RefusedError
from compress.passes.base import Edit, Pass, PassContext
from export.step_plan import Segment, Step, StepPlan, StepPlanError

if TYPE_CHECKING:
    from compress.model.latent_diffusion import LatentDiffusion
    from export.target import Target

Method = Literal["deepcache"]
Forecast = Literal["reuse", "taylor1"]

_HISTORY: dict[Forecast, int] = {"reuse": 1, "taylor1": 2}


@dataclass(frozen=True)
class Cache(Pass):
    """Cut the denoiser once, and run its deep segment at a uniform interval only.

    Attributes:
        cut: where; `compress inspect` lists the cuts of a model. For a UNet, cut k is branch k of DeepCache; for a
            transformer, the number of leading blocks that always run.
        interval: network calls from one full call to the next.
        method: which segments are skipped; `deepcache` skips everything below one cut.
        forecast: what stands for the skipped features: the last ones (`reuse`), or their line through the last two
            full calls (`taylor1`; TaylorSeer, Liu et al. 2025, arXiv 2503.06923, order 1).
        warmup: full calls at the start; by default as many as the forecast looks back to.
        damping: factor on the slope of `taylor1`.
    """

    name: ClassVar[str] = "cache"
    paper: ClassVar[str] = "DeepCache, Ma et al. 2023, arXiv 2312.00858"
    needs: ClassVar[frozenset[str]] = frozenset()
    changes: ClassVar[frozenset[str]] = frozenset({"graph", "plan"})

    cut: Annotated[int, Ge(0)]
    interval: Annotated[int, Ge(2)]
    method: Method = "deepcache"
    forecast: Forecast = "reuse"
    warmup: Annotated[int, Ge(1)] | None = None
    damping: Annotated[float, Interval(ge=0.0, le=2.0)] = 1.0

    @override
    def plan(self, model: LatentDiffusion, targets: Sequence[Target]) -> list[Edit]:
        cached = self._rewritten(model)
        info = model.family.cut_info(model.denoiser, self.cut)
        shallow = [row for row, step in enumerate(cached.steps) if step.path == "shallow"]
        saved = len(shallow) / cached.network_calls * (1.0 - info.macs_share)
        size = sum(parameter.numel() * parameter.element_size() for parameter in model.denoiser.parameters())
        why = (
            f"cut {self.cut}, at {info.name}: {len(shallow)} of {cached.network_calls} calls run the shallow path, "
            f"which has {info.macs_share:.1%} of the MACs; {saved:.1%} of all MACs are saved"
        )
        edits = [Edit(self.name, "denoiser", "cut", size, size, why)]
        for row in shallow:
            alphas = ", ".join(f"{alpha:.4g}" for alpha in cached.steps[row].read["deep"])
            edits.append(Edit(self.name, f"step {row}", "shallow", 0, 0, f"reads the cached features times {alphas}"))
        return edits

    @override
    def apply(self, model: LatentDiffusion, edits: Sequence[Edit], context: PassContext) -> None:
        model.step_plan = self._rewritten(model)
        model.layout = model.family.cut_layout(model.denoiser, self.cut)

    @override
    def check(self, model: LatentDiffusion, edits: Sequence[Edit]) -> None:
        planned = {edit.module for edit in edits if edit.action == "shallow"}
        if model.layout != model.family.cut_layout(model.denoiser, self.cut) or model.step_plan is None:
            raise PassError(f"the model is not cut at {self.cut} as planned")
        found = {f"step {row}" for row, step in enumerate(model.step_plan.steps) if step.path == "shallow"}
        if found != planned:
            raise PassError(f"{len(found)} network calls run the shallow path, but {len(planned)} were planned")
        segments = {segment.name: Segment(segment.inputs, segment.outputs) for segment in model.segments()}
        if segments != model.step_plan.segments:
            raise PassError("the step plan names other segments than the model has")
        try:
            model.step_plan.validate(model.family.conditioning)
        except StepPlanError as error:
            raise PassError(f"the rewritten step plan is not valid: {error}") from error

    def _rewritten(self, model: LatentDiffusion) -> StepPlan:
        """The model's step plan over the segments of the cut, its rows full or shallow."""
        plan = _uncached(model)
        self._check_fields(plan.network_calls)
        segments, paths, slots = model.family.segments(
            model.denoiser, model.family.cut_layout(model.denoiser, self.cut)
        )
        history = _HISTORY[self.forecast]
        return replace(
            plan,
            segments={segment.name: Segment(segment.inputs, segment.outputs) for segment in segments},
            paths=paths,
            slots={name: replace(slot, history=history) for name, slot in slots.items()},
            steps=tuple(self._rows(plan.steps, *slots)),
        )

    def _rows(self, steps: Sequence[Step], slot: str) -> list[Step]:
        rows, full = [], self.full_calls(len(steps))
        for row, step in enumerate(steps):
            if row in full:
                rows.append(replace(step, path="full", write=(slot,)))
            else:
                done = [call for call in full if call < row]
                rows.append(replace(step, path="shallow", read={slot: self.coefficients(row, done)}))
        return rows

    def full_calls(self, calls: int) -> list[int]:
        """The rows that run the full path: the warm-up, then every `interval`-th."""
        warmup = self._warmup
        return [row for row in range(calls) if row < warmup or (row - warmup + 1) % self.interval == 0]

    def coefficients(self, row: int, full: Sequence[int]) -> tuple[float, ...]:
        """Forecast coefficients at `row` over the features of the `full` calls before it, newest first.

        Taylor-1 at distance k from the last full call, which came g after the one before: (1 + d k/g, -d k/g).
        """
        if self.forecast == "reuse" or len(full) < _HISTORY["taylor1"]:
            return (1.0,)
        slope = self.damping * (row - full[-1]) / (full[-1] - full[-2])
        return 1.0 + slope, -slope

    @property
    def _warmup(self) -> int:
        return _HISTORY[self.forecast] if self.warmup is None else self.warmup

    def _check_fields(self, calls: int) -> None:
        for key, value, known in (
            ("method", self.method, get_args(Method)),
            ("forecast", self.forecast, get_args(Forecast)),
        ):
            if value not in known:
                raise RefusedError(f"cache: {key} {value!r} is unknown; known are {', '.join(known)}")
        if self.interval < 2:
            raise RefusedError(f"cache: interval is {self.interval}; below 2 nothing is cached, so leave the pass out")
        if self._warmup < 1:
            raise RefusedError(f"cache: warmup is {self.warmup}; the first call must be full, so give at least 1")
        if not 0.0 <= self.damping <= 2.0:
            raise RefusedError(f"cache: damping is {self.damping}; it must be from 0 (reuse) to 2")
        if len(self.full_calls(calls)) == calls:
            raise RefusedError(
                f"cache: with {calls} network calls, {self._warmup} of them warm-up, none is left to skip: "
                "take more sampling steps or a shorter warmup"
            )


def _uncached(model: LatentDiffusion) -> StepPlan:
    """The plan of a compiled sampler that nothing has cached yet."""
    if model.step_plan is None:
        raise RefusedError("cache: the model has no step plan; the sampler must be compiled first")
    if model.layout is not None or model.step_plan.slots:
        raise RefusedError("cache: the model is cached already; use one cache pass")
    return model.step_plan
