"""Checks a step plan: every name resolves, every value read was written, and no row asks for the impossible."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, get_args

from export.lineage import Batching, Origin, batching, is_full, origins, rises, watched
from export.plan_rows import GateReference, GuidanceMode, SlotHalves, SlotKind, Step, StepPlanError, Update

if TYPE_CHECKING:
    from export.step_plan import StepPlan

GATE_TENSORS = ("gate", "gate_full")
"""Names under which a gated row hands its decision to `on_step`; no segment may use them."""


def check(plan: StepPlan, conditioning: Sequence[str] | None, latent_input: str) -> None:
    """Check a plan, see `StepPlan.validate`.

    Raises:
        StepPlanError: one sentence with the row and the cause.
    """
    _check_names(plan)
    _check_once(plan, latent_input)
    _check_slots(plan)
    for row, step in enumerate(plan.steps):
        _check_step(plan, row, step)
    if plan.contract is not None:
        plan.contract.check(plan.prediction, plan.steps)
    _check_levels(plan)
    found = origins(plan)
    for row in range(len(plan.steps)):
        _check_reads(plan, row, found[row], conditioning)
    for start, updates in plan.starts.items():
        _check_start(plan, start, updates)
    _check_gate(plan, found)
    _check_spans(plan, latent_input)


def span_fault(plan: StepPlan, rows: Sequence[int], halves: Sequence[Batching], latent_input: str) -> str | None:
    """Why some rows cannot make their network calls as one batch; None where they can.

    Args:
        plan: checked otherwise.
        rows: following each other.
        halves: of every row of the plan, from `export.lineage.batching`.
        latent_input: the tensor that is the latent.
    """
    first = plan.steps[rows[0]]
    risen = rises(plan)
    if any(plan.slots[name].kind == "output" for name in first.read):
        return "a row that takes its network output from a slot makes no call"
    for row in rows:
        step = plan.steps[row]
        if step.gated:
            return f"step {row} is gated"
        if step.write:
            return f"step {row} writes slot {step.write[0]!r}"
        if step.path != first.path:
            return f"step {row} runs path {step.path!r}, not {first.path!r}"
        if set(step.read) != set(first.read):
            return f"step {row} reads other slots"
        if step.guidance != first.guidance or halves[row] != halves[rows[0]]:
            return f"step {row} batches its guidance halves otherwise"
        if row != rows[0] and risen[row]:
            return f"the level rises at step {row}"
    for name in plan.paths[first.path]:
        if latent_input in plan.segments[name].inputs:
            return f"segment {name!r} of path {first.path!r} takes the latent {latent_input!r}"
    return None


def _check_names(plan: StepPlan) -> None:
    if not plan.steps or not plan.paths:
        raise StepPlanError(f"the plan has no {'steps' if plan.paths else 'paths'}")
    if not math.isfinite(plan.init_noise_sigma):
        raise StepPlanError("init_noise_sigma is not finite")
    for name, segment_io in plan.segments.items():
        if not segment_io.outputs:
            raise StepPlanError(f"segment {name!r} computes nothing")
    for name, segments in plan.paths.items():
        if not segments:
            raise StepPlanError(f"path {name!r} has no segments")
        for segment in segments:
            if segment not in plan.segments:
                raise StepPlanError(f"path {name!r} names the unknown segment {segment!r}")
    for name, segments in plan.paths.items():
        if plan.segments[segments[-1]].outputs[-1] != plan.output:
            raise StepPlanError(f"path {name!r} does not end in the network output {plan.output!r}")


def _check_once(plan: StepPlan, latent_input: str) -> None:
    looped = {name for path in plan.paths.values() for name in path}
    if unknown := sorted({*plan.once} - plan.segments.keys()):
        raise StepPlanError(f"the unknown segment {unknown[0]!r} is to run before the first step")
    for at, name in enumerate(plan.once):
        if name in looped or name in plan.once[:at]:
            raise StepPlanError(
                f"segment {name!r} runs before the first step, so no path may name it, nor `once` twice"
            )
        later = {tensor for other in (*looped, *plan.once[at:]) for tensor in plan.segments[other].outputs}
        for tensor in plan.segments[name].inputs:
            if tensor == latent_input or tensor in later:
                raise StepPlanError(f"segment {name!r} runs before the first step, but takes {tensor!r}")


def _check_slots(plan: StepPlan) -> None:
    produced = {tensor for segment_io in plan.segments.values() for tensor in segment_io.outputs}
    for name, slot in plan.slots.items():
        if slot.tensor not in produced:
            raise StepPlanError(f"slot {name!r} keeps {slot.tensor!r}, which no segment computes")
        if slot.kind not in get_args(SlotKind):
            raise StepPlanError(f"slot {name!r} has the unknown kind {slot.kind!r}")
        if slot.halves not in get_args(SlotHalves):
            raise StepPlanError(f"slot {name!r} gives the unknown halves {slot.halves!r}")
        if (slot.kind == "residual") != (slot.base is not None):
            raise StepPlanError(f"slot {name!r}: a residual slot needs a base tensor, and no other kind has one")
        if slot.history < 1:
            raise StepPlanError(f"slot {name!r} keeps no history")


def _check_step(plan: StepPlan, row: int, step: Step) -> None:
    where = f"step {row}"
    if step.path not in plan.paths:
        raise StepPlanError(f"{where} runs the unknown path {step.path!r}")
    if step.guidance not in get_args(GuidanceMode):
        raise StepPlanError(f"{where} has the unknown guidance {step.guidance!r}")
    numbers = [step.t, step.noise, step.input_scale, step.guidance_scale, step.signal, step.sigma, step.initial]
    numbers += [step.level, *step.x.values(), *step.m.values(), *(a for read in step.read.values() for a in read)]
    if not all(math.isfinite(number) for number in numbers):
        raise StepPlanError(f"{where} holds a number that is not finite")
    if any(lag < 0 or lag > row for lag in (*step.x, *step.m)):
        raise StepPlanError(f"{where} reaches back before the first step")
    for name in step.read:
        if name not in plan.slots:
            raise StepPlanError(f"{where} reads the unknown slot {name!r}")
    if step.write and any(plan.slots[name].kind == "output" for name in step.read):
        raise StepPlanError(f"{where} takes its network output from a slot, so it computes nothing to write")
    produced = {tensor for segment in plan.paths[step.path] for tensor in plan.segments[segment].outputs}
    for name in step.write:
        if name not in plan.slots:
            raise StepPlanError(f"{where} writes the unknown slot {name!r}")
        if plan.slots[name].tensor not in produced:
            raise StepPlanError(f"{where} writes slot {name!r}, but path {step.path!r} does not compute it")
        if step.write.count(name) > 1:
            raise StepPlanError(f"{where} writes slot {name!r} twice")


def _check_levels(plan: StepPlan) -> None:
    risen, origin = 0, False
    for row, (step, rise) in enumerate(zip(plan.steps, rises(plan), strict=True)):
        if not 0.0 < step.level <= 1.0:
            raise StepPlanError(f"step {row} has the level {step.level}, which is not above 0 and at most 1")
        if row and step.level < plan.steps[row - 1].level:
            raise StepPlanError(f"step {row} lowers the level from {plan.steps[row - 1].level} to {step.level}")
        if rise:
            risen, origin = row, True
        if any(lag > row - risen for lag in (*step.x, *step.m)):
            raise StepPlanError(f"step {row} reaches back across the rise of the level at step {risen}")
        if origin and step.initial:
            raise StepPlanError(f"step {row} adds the first latent, which is smaller since the rise at step {risen}")
    if plan.steps[-1].level != 1.0:
        raise StepPlanError(f"the last step has the level {plan.steps[-1].level}, but a run ends at level 1")


def _check_reads(plan: StepPlan, row: int, origin: Origin, conditioning: Sequence[str] | None) -> None:
    step = plan.steps[row]
    where = f"step {row}"
    for name, alphas in step.read.items():
        held = len(origin.reads[name])
        if not alphas or held < len(alphas):
            raise StepPlanError(f"{where} reads {len(alphas)} values of slot {name!r}, which holds {held}")
    if conditioning is None or any(plan.slots[name].kind == "output" for name in step.read):
        return
    known = {*conditioning, *(tensor for name in plan.once for tensor in plan.segments[name].outputs)}
    readable = {plan.slots[name].tensor for name in step.read}
    for segment in plan.paths[step.path]:
        for tensor in plan.segments[segment].inputs:
            if tensor not in known and tensor not in readable:
                raise StepPlanError(f"{where}: nothing produces the input {tensor!r} of segment {segment!r}")
        known.update(plan.segments[segment].outputs)


def _check_start(plan: StepPlan, start: int, updates: tuple[Update, ...]) -> None:
    if not 0 < start < len(plan.steps) or len(updates) > len(plan.steps) - start:
        raise StepPlanError(f"start {start} lies outside the plan of {len(plan.steps)} steps")
    rows: tuple[Step | Update, ...] = (*updates, *plan.steps[start + len(updates) :])
    first, risen = start, rises(plan)
    for row, update in enumerate(rows, start=start):
        first = row if risen[row] else first
        if any(lag < 0 or lag > row - first for lag in (*update.x, *update.m)):
            raise StepPlanError(f"start {start}: step {row} reaches back before the start")
        numbers = (*update.x.values(), *update.m.values(), update.noise, update.initial)
        if not all(math.isfinite(number) for number in numbers):
            raise StepPlanError(f"start {start} holds a number that is not finite")


def _check_gate(plan: StepPlan, found: Sequence[Origin]) -> None:
    gate = plan.gate
    gated = [row for row, step in enumerate(plan.steps) if step.gated]
    if gate is None:
        if gated:
            raise StepPlanError(f"step {gated[0]} is gated, but the plan has no gate")
        return
    if gate.reference not in get_args(GateReference):
        raise StepPlanError(f"the gate compares with the unknown reference {gate.reference!r}")
    if not gate.polynomial or not all(math.isfinite(number) for number in (gate.threshold, *gate.polynomial)):
        raise StepPlanError("the gate needs a finite threshold and a polynomial of finite coefficients")
    if gate.max_run < 1:
        raise StepPlanError(f"the gate allows runs of {gate.max_run} cached calls, and thus none; take at least 1")
    produced = {tensor for segment_io in plan.segments.values() for tensor in segment_io.outputs}
    if gate.tensor not in produced:
        raise StepPlanError(f"the gate watches {gate.tensor!r}, which no segment computes")
    for name in GATE_TENSORS:
        if name in produced:
            raise StepPlanError(f"a segment computes {name!r}, which is the name of a decision of the gate")
    full, risen = False, rises(plan)
    for row, step in enumerate(plan.steps):
        full = full and not risen[row]
        if step.gated:
            _check_gated(plan, row, step, full)
        full = full or is_full(plan, row)
        _check_mixed(plan, row, step, found[row])


def _check_gated(plan: StepPlan, row: int, step: Step, full: bool) -> None:
    where = f"step {row} is gated"
    if not step.read:
        raise StepPlanError(f"{where}, but it reads no slot, so its own path is not a cached one")
    if step.write:
        raise StepPlanError(f"{where}, so it writes what the full path fills by itself; leave {step.write[0]!r} out")
    if not full:
        raise StepPlanError(f"{where}, but no full step before it gives the gate something to compare with")
    for name, alphas in step.read.items():
        if plan.slots[name].kind == "output":
            raise StepPlanError(f"{where}, but it takes its network output from slot {name!r} and so watches nothing")
        if len(alphas) > 1:
            raise StepPlanError(f"{where}, so it can only reuse slot {name!r}, not forecast from {len(alphas)} values")
    if not watched(plan, row) and plan.gate is not None:
        raise StepPlanError(
            f"{where}, but path {step.path!r} and path {plan.full_path!r} do not begin with the same segments up to "
            f"one that computes {plan.gate.tensor!r} before any slot is read"
        )


def _check_mixed(plan: StepPlan, row: int, step: Step, origin: Origin) -> None:
    """A forecast from several values needs all samples of each to come from one row."""
    for name, alphas in step.read.items():
        if len(alphas) > 1:
            for at in range(min(origin.reads[name]), row):
                if plan.steps[at].gated:
                    raise StepPlanError(
                        f"step {row} forecasts from {len(alphas)} values of slot {name!r}, some of which the gate of "
                        f"step {at} may have replaced"
                    )


def _check_spans(plan: StepPlan, latent_input: str) -> None:
    end, opened = 0, 0
    halves = batching(plan)
    for row, step in enumerate(plan.steps):
        if step.span < 1:
            raise StepPlanError(f"step {row} spans {step.span} rows; it must be at least 1")
        if step.span > 1 and row < end:
            raise StepPlanError(f"step {row} begins a span inside the span of step {opened}")
        if row + step.span > len(plan.steps):
            raise StepPlanError(f"step {row} spans {step.span} rows, beyond the end of the plan")
        if step.span > 1:
            opened, end = row, row + step.span
            fault = span_fault(plan, range(row, end), halves, latent_input)
            if fault:
                raise StepPlanError(f"step {row} cannot span {step.span} rows: {fault}")
