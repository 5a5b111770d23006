"""The denoising loop: the linear updates of a step plan around its network calls, in buffers made once."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from export.guidance import guide
from export.memory import Fallback
from export.network import Network
from export.plan_rows import Step
from export.program import Joined, PartFunction, Row, look_up
from export.resample import level_size, risen
from export.slots import Slots
from export.step_plan import StepPlan

__all__ = [
    "Draw",
    "Fallback",
    "Inpainting",
    "Joined",
    "Loop",
    "OnStep",
    "PartFunction",
    "Revise",
    "Row",
    "WholeLoop",
    "look_up",
    "noised",
]

OnStep = Callable[[int, np.ndarray, dict[str, np.ndarray]], None]
"""Called with (row, latents after it, its tensors: inputs and everything computed, both guidance halves)."""

Lags = Mapping[int, np.ndarray]
"""Lag -> array, 0 the newest; good until the next row."""

Revise = Callable[[int, Step, Lags, Lags], Step]
"""Called before the update of a row with (row, its step, latents, guided network outputs); gives the step to take.

Its coefficients may have the lags of the given step. This is how updates are fitted while they run.
"""

Draw = Callable[[int, tuple[int, ...]], np.ndarray]
"""Standard-normal noise by (draw number, shape); row k draws number k + 1, see `export.noise` and `export.resample`."""


@dataclass(frozen=True)
class Inpainting:
    """What stays where `mask` is 0: `image` latents, noised with `noise` as far as the row is noisy."""

    image: np.ndarray
    mask: np.ndarray
    noise: np.ndarray


class WholeLoop(Protocol):
    """A runtime's own denoising loop, for runs of which only the last latents are wanted."""

    def run(self, first: np.ndarray, halves: Mapping[bool, Mapping[str, np.ndarray]], draw: Draw) -> np.ndarray:
        """Run all rows; arguments and result as of `Loop.run`."""
        ...


class Loop:
    """Runs looked-up rows. Coefficients are float64, sums are taken in float64, and latents are stored as float32.

    Attributes:
        slots: what is kept between calls; one run at a time uses them.
        fallbacks: the rows of the last run that ran the full path because a slot could not be read.
    """

    def __init__(
        self,
        plan: StepPlan,
        rows: Sequence[Row],
        latent_input: str,
        timestep_rank: int,
        timestep_dtype: np.dtype,
        slots: Slots | None = None,
    ) -> None:
        self.slots = Slots(plan.slots) if slots is None else slots
        self.fallbacks: list[Fallback] = []
        self._plan = plan
        self._rows = rows
        self._latent_input = latent_input
        self._timestep_rank = timestep_rank
        self._timestep_dtype = timestep_dtype

    def run(
        self,
        first: np.ndarray,
        halves: Mapping[bool, Mapping[str, np.ndarray]],
        draw: Draw,
        inpainting: Inpainting | None = None,
        on_step: OnStep | None = None,
        size: tuple[int, int] | None = None,
        revise: Revise | None = None,
        by_row: Mapping[str, np.ndarray] | None = None,
    ) -> np.ndarray:
        """Run all rows.

        Args:
            first: float32 latents (samples, channels, h, w) before the first row; not changed.
            halves: the conditioning tensors of the conditional half (False) and of both halves, unconditional
                first (True).
            draw: see `Draw`.
            inpainting: what to keep of a picture.
            on_step: see `OnStep`; it gets copies. A gated row adds `gate`, the values compared with the threshold
                (samples,), and `gate_full`, the samples that took the full path (samples,) bool; tensors that
                were computed for some samples alone are left out there.
            size: height and width of the latent at level 1; None where no row has another level.
            revise: see `Revise`.
            by_row: tensors (rows, halves * samples, ...) that were computed for all rows beforehand, see `export.once`.

        Returns:
            The latents after the last row.
        """
        size = size or (first.shape[2], first.shape[3])
        self.slots.begin()
        network = Network(
            self._plan,
            self._rows,
            self.slots,
            halves,
            first.shape,
            self._latent_input,
            self._timestep_rank,
            self._timestep_dtype,
            by_row or {},
        )
        self.fallbacks = network.fallbacks
        state = _State(self._plan.history(), first)
        at = 0
        while at < len(self._rows):
            row = self._rows[at]
            if row.rise:
                larger = risen(state.latents[0], row.step, at, level_size(size, row.step.level), draw)
                state = _State(self._plan.history(), larger)
                network.resized(larger.shape)
            called = network.call(at, state.latents[0], on_step is not None)
            for result in called:
                step = self._rows[at].step
                if on_step is not None and len(called) > 1:
                    network.give_latent(at, result, state.latents[0])
                guide(result.halves, step, state.outputs.push())
                if revise is not None:
                    step = revise(at, step, state.latents.by_lag(), state.outputs.by_lag())
                after = state.update(step, draw(at + 1, state.shape) if step.noise else None)
                if inpainting is not None:
                    following = self._rows[at + 1].step if at + 1 < len(self._rows) else None
                    _keep(inpainting, following, after)
                if on_step is not None:
                    on_step(at, after.copy(), result.copies())
                at += 1
        return state.latents[0].copy()


class _State:
    """The latents and network outputs that updates look back to."""

    def __init__(self, history: tuple[int, int], first: np.ndarray) -> None:
        self.shape = first.shape
        self.latents, self.outputs = _History(history[0], self.shape), _History(history[1], self.shape)
        self.latents.push()[...] = first
        self._first = first
        self._total, self._term = np.empty(self.shape, np.float64), np.empty(self.shape, np.float64)

    def update(self, step: Step, noise: np.ndarray | None) -> np.ndarray:
        """Push the latent after a row.

        Copying to float64 before multiplying is several times faster than a multiplication that casts.
        """
        terms = [(self.latents[lag], coefficient) for lag, coefficient in step.x.items()]
        terms += [(self.outputs[lag], coefficient) for lag, coefficient in step.m.items()]
        if noise is not None:
            terms.append((noise, step.noise))
        if step.initial:
            terms.append((self._first, step.initial))
        total, term = self._total, self._term
        total.fill(0.0)
        for array, coefficient in terms:
            term[...] = array
            np.multiply(term, coefficient, out=term)
            np.add(total, term, out=total)
        after = self.latents.push()
        after[...] = total
        return after


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

    def by_lag(self) -> dict[int, np.ndarray]:
        """All of them."""
        return dict(enumerate(self._kept))


def _keep(inpainting: Inpainting, following: Step | None, latents: np.ndarray) -> None:
    """Blend the picture into the latents, as noisy as the following row takes them; clean after the last row."""
    image = inpainting.image if following is None else noised(inpainting.image, inpainting.noise, following)
    latents[...] = (1.0 - inpainting.mask) * image + inpainting.mask * latents


def noised(image: np.ndarray, noise: np.ndarray, step: Step) -> np.ndarray:
    """The latent of a picture as noisy as a row takes it."""
    return np.float32(step.signal) * image + np.float32(step.sigma) * noise
