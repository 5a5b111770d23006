"""The denoising loop: rows of a step plan over named functions, slots and histories in buffers made once."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from export.step_plan import Step, StepPlan

PartFunction = Callable[[Mapping[str, np.ndarray]], dict[str, np.ndarray]]
"""Named arrays in, named arrays out. It neither writes to its inputs nor keeps them, nor changes its outputs later."""

OnStep = Callable[[int, np.ndarray, dict[str, np.ndarray]], None]
"""Called with (row, latents after it, its tensors: inputs and everything computed, both guidance halves)."""


@dataclass(frozen=True)
class Read:
    """A slot read: `tensor` becomes the forecast from `slot` (plus the tensor `base` of a residual slot)."""

    tensor: str
    base: str | None
    slot: str
    alphas: tuple[float, ...]


@dataclass(frozen=True)
class Row:
    """One row of a plan with its names looked up.

    Attributes:
        step: the row itself.
        calls: (function, inputs, reads to do first, outputs) of every segment in order.
        both: whether both guidance halves run.
        late: reads that no segment waits for.
        writes: (slot, tensor, base).
    """

    step: Step
    calls: tuple[tuple[PartFunction, tuple[str, ...], tuple[Read, ...], tuple[str, ...]], ...]
    both: bool
    late: tuple[Read, ...]
    writes: tuple[tuple[str, str, str | None], ...]


@dataclass(frozen=True)
class Inpainting:
    """What stays where `mask` is 0: `image` latents, noised with `noise` as far as the row is noisy."""

    image: np.ndarray
    mask: np.ndarray
    noise: np.ndarray


def look_up(plan: StepPlan, functions: Mapping[str, PartFunction]) -> list[Row]:
    """Resolve the names of every row. A row that reads an output slot runs no segment."""
    rows = []
    for step, both in zip(plan.steps, _both_halves(plan), strict=True):
        waiting = [Read(plan.slots[k].tensor, plan.slots[k].base, k, alphas) for k, alphas in step.read.items()]
        skipped = any(plan.slots[name].kind == "output" for name in step.read)
        calls = []
        for name in () if skipped else plan.paths[step.path]:
            segment = plan.segments[name]
            now = tuple(read for read in waiting if read.tensor in segment.inputs)
            waiting = [read for read in waiting if read not in now]
            calls.append((functions[name], segment.inputs, now, segment.outputs))
        writes = tuple((name, plan.slots[name].tensor, plan.slots[name].base) for name in step.write)
        rows.append(Row(step, tuple(calls), both, tuple(waiting), writes))
    return rows


def _both_halves(plan: StepPlan) -> list[bool]:
    """Whether each row runs both guidance halves: it is guided, or such a row reads a slot value that it wrote."""
    both = [step.guidance == "cfg" for step in plan.steps]
    writers: dict[str, deque[int]] = {name: deque(maxlen=slot.history) for name, slot in plan.slots.items()}
    sources: list[list[int]] = []
    for row, step in enumerate(plan.steps):
        sources.append([at for name, alphas in step.read.items() for at in list(writers[name])[: len(alphas)]])
        for name in step.write:
            writers[name].appendleft(row)
    for row in reversed(range(len(both))):
        if both[row]:
            for at in sources[row]:
                both[at] = True
    return both


class Loop:
    """Runs looked-up rows. Coefficients are float64, sums are taken in float64, and latents are stored as float32."""

    def __init__(
        self, plan: StepPlan, rows: Sequence[Row], latent_input: str, timestep_rank: int, timestep_dtype: np.dtype
    ) -> None:
        self._plan = plan
        self._rows = rows
        self._latent_input = latent_input
        self._timestep_rank = timestep_rank
        self._timestep_dtype = timestep_dtype

    def run(
        self,
        first: np.ndarray,
        halves: Mapping[bool, Mapping[str, np.ndarray]],
        draw: Callable[[int], np.ndarray],
        inpainting: Inpainting | None = None,
        on_step: OnStep | None = None,
    ) -> np.ndarray:
        """Run all rows.

        Args:
            first: float32 latents (samples, channels, h, w) before the first row; not changed.
            halves: the conditioning tensors of the conditional half (False) and of both halves, unconditional
                first (True).
            draw: the noise of a row, of the shape of `first`.
            inpainting: what to keep of a picture.
            on_step: see `OnStep`; it gets copies.

        Returns:
            The latents after the last row.
        """
        samples, shape = first.shape[0], first.shape
        keep_x, keep_m = self._plan.history()
        latents, outputs = _History(keep_x, shape), _History(keep_m, shape)
        latents.push()[...] = first
        total, term = np.empty(shape, np.float64), np.empty(shape, np.float64)
        batch = np.empty((2 * samples, *shape[1:]), np.float32)
        times = np.empty(2 * samples, self._timestep_dtype)
        slots = {name: deque[np.ndarray](maxlen=slot.history) for name, slot in self._plan.slots.items()}
        for at, row in enumerate(self._rows):
            step = row.step
            size = 2 * samples if row.both else samples
            np.multiply(latents[0], np.float32(step.input_scale), out=batch[:samples])
            if row.both:
                batch[samples:] = batch[:samples]
            times[:size] = step.t
            tensors = dict(halves[row.both])
            tensors[self._latent_input] = batch[:size]
            tensors["timestep"] = times[:size] if self._timestep_rank else times[0]
            raw = self._network(row, tensors, slots, size)
            _guide(raw, step, samples, outputs.push())
            _update(step, latents, outputs, draw(at) if step.noise else None, total, term)
            after = latents.push()
            after[...] = total
            if inpainting is not None:
                following = self._rows[at + 1].step if at + 1 < len(self._rows) else None
                _keep(inpainting, following, after)
            if on_step is not None:
                on_step(at, after.copy(), {name: np.array(value) for name, value in tensors.items()})
        return latents[0].copy()

    def _network(
        self, row: Row, tensors: dict[str, np.ndarray], slots: Mapping[str, deque[np.ndarray]], size: int
    ) -> np.ndarray:
        """Run the path of a row; `tensors` gains every tensor computed, the slots what the row writes."""
        for function, inputs, reads, outputs in row.calls:
            for read in reads:
                tensors[read.tensor] = _forecast(read, slots[read.slot], tensors, size)
            computed = function({name: tensors[name] for name in inputs})
            for name in outputs:
                tensors[name] = computed[name]
        for read in row.late:
            tensors[read.tensor] = _forecast(read, slots[read.slot], tensors, size)
        for slot, tensor, base in row.writes:
            slots[slot].appendleft(np.array(tensors[tensor]) if base is None else tensors[tensor] - tensors[base])
        return tensors[self._plan.output]


class _History:
    """The last few arrays of one shape, newest first, in buffers that are used again."""

    def __init__(self, length: int, shape: tuple[int, ...]) -> None:
        self._kept = deque(np.zeros(shape, np.float32) for _ in range(length))

    def push(self) -> np.ndarray:
        """Forget the oldest; its buffer, now the newest, is to be filled."""
        self._kept.rotate(1)
        return self._kept[0]

    def __getitem__(self, lag: int) -> np.ndarray:
        return self._kept[lag]


def _guide(raw: np.ndarray, step: Step, samples: int, out: np.ndarray) -> None:
    """Classifier-free guidance of a network output whose last `samples` rows are the conditional half."""
    if step.guidance == "cfg":
        np.subtract(raw[samples:], raw[:samples], out=out)
        out *= np.float32(step.guidance_scale)
        out += raw[:samples]
    else:
        out[...] = raw[-samples:]


def _update(
    step: Step, latents: _History, outputs: _History, noise: np.ndarray | None, total: np.ndarray, term: np.ndarray
) -> None:
    """Sum the next latent up in `total`; `term` is scratch space.

    Copying to float64 before multiplying is several times faster than a multiplication that casts.
    """
    total.fill(0.0)
    for history, coefficients in ((latents, step.x), (outputs, step.m)):
        for lag, coefficient in coefficients.items():
            term[...] = history[lag]
            np.multiply(term, coefficient, out=term)
            np.add(total, term, out=total)
    if noise is not None:
        term[...] = noise
        np.multiply(term, step.noise, out=term)
        np.add(total, term, out=total)


def _forecast(read: Read, kept: deque[np.ndarray], tensors: Mapping[str, np.ndarray], size: int) -> np.ndarray:
    """`sum_i alphas[i] * kept[i]` (+ base), of the last `size` rows: the conditional half where only that one runs."""
    value = kept[0][-size:]
    if read.alphas != (1.0,):
        value = value * np.float32(read.alphas[0])
        for lag, alpha in enumerate(read.alphas[1:], start=1):
            value += kept[lag][-size:] * np.float32(alpha)
    return value if read.base is None else tensors[read.base] + value


def _keep(inpainting: Inpainting, following: Step | None, latents: np.ndarray) -> None:
    """Blend the picture into the latents, as noisy as the following row takes them; clean after the last row."""
    image = inpainting.image if following is None else noised(inpainting.image, inpainting.noise, following)
    latents[...] = (1.0 - inpainting.mask) * image + inpainting.mask * latents


def noised(image: np.ndarray, noise: np.ndarray, step: Step) -> np.ndarray:
    """The latent of a picture as noisy as a row takes it."""
    return np.float32(step.signal) * image + np.float32(step.sigma) * noise
