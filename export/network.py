"""The network calls of one run: segments over named tensors, slots between calls, spans of rows, gated rows."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any, NamedTuple

import numpy as np

from export.gate import GateState, Halves
from export.memory import NOTHING, Fallback, Found, Memory, Tensors
from export.plan_rows import StepPlanError
from export.program import Call, Read, Row
from export.slots import Slots
from export.step_plan import StepPlan

_PARTS = {"conditional": ("conditional",), "both": ("both",), "sequential": ("unconditional", "conditional")}
"""What a row runs one after the other, by how it batches its guidance halves."""


class Called(NamedTuple):
    """What the network call of one row gave.

    Attributes:
        halves: the network output (samples, ...) of the conditional half, before it of the unconditional half.
        parts: all tensors: of the one batch that ran, or of the unconditional and then of the conditional half.
        decision: of the gate, in a gated row.
    """

    halves: Halves
    parts: tuple[Tensors, ...]
    decision: Mapping[str, np.ndarray] = MappingProxyType({})

    def copies(self) -> Tensors:
        """All tensors, both guidance halves in one array each, and the decision of the gate."""
        if len(self.parts) == 1:
            tensors = {name: np.array(value) for name, value in self.parts[0].items()}
        else:
            first, second = self.parts
            tensors = {
                name: np.concatenate([first[name], value]) if np.ndim(value) else np.array(value)
                for name, value in second.items()
            }
        return tensors | {name: value.copy() for name, value in self.decision.items()}


class Network:
    """Runs looked-up rows. What it hands out is good until the next call."""

    def __init__(
        self,
        plan: StepPlan,
        rows: Sequence[Row],
        slots: Slots,
        halves: Mapping[bool, Mapping[str, np.ndarray]],
        shape: tuple[int, ...],
        latent_input: str,
        timestep_rank: int,
        timestep_dtype: np.dtype,
        by_row: Mapping[str, np.ndarray] = MappingProxyType({}),
    ) -> None:
        """Prepare one run.

        Args:
            plan: the plan.
            rows: its rows, looked up.
            slots: begun for this run.
            halves: the conditioning tensors of the conditional half (False) and of both halves, unconditional
                first (True).
            shape: of the latent (samples, channels, h, w).
            latent_input: the segment input that takes the latent.
            timestep_rank: 1 feeds `timestep` as (batch,), 0 as a scalar.
            timestep_dtype: of `timestep`.
            by_row: tensors (rows, halves * samples, ...) that were computed for all rows beforehand.
        """
        samples = shape[0]
        self.fallbacks: list[Fallback] = []
        self._output = plan.output
        self._rows = rows
        self._memory = Memory(slots, samples)
        self._samples = samples
        self._latent_input = latent_input
        self._timestep_rank = timestep_rank
        self._conditions: dict[Any, Mapping[str, np.ndarray]] = {"conditional": halves[False], "both": halves[True]}
        if any(row.halves == "sequential" for row in rows):
            self._conditions["unconditional"] = {name: value[:samples] for name, value in halves[True].items()}
        longest = max(row.step.span for row in rows)
        self._times = np.empty(2 * samples * longest, timestep_dtype)
        gated = any(row.step.gated for row in rows)
        self._gate = GateState(plan.gate, samples) if gated and plan.gate is not None else None
        self._watched = "" if plan.gate is None else plan.gate.tensor
        self._batch = np.empty((2 * samples, *shape[1:]), np.float32)
        halves_of = {"both": slice(None), "conditional": slice(-samples, None), "unconditional": slice(samples)}
        self._by_row = {
            kind: {name: value[:, own] for name, value in by_row.items()} for kind, own in halves_of.items()
        }

    def resized(self, shape: tuple[int, ...]) -> None:
        """The latent has another shape from here on."""
        self._batch = np.empty((2 * self._samples, *shape[1:]), np.float32)
        self._memory.resized()
        if self._gate is not None:
            self._gate.resized()

    def call(self, at: int, latent: np.ndarray, wanted: bool) -> list[Called]:
        """Run a row, or the rows of a span from there on.

        Args:
            at: index of the row.
            latent: before it.
            wanted: whether all tensors of every row are asked for; otherwise those of a span may be left out.

        Returns:
            One result per row; the latent is missing from the tensors of a span.

        Raises:
            StepPlanError: a tensor that is to be cut by rows or samples has no batch axis.
        """
        row = self._rows[at]
        found, fault = self._memory.found(at, row) if row.reads else (NOTHING, None)
        if row.span_end - at > 1 and fault is None:
            ready = [found]
            for later in range(at + 1, row.span_end):
                following, missing = self._memory.found(later, self._rows[later])
                if missing is not None:
                    break
                ready.append(following)
            if len(ready) > 1:
                return self._span(at, ready, wanted)
        self._scale(row, latent)
        if fault is not None:
            self.fallbacks.append(fault)
            return [self._full_instead(at, row)]
        return [self._gated(at, row, found) if row.step.gated else self._as_written(at, row, found, wanted)]

    def give_latent(self, at: int, called: Called, latent: np.ndarray) -> None:
        """Add to the tensors of a row in a span what it would have been called with."""
        self._scale(self._rows[at], latent)
        for kind, tensors in zip(_PARTS[self._rows[at].halves], called.parts, strict=True):
            tensors[self._latent_input] = self._batch[: self._size(kind)]

    def _as_written(self, at: int, row: Row, found: Found, wanted: bool) -> Called:
        calls = row.calls if wanted else row.fast
        parts = []
        opened: Tensors = {}
        for kind in _PARTS[row.halves]:
            tensors = self._inputs(at, row, kind)
            self._through(row, calls, row.late, tensors, found, kind)
            if row.writes:
                self._memory.store(row.writes, tensors, kind, at, row, opened)
            parts.append(tensors)
        if self._gate is not None:
            self._observe(row, parts, self._gate)
        return Called(self._halves(parts, row, self._output), tuple(parts))

    def _full_instead(self, at: int, row: Row) -> Called:
        """The full path of a row that cannot be run as written; it fills all slots that it can."""
        parts = []
        opened: Tensors = {}
        for kind in _PARTS[row.halves]:
            tensors = self._inputs(at, row, kind)
            self._through(row, row.full, (), tensors, NOTHING, kind)
            self._memory.store(row.fills, tensors, kind, at, row, opened)
            parts.append(tensors)
        if self._gate is not None:
            self._gate.ran_full(self._halves(parts, row, self._watched))
        decision = {}
        if row.step.gated:
            decision = {"gate": np.full(self._samples, np.nan), "gate_full": np.ones(self._samples, bool)}
        return Called(self._halves(parts, row, self._output), tuple(parts), decision)

    def _gated(self, at: int, row: Row, found: Found) -> Called:
        """Run a row as far as the gate watches, and the rest of it as the gate decides for each sample."""
        if self._gate is None:
            raise StepPlanError(f"step {at} is gated, but the plan has no gate")
        kinds = _PARTS[row.halves]
        parts = []
        for kind in kinds:
            tensors = self._inputs(at, row, kind)
            self._through(row, row.calls[: row.watched], (), tensors, NOTHING, kind)
            parts.append(tensors)
        values, full = self._gate.judge(self._halves(parts, row, self._watched))
        opened: Tensors = {}
        for kind, tensors in zip(kinds, parts, strict=True):
            if full.all():
                self._through(row, row.full[row.watched :], (), tensors, NOTHING, kind)
                self._memory.fill(row, tensors, kind, at, None, opened)
            elif full.any():
                self._split(at, row, tensors, found, kind, full)
            else:
                self._through(row, row.calls[row.watched :], row.late, tensors, found, kind)
        decision = {"gate": values, "gate_full": full}
        return Called(self._halves(parts, row, self._output), tuple(parts), decision)

    def _split(self, at: int, row: Row, tensors: Tensors, found: Found, kind: str, full: np.ndarray) -> None:
        """The rest of a gated row for two groups of samples; `tensors` gains what both compute."""
        size, given = self._size(kind), set(tensors)
        groups = []
        for which, calls, late in ((~full, row.calls, row.late), (full, row.full, ())):
            index = np.flatnonzero(which)
            index = np.concatenate([index, self._samples + index]) if kind == "both" else index
            calls = calls[row.watched :]
            needed: set[str | None] = {name for call in calls for name in call.inputs}
            needed |= {read.base for call in calls for read in call.reads} | {read.base for read in late}
            if which is full:
                needed |= {name for fill in row.fills for name in (fill.tensor, fill.base)}
            own = {
                name: _batched(name, value, size)[index] if np.ndim(value) else value
                for name, value in tensors.items()
                if name in needed
            }
            self._through(row, calls, late, own, found, kind, index)
            groups.append((index, own))
        self._memory.fill(row, groups[1][1], kind, at, groups[1][0], {})
        for name in groups[0][1].keys() & groups[1][1].keys() - given:
            merged = None
            for index, own in groups:
                value = _batched(name, own[name], len(index))
                merged = np.empty((size, *value.shape[1:]), value.dtype) if merged is None else merged
                merged[index] = value
                tensors[name] = merged

    def _span(self, at: int, ready: Sequence[Found], wanted: bool) -> list[Called]:
        """The network calls of several rows as one batch, row after row; none of them takes the latent."""
        count, row = len(ready), self._rows[at]
        rows = self._rows[at : at + count]
        stacked = []
        for kind in _PARTS[row.halves]:
            size = self._size(kind)
            tensors = self._tiled(kind, count)
            for name, value in self._by_row[kind].items():
                tensors[name] = value[at : at + count].reshape(count * size, *value.shape[2:])
            times = self._times[: count * size]
            for place, each in enumerate(rows):
                times[place * size : (place + 1) * size] = each.step.t
            tensors["timestep"] = times if self._timestep_rank else times[0]
            for call in row.calls:
                for read in call.reads:
                    tensors[read.tensor] = self._forecasts(rows, read.slot, tensors, ready, kind)
                computed = call.function({name: tensors[name] for name in call.inputs})
                tensors.update((name, computed[name]) for name in call.outputs)
            for read in row.late:
                tensors[read.tensor] = self._forecasts(rows, read.slot, tensors, ready, kind)
            stacked.append(tensors)
        results = []
        for place, each in enumerate(rows):
            parts = []
            for kind, tensors in zip(_PARTS[row.halves], stacked, strict=True):
                size = self._size(kind)
                names = tensors if wanted else {self._output, *({self._watched} if each.watched else ())}
                parts.append(
                    {
                        name: _batched(name, tensors[name], count * size)[place * size : (place + 1) * size]
                        if np.ndim(tensors[name])
                        else np.asarray(each.step.t, self._times.dtype)
                        for name in names
                    }
                )
            if self._gate is not None:
                self._observe(each, parts, self._gate)
            results.append(Called(self._halves(parts, each, self._output), tuple(parts)))
        return results

    def _forecasts(
        self, rows: Sequence[Row], slot: str, tensors: Tensors, ready: Sequence[Found], kind: str
    ) -> np.ndarray:
        """One slot read by all rows of a span, row after row."""
        size, stacked = self._size(kind), None
        for place, (row, found) in enumerate(zip(rows, ready, strict=True)):
            read = next(read for read in row.reads if read.slot == slot)
            own = slice(place * size, (place + 1) * size)
            base = None if read.base is None else _batched(read.base, tensors[read.base], len(rows) * size)[own]
            value = self._memory.forecast(row, read, base, found, kind)
            if stacked is None:
                stacked = self._memory.buffer(("span", slot, kind), (len(rows) * size, *value.shape[1:]), value.dtype)
            stacked[own] = value
        if stacked is None:
            raise LookupError("a span has rows")
        return stacked

    def _through(
        self,
        row: Row,
        calls: Sequence[Call],
        late: Sequence[Read],
        tensors: Tensors,
        found: Found,
        kind: str,
        index: np.ndarray | None = None,
    ) -> None:
        """Run segments; `tensors` gains what is read and computed. `index` picks rows of the batch in slots."""
        for call in calls:
            for read in call.reads:
                base = None if read.base is None else tensors[read.base]
                tensors[read.tensor] = self._memory.forecast(row, read, base, found, kind, index)
            computed = call.function({name: tensors[name] for name in call.inputs})
            for name in call.outputs:
                tensors[name] = computed[name]
        for read in late:
            base = None if read.base is None else tensors[read.base]
            tensors[read.tensor] = self._memory.forecast(row, read, base, found, kind, index)

    def _observe(self, row: Row, parts: list[Tensors], gate: GateState) -> None:
        """Tell the gate of a row that it did not decide."""
        watched = self._halves(parts, row, self._watched) if row.watched else None
        if row.is_full and watched is not None:
            gate.ran_full(watched)
        else:
            gate.ran_cached(watched)

    def _halves(self, parts: Sequence[Tensors], row: Row, name: str) -> Halves:
        """A tensor of every guidance half that ran."""
        if row.halves == "both":
            value = parts[0][name]
            return value[: self._samples], value[self._samples :]
        return tuple(tensors[name] for tensors in parts)

    def _inputs(self, at: int, row: Row, kind: str) -> Tensors:
        """What is given to the segments from outside; the latent must have been scaled before."""
        size = self._size(kind)
        times = self._times[:size]
        times[...] = row.step.t
        tensors = dict(self._conditions[kind])
        tensors.update((name, value[at]) for name, value in self._by_row[kind].items())
        tensors[self._latent_input] = self._batch[:size]
        tensors["timestep"] = times if self._timestep_rank else times[0]
        return tensors

    def _tiled(self, kind: str, count: int) -> Tensors:
        """The conditioning of `count` rows, row after row."""
        if (kind, count) not in self._conditions:
            self._conditions[kind, count] = {
                name: np.tile(value, (count, *[1] * (value.ndim - 1))) for name, value in self._conditions[kind].items()
            }
        return dict(self._conditions[kind, count])

    def _scale(self, row: Row, latent: np.ndarray) -> None:
        batch = self._batch
        np.multiply(latent, np.float32(row.step.input_scale), out=batch[: self._samples])
        if row.halves == "both":
            batch[self._samples :] = batch[: self._samples]

    def _size(self, kind: str) -> int:
        return 2 * self._samples if kind == "both" else self._samples


def _batched(name: str, value: np.ndarray, size: int) -> np.ndarray:
    """`value`, of whose batch axis rows are about to be taken."""
    if len(value) != size:
        raise StepPlanError(
            f"tensor {name!r} has the shape {value.shape}, not {size} entries, so its rows can be neither gated nor "
            "run as a span"
        )
    return value
