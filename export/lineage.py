"""Which earlier rows every row of a step plan draws on, and which guidance halves must therefore run."""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from export.step_plan import StepPlan

Batching = Literal["conditional", "both", "sequential"]
"""What a row runs: the conditional half alone, both halves as one batch, or one half after the other."""

_GUIDED: Mapping[str, Batching] = {"none": "conditional", "cfg": "both", "cfg_sequential": "sequential"}


@dataclass(frozen=True)
class Origin:
    """Where the slot values before a row come from.

    Attributes:
        reads: slot -> the rows that wrote the values this row reads, newest first; fewer where fewer were written.
        newest: slot -> the row that wrote its newest value, of all slots written since the level last rose.
    """

    reads: Mapping[str, tuple[int, ...]]
    newest: Mapping[str, int]


def rises(plan: StepPlan) -> tuple[bool, ...]:
    """Whether the level of each row is larger than that of the row before."""
    levels = [step.level for step in plan.steps]
    return tuple(row > 0 and level > levels[row - 1] for row, level in enumerate(levels))


def origins(plan: StepPlan) -> list[Origin]:
    """Follow the slots through the plan; they are empty at the first row and wherever the level rises."""
    found = []
    writers: dict[str, deque[int]] = {}
    for row, (step, rise) in enumerate(zip(plan.steps, rises(plan), strict=True)):
        if not row or rise:
            writers = {name: deque(maxlen=max(slot.history, 1)) for name, slot in plan.slots.items()}
        reads = {name: tuple(writers[name])[: len(alphas)] for name, alphas in step.read.items()}
        found.append(Origin(reads, {name: rows[0] for name, rows in writers.items() if rows}))
        for name in step.write:
            writers[name].appendleft(row)
    return found


def is_full(plan: StepPlan, row: int) -> bool:
    """Whether a row runs the whole full path as it stands: no gate decides it, and it reads nothing."""
    step = plan.steps[row]
    return not step.gated and not step.read and plan.paths[step.path] == plan.paths[plan.full_path]


def watched(plan: StepPlan, row: int) -> int:
    """How many segments of a row's path it takes to compute the tensor that the gate watches.

    Returns:
        0 where there is no gate, where the path does not begin with the segments of the full path that compute the
        tensor, or where one of those waits for a slot.
    """
    step = plan.steps[row]
    if plan.gate is None or any(plan.slots[name].kind == "output" for name in step.read):
        return 0
    path = plan.paths[step.path]
    count = next((at for at, name in enumerate(path, start=1) if plan.gate.tensor in plan.segments[name].outputs), 0)
    taken = {tensor for name in path[:count] for tensor in plan.segments[name].inputs}
    late = any(plan.slots[name].tensor in taken for name in step.read)
    return 0 if late or plan.paths[plan.full_path][:count] != path[:count] else count


def batching(plan: StepPlan) -> list[Batching]:
    """What each row runs: both halves where it is guided, or where such a row draws on what it leaves behind."""
    found = [_GUIDED[step.guidance] for step in plan.steps]
    drawn = _drawn(plan)
    for row in reversed(range(len(found))):
        for at in drawn[row] if found[row] != "conditional" else ():
            if found[at] == "conditional":
                found[at] = found[row]
    return found


def _drawn(plan: StepPlan) -> list[set[int]]:
    """The rows whose values each row may draw on: those it reads, and those that a gate may have replaced since."""
    drawn = []
    full = 0
    for row, (step, origin) in enumerate(zip(plan.steps, origins(plan), strict=True)):
        rows = {at for written in origin.reads.values() for at in written}
        if step.gated:
            rows |= {full, *(at for at in range(full, row) if watched(plan, at)), *origin.newest.values()}
        if rows:
            rows |= {at for at in range(min(rows), row) if plan.steps[at].gated}
        drawn.append(rows)
        if is_full(plan, row):
            full = row
    return drawn
