"""Runs a static step plan on one device: tensors stay there, the fused step updates them, a CUDA graph is replayed."""

from __future__ import annotations

import functools
import logging
import threading
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from export.cuda_graph import record
from export.errors import EngineError
from export.loop import Draw
from export.plan_table import plan_table
from export.program import Read, Row, look_up
from export.step_plan import StepPlan
from kernels.denoise_step import begin, denoise_step
from kernels.dispatch import Mode, choose
from kernels.errors import KernelError

DeviceFunction = Callable[[Mapping[str, Tensor]], Mapping[str, Tensor]]
"""Named tensors in, named tensors out, all on one device; it neither writes to its inputs nor waits for the device."""

RECORDINGS = 2
"""Sets of shapes whose buffers, and CUDA graph, are kept at a time."""

_PARTS = {"conditional": ("conditional",), "both": ("both",), "sequential": ("unconditional", "conditional")}
_LOG = logging.getLogger("export")


def obstacle(plan: StepPlan) -> str | None:
    """Why a plan cannot run as one static loop; None where it can."""
    if plan.gate is not None and any(step.gated for step in plan.steps):
        return "a gate decides while it runs which path a network call takes"
    try:
        plan_table(plan)
    except (EngineError, KernelError) as error:
        return str(error)
    nothing: Any = dict.fromkeys(plan.segments)
    for at, row in enumerate(look_up(plan, nothing)):
        if row.late if row.calls else row.writes:
            return f"row {at} reads a slot that no segment waits for"
    return None


class DeviceLoop:
    """All rows of a static plan over functions on a device.

    It computes what `export.loop.Loop` does, with updates in float32. Rows that span run one after the other, which
    gives the same. On a GPU whose kernels run, all rows become one CUDA graph.
    """

    def __init__(
        self,
        plan: StepPlan,
        functions: Mapping[str, DeviceFunction],
        latent_input: str,
        timestep_rank: int,
        dtypes: Mapping[str, torch.dtype],
        device: torch.device,
        mode: Mode | None = None,
    ) -> None:
        """Bind a plan.

        Args:
            plan: one without an `obstacle`.
            functions: by segment name.
            latent_input: the segment input that takes the latent.
            timestep_rank: 1 feeds `timestep` as (batch,), 0 as a scalar.
            dtypes: of what the segments take, by name; the network's output is of that of the latent.
            device: of all tensors.
            mode: of the fused step, see `kernels.dispatch.choose`.

        Raises:
            EngineError: no table holds the plan.
        """
        self.plan, self.table = plan, plan_table(plan)
        numpy_free: Any = functions
        self.rows: list[Row] = look_up(plan, numpy_free)
        self.latent_input, self.timestep_rank, self.dtypes = latent_input, timestep_rank, dtypes
        self.device, self.mode = device, mode
        self._recordings: OrderedDict[Any, _Recording] = OrderedDict()
        self._lock = threading.Lock()

    def run(self, first: np.ndarray, halves: Mapping[bool, Mapping[str, np.ndarray]], draw: Draw) -> np.ndarray:
        """Run all rows; see `export.loop.Loop.run`."""
        draws = [draw(at + 1, first.shape) for at, row in enumerate(self.rows) if row.step.noise]
        noise = np.stack(draws) if draws else np.empty((0, *first.shape), np.float32)
        key = first.shape, *((name, value.shape) for name, value in halves[True].items())
        with self._lock, torch.no_grad():
            if key not in self._recordings:
                while len(self._recordings) >= RECORDINGS:
                    self._recordings.popitem(last=False)
                self._recordings[key] = _Recording(self, first, halves, noise)
            self._recordings.move_to_end(key)
            return self._recordings[key].run(first, halves, noise)


