"""What a caching method is: which layout, which path every row takes, and how it forecasts what it reads."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal, NamedTuple, Protocol

import numpy as np

from compress.caching import forecasts
from compress.errors import RefusedError
from compress.families import Family, Layout, Network
from compress.families.layout import FULL, LayoutPath
from export.step_plan import Gate, Step, StepPlan, Update

ForecastKind = Literal["reuse", "taylor1", "taylor", "hermite"]


@dataclass(frozen=True)
class Forecast:
    """How a row makes a feature of those of the full rows before it.

    Attributes:
        kind: see `compress.caching.forecasts`; `taylor1` is `taylor` of order 1.
        order: of `taylor` and `hermite`.
        damping: of `taylor`; the scale of `hermite`.
    """

    kind: ForecastKind = "reuse"
    order: int = 1
    damping: float = 1.0

    @property
    def history(self) -> int:
        """How many values a slot must keep."""
        return 1 if self.kind == "reuse" else 2 if self.kind == "taylor1" else self.order + 1

    def __call__(self, row: int, done: Sequence[int]) -> tuple[float, ...]:
        """Coefficients over the full rows `done`, newest first."""
        if self.kind == "reuse":
            return forecasts.reuse(row, done)
        if self.kind == "hermite":
            return forecasts.hermite(row, done, self.order, self.damping)
        return forecasts.taylor(row, done, self.history - 1, self.damping)


@dataclass(frozen=True)
class Job:
    """What a method is asked to cache.

    Attributes:
        family, denoiser: the network, in float.
        plan: the compiled sampler, uncached.
        options: the method's own, its defaults filled in.
        statistics: what its recorder gave; None before calibration.
    """

    family: Family
    denoiser: Network
    plan: StepPlan
    options: Mapping[str, Any]
    statistics: Any = None

    @property
    def calls(self) -> int:
        """Rows in all."""
        return self.plan.network_calls

    @property
    def blocks(self) -> int:
        """Equal blocks of the denoiser.

        Raises:
            RefusedError: it has none.
        """
        count = self.family.block_count(self.denoiser)
        if not count:
            self.family.block_slots(self.denoiser, 0, 1)
        return count

    def share_of_blocks(self, share: float) -> int:
        """A number of blocks, at least one and not all of them."""
        return min(max(1, round(share * self.blocks)), self.blocks - 1)


class Recorder(Protocol):
    """Makes statistics of uncached calibration runs.

    Attributes:
        watch: tensors of units it needs to see, beside those of the slots.
        inputs: names it gives to the first inputs of modules -> the paths of these.
    """

    watch: tuple[str, ...]
    inputs: Mapping[str, str]

    def batch(self, rows: Sequence[Mapping[str, np.ndarray]]) -> None:
        """Take the tensors of every row of one batch; both guidance halves where both ran."""
        ...

    def result(self) -> Any:
        """The mean over the batches."""
        ...


class Cached(NamedTuple):
    """What a method makes: the layout (None leaves the graphs as they are), rows, late starts, and perhaps a gate."""

    layout: Layout | None
    steps: tuple[Step, ...]
    starts: Starts
    gate: Gate | None = None


Starts = Mapping[int, tuple[Update, ...]]
"""Rows other than 0 where sampling may begin -> the updates that replace those of the rows from there on."""
Finish = Callable[[Job, Sequence[Step]], Sequence[Step]]


@dataclass(frozen=True)
class Method:
    """One row of the table of methods.

    Attributes:
        paper: where it comes from.
        layout: what is kept; None changes no graph.
        paths: which path every row takes; needs the statistics where there is a recorder.
        options: recipe key -> the paper's default; the keys a user may set.
        recorder: of the statistics it needs; None needs no calibration.
        finish: changes the rows further.
        starts: changes the updates of late starts to go with the rows.
        gate: decides rows at run time, if the options ask for it.
    """

    paper: str
    layout: Callable[[Job], Layout | None]
    paths: Callable[[Job], Sequence[str]]
    options: Mapping[str, Any] = field(default_factory=dict)
    recorder: Callable[[Job], Recorder] | None = None
    finish: Finish | None = None
    starts: Callable[[Job, Sequence[Step]], Starts] | None = None
    gate: Callable[[Job], Gate] | None = None

    def calibrated(self, options: Mapping[str, Any]) -> bool:
        """Whether it needs calibration runs with these options."""
        return self.recorder is not None and options.get("gate", "static") == "static"

    def build(self, job: Job) -> Cached:
        """Rewrite the rows.

        Raises:
            RefusedError: the denoiser or the number of rows cannot take the method.
        """
        layout = self.layout(job)
        forecast = forecast_of(job.options)
        if layout is None:
            steps: Sequence[Step] = job.plan.steps
        else:
            layout = _remembering(layout, forecast.history)
            steps = cached_steps(job.plan.steps, layout, self.paths(job), forecast)
            layout = _trimmed(layout, steps)
        if self.finish is not None:
            steps = self.finish(job, steps)
        gate = None
        if self.gate is not None and job.options.get("gate") == "dynamic":
            gate = self.gate(job)
            steps = [replace(step, gated=bool(step.read)) for step in steps]
        starts = job.plan.starts if self.starts is None else self.starts(job, steps)
        return Cached(layout, tuple(steps), starts, gate)


def forecast_of(options: Mapping[str, Any]) -> Forecast:
    """The forecast that options name; `reuse` where they do not."""
    kind: ForecastKind = options.get("forecast") or "reuse"
    standard = Forecast(kind)
    damping = options.get("damping")
    fallback = 0.5 if kind == "hermite" else standard.damping
    return Forecast(kind, options.get("order") or standard.order, fallback if damping is None else damping)


def cached_steps(
    steps: Sequence[Step], layout: Layout, paths: Sequence[str], forecast: Callable[[int, Sequence[int]], Any]
) -> list[Step]:
    """Let every row take its path: it reads forecasts from what earlier rows kept, and keeps what later ones read.

    Raises:
        RefusedError: a row reads what no row before it has kept.
    """
    done: dict[str, list[int]] = {slot: [] for slot in layout.slots}
    used: set[tuple[str, int]] = set()
    rows = []
    for row, (step, path) in enumerate(zip(steps, paths, strict=True)):
        read = {}
        for slot in layout.paths[path].read:
            if not done[slot]:
                raise RefusedError(f"row {row} would read {slot!r} before any row has kept it: begin with full rows")
            read[slot] = tuple(forecast(row, done[slot]))
            used |= {(slot, at) for at in done[slot][-len(read[slot]) :]}
        write = layout.paths[path].write
        for slot in write:
            done[slot].append(row)
        rows.append(replace(step, path=path, read=read, write=write))
    return [replace(step, write=tuple(s for s in step.write if (s, row) in used)) for row, step in enumerate(rows)]


def spans(steps: Sequence[Step], path: str) -> list[Step]:
    """Let neighbouring rows of a path that depends on no latent run as one batch."""
    lengths = [0] * len(steps)
    first = None
    for row, step in enumerate(steps):
        if step.path != path:
            first = None
        elif first is None or step.guidance != steps[first].guidance or step.read.keys() != steps[first].read.keys():
            first = row
        if first is not None:
            lengths[first] += 1
    return [replace(step, span=max(1, length)) for step, length in zip(steps, lengths, strict=True)]


def rows_on(full: Sequence[int], calls: int, cached: str) -> list[str]:
    """Path per row: `full` in the full rows, `cached` in the others."""
    chosen = set(full)
    return ["full" if row in chosen else cached for row in range(calls)]


def _trimmed(layout: Layout, steps: Sequence[Step]) -> Layout:
    """The layout without the paths no row takes and the slots no row reads."""
    taken = {step.path for step in steps}
    slots = {name: slot for name, slot in layout.slots.items() if any(name in step.read for step in steps)}
    paths = {
        name: LayoutPath(path.read, tuple(slot for slot in path.write if slot in slots))
        for name, path in layout.paths.items()
        if name == FULL or name in taken
    }
    return replace(layout, slots=slots, paths=paths)


def _remembering(layout: Layout, history: int) -> Layout:
    return replace(layout, slots={name: replace(slot, history=history) for name, slot in layout.slots.items()})
