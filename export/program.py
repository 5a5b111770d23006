"""A step plan with its names looked up: the functions, reads and writes of every row, ready to run."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from export.lineage import Batching, Origin, batching, is_full, origins, rises, watched
from export.plan_rows import Slot, Step
from export.step_plan import StepPlan

PartFunction = Callable[[Mapping[str, np.ndarray]], dict[str, np.ndarray]]
"""Named arrays in, named arrays out. It neither writes to its inputs nor keeps them, nor changes its outputs later."""


@dataclass(frozen=True)
class Read:
    """A slot read: `tensor` becomes the forecast from `slot` (plus the tensor `base` of a residual slot).

    Attributes:
        tensor, base, slot: names.
        alphas: float32 forecast coefficients, newest value first; None where the newest value is taken as it is.
        rows: those that wrote the values, newest first.
        mean: of the guidance halves, where both were written and one runs, the mean is taken.
        copied: the row writes the slot as well, so that the value must not stay where it is.
    """

    tensor: str
    base: str | None
    slot: str
    alphas: tuple[np.float32, ...] | None
    rows: tuple[int, ...]
    mean: bool
    copied: bool


@dataclass(frozen=True)
class Write:
    """A slot write: the value of `tensor` (minus that of `base`).

    Attributes:
        slot, tensor, base: names.
        newest: the row that wrote the newest value so far; None where none did.
    """

    slot: str
    tensor: str
    base: str | None
    newest: int | None


@dataclass(frozen=True)
class Call:
    """One segment: the function, the names of its inputs and outputs, and the reads to do first."""

    function: PartFunction
    inputs: tuple[str, ...]
    reads: tuple[Read, ...]
    outputs: tuple[str, ...]


@dataclass(frozen=True)
class Joined:
    """All segments of a path as one function, which gives fewer of the tensors: see `export.backends.Backend`."""

    function: PartFunction
    outputs: tuple[str, ...]


@dataclass(frozen=True)
class Row:
    """One row of a plan with its names looked up.

    Attributes:
        step: the row itself.
        calls: its segments in order; none where the network output comes from a slot.
        fast: what gives as much as is needed of them, joined where it can be.
        halves: which guidance halves run, and how.
        reads: all slots read.
        late: those of them that no segment waits for.
        writes: what it leaves in slots.
        full: the segments of the full path, which run instead where a slot cannot be read, or a gate says so.
        fills: what the full path can leave in slots.
        span_end: the row after the last one that makes its network call together with this one.
        rise: whether the level is larger than that of the row before.
        watched: how many of `calls` compute the tensor that the gate watches; 0 where they do not.
        is_full: whether the row, as it stands, is a full one that the gate compares with.
    """

    step: Step
    calls: tuple[Call, ...]
    fast: tuple[Call, ...]
    halves: Batching
    reads: tuple[Read, ...]
    late: tuple[Read, ...]
    writes: tuple[Write, ...]
    full: tuple[Call, ...]
    fills: tuple[Write, ...]
    span_end: int
    rise: bool
    watched: int
    is_full: bool

    @property
    def both(self) -> bool:
        """Whether both guidance halves run."""
        return self.halves != "conditional"


def look_up(
    plan: StepPlan, functions: Mapping[str, PartFunction], joined: Mapping[str, Joined] | None = None
) -> list[Row]:
    """Resolve the names of every row. A row that reads an output slot runs no segment.

    Args:
        plan: the plan.
        functions: by segment name.
        joined: by path name.
    """
    full, _ = _calls(plan, plan.paths[plan.full_path], functions, ())
    fillable = _fillable(plan)
    rows: list[Row] = []
    end = 0
    described = zip(plan.steps, origins(plan), batching(plan), rises(plan), strict=True)
    for at, (step, origin, halves, rise) in enumerate(described):
        reads = tuple(_read(name, plan.slots[name], step, origin) for name in step.read)
        skipped = any(plan.slots[name].kind == "output" for name in step.read)
        calls, late = _calls(plan, () if skipped else plan.paths[step.path], functions, reads)
        end = max(end, at + step.span)
        writes = tuple(_write(name, plan.slots[name], origin) for name in step.write)
        whole = None if skipped or late or joined is None else joined.get(step.path)
        row = Row(
            step=step,
            calls=calls,
            fast=calls if whole is None else _joined(plan, calls, writes, whole),
            halves=halves,
            reads=reads,
            late=late,
            writes=writes,
            full=full,
            fills=tuple(_write(name, plan.slots[name], origin) for name in fillable),
            span_end=end,
            rise=rise,
            watched=watched(plan, at),
            is_full=is_full(plan, at),
        )
        rows.append(row)
    return rows


def _calls(
    plan: StepPlan, path: Sequence[str], functions: Mapping[str, PartFunction], reads: tuple[Read, ...]
) -> tuple[tuple[Call, ...], tuple[Read, ...]]:
    """The segments of a path, and the reads that none of them waits for."""
    calls, waiting = [], reads
    for name in path:
        segment = plan.segments[name]
        now = tuple(read for read in waiting if read.tensor in segment.inputs)
        waiting = tuple(read for read in waiting if read not in now)
        calls.append(Call(functions[name], segment.inputs, now, segment.outputs))
    return tuple(calls), waiting


def _joined(plan: StepPlan, calls: tuple[Call, ...], writes: tuple[Write, ...], whole: Joined) -> tuple[Call, ...]:
    """One call for all where nothing in between is wanted: no gate watches, and every read can be done before."""
    made = {name for call in calls for name in call.outputs}
    reads = tuple(read for call in calls for read in call.reads)
    wanted = {plan.output, *(name for write in writes for name in (write.tensor, write.base))}
    if len(calls) < 2 or plan.gate is not None or any(read.base in made for read in reads):
        return calls
    if not wanted & made <= set(whole.outputs):
        return calls
    inputs = dict.fromkeys(name for call in calls for name in call.inputs if name not in made)
    return (Call(whole.function, tuple(inputs), reads, whole.outputs),)


def _fillable(plan: StepPlan) -> list[str]:
    """The slots whose tensor the full path computes, from a base that it knows."""
    produced = {tensor for segment in plan.segments.values() for tensor in segment.outputs}
    computed = {tensor for name in (*plan.once, *plan.paths[plan.full_path]) for tensor in plan.segments[name].outputs}
    return [
        name
        for name, slot in plan.slots.items()
        if slot.tensor in computed and (slot.base in computed or slot.base not in produced)
    ]


def _read(name: str, slot: Slot, step: Step, origin: Origin) -> Read:
    alphas = step.read[name]
    return Read(
        tensor=slot.tensor,
        base=slot.base,
        slot=name,
        alphas=None if alphas == (1.0,) else tuple(np.float32(alpha) for alpha in alphas),
        rows=origin.reads[name],
        mean=slot.halves == "mean",
        copied=name in step.write,
    )


def _write(name: str, slot: Slot, origin: Origin) -> Write:
    return Write(name, slot.tensor, slot.base, origin.newest.get(name))