class _Recording:
    """The buffers for one set of shapes, and the graph that was recorded over them."""

    def __init__(
        self, loop: DeviceLoop, first: np.ndarray, halves: Mapping[bool, Mapping[str, np.ndarray]], noise: np.ndarray
    ) -> None:
        self._loop, self._samples = loop, len(first)
        self._state = begin(loop.table, self._tensor(first), self._tensor(noise), loop.dtypes[loop.latent_input])
        self._output = torch.zeros_like(self._state.network_input)
        self._conditions = {
            both: {name: self._tensor(value).to(loop.dtypes[name]) for name, value in given.items()}
            for both, given in halves.items()
        }
        self._last = _last_readers(loop.rows)
        self._graph: torch.cuda.CUDAGraph | None = None
        latent = self._state.network_input
        choice = choose("denoise_step", latent.device, latent.dtype, latent.shape, mode=loop.mode)
        if latent.device.type != "cuda":
            _LOG.info("the loop of %d rows runs row by row: CUDA graphs need a GPU", loop.table.rows)
        elif choice.implementation == "reference":
            _LOG.info("the loop of %d rows runs row by row: %s", loop.table.rows, choice.reason)
        else:
            self._graph, _ = record(self._all_rows, lambda: self._state.restart(self._state.first.clone()))
            _LOG.info("the loop of %d rows runs on %s as one CUDA graph", loop.table.rows, latent.device)

    def run(self, first: np.ndarray, halves: Mapping[bool, Mapping[str, np.ndarray]], noise: np.ndarray) -> np.ndarray:
        """Run all rows on new contents of the buffers."""
        for both, given in halves.items():
            for name, value in given.items():
                self._conditions[both][name].copy_(torch.from_numpy(np.ascontiguousarray(value)))
        self._state.noise.copy_(torch.from_numpy(noise))
        self._state.restart(self._tensor(first))
        if self._graph is None:
            self._all_rows()
        else:
            self._graph.replay()
        made: np.ndarray = self._state.latent(self._loop.table.rows).cpu().numpy()
        return made.copy()

    def _all_rows(self) -> None:
        kept: dict[tuple[str, int], Tensor] = {}
        for at, row in enumerate(self._loop.rows):
            output = self._network(at, row, kept) if row.calls else self._output
            denoise_step(self._state, output, mode=self._loop.mode)
            for entry in [entry for entry in kept if self._last.get(entry, -1) <= at]:
                del kept[entry]

    def _network(self, at: int, row: Row, kept: dict[tuple[str, int], Tensor]) -> Tensor:
        """The network output of a row (halves * samples, ...); `kept` gains what the row writes to slots."""
        written: dict[str, list[Tensor]] = {write.slot: [] for write in row.writes if (write.slot, at) in self._last}
        output = self._output
        for kind in _PARTS[row.halves]:
            tensors = self._inputs(kind)
            for call in row.calls:
                for read in call.reads:
                    tensors[read.tensor] = self._forecast(row, read, tensors, kept, kind)
                function: Any = call.function
                tensors.update(function({name: tensors[name] for name in call.inputs}))
            for write in row.writes:
                if write.slot in written:
                    value = tensors[write.tensor]
                    base = None if write.base is None else tensors[write.base]
                    written[write.slot].append(self._own(value) if base is None else value - base)
            result = tensors[self._loop.plan.output]
            if result.shape == output.shape and result.dtype == output.dtype and result.is_contiguous():
                output = result
            else:
                output[self._part(kind)].copy_(result)
        for slot, values in written.items():
            kept[slot, at] = values[0] if len(values) == 1 else torch.cat(values)
        return output

    def _inputs(self, kind: str) -> dict[str, Tensor]:
        """What is given to the segments from outside."""
        part, samples = self._part(kind), self._samples
        tensors = dict(self._conditions[kind != "conditional"])
        if kind == "unconditional":
            tensors = {name: value[:samples] for name, value in tensors.items()}
        time = self._state.timestep.to(self._loop.dtypes["timestep"])
        latent = self._state.network_input[part]
        tensors["timestep"] = time.repeat(len(latent)) if self._loop.timestep_rank else time[0]
        tensors[self._loop.latent_input] = latent
        return tensors

    def _part(self, kind: str) -> slice:
        """Where a guidance half lies in the network's input and output."""
        if kind == "both" or self._state.halves == 1:
            return slice(None)
        return slice(self._samples) if kind == "unconditional" else slice(self._samples, None)

    def _forecast(
        self, row: Row, read: Read, tensors: Mapping[str, Tensor], kept: Mapping[tuple[str, int], Tensor], kind: str
    ) -> Tensor:
        """`sum_i alphas[i] * value[i]` (+ base) of the guidance halves that run, summed in float32."""
        values = [self._view(kept[read.slot, made], row, read, kind) for made in read.rows]
        base = None if read.base is None else tensors[read.base]
        if read.alphas is None and base is None:
            return values[0]
        alphas = (1.0,) if read.alphas is None else [float(alpha) for alpha in read.alphas]
        terms = [alpha * value.float() for alpha, value in zip(alphas, values, strict=True)]
        terms += [] if base is None else [base.float()]
        return functools.reduce(torch.add, terms).to(values[0].dtype)

    def _view(self, value: Tensor, row: Row, read: Read, kind: str) -> Tensor:
        """Of a kept value the guidance halves that run; both may be kept where one does."""
        samples = self._samples
        if kind == "both" or len(value) == samples:
            return value
        if kind == "unconditional":
            return value[:samples]
        if read.mean and not row.both:
            return ((value[:samples].float() + value[samples:].float()) * 0.5).to(value.dtype)
        return value[samples:]

    def _own(self, value: Tensor) -> Tensor:
        """A tensor that stays as it is: the latent that a segment hands on changes with the row."""
        latent = self._state.network_input.untyped_storage().data_ptr()
        return value.clone() if value.untyped_storage().data_ptr() == latent else value

    def _tensor(self, array: np.ndarray) -> Tensor:
        return torch.from_numpy(np.ascontiguousarray(array)).to(self._loop.device, copy=True)


def _last_readers(rows: Sequence[Row]) -> dict[tuple[str, int], int]:
    """(slot, row that wrote) -> the last row whose segments read that value."""
    reads = [(at, read) for at, row in enumerate(rows) for call in row.calls for read in call.reads]
    return {(read.slot, made): at for at, read in reads for made in read.rows}
