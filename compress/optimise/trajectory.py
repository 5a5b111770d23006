"""What calibration sees of an uncached run: its latents, and which linear updates lead from one to another."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np

from export.loop import Lags, Revise
from export.plan_rows import Step, Update

RIDGE = 1e-6
"""Relative to the energy of each term: what hardly differs must not get huge coefficients of opposite signs."""


@dataclass(frozen=True)
class Trajectory:
    """An uncached run of some samples.

    Attributes:
        states: float32 (samples, channels, h, w) each: the latents before every row, and those after the last.
        gram: (2 rows + 1, 2 rows + 1): mean products of the elements of any two of the states and, after them, of the
            guided network outputs of the rows.
    """

    states: Sequence[np.ndarray]
    gram: np.ndarray

    @property
    def rows(self) -> int:
        """Network calls of the run."""
        return len(self.states) - 1

    def first(self, samples: int) -> list[np.ndarray]:
        """The states of the first samples alone."""
        return [state[:samples] for state in self.states]


def watched(run: Callable[[Revise], np.ndarray]) -> Trajectory:
    """Watch one run.

    Args:
        run: runs the plan with what is to be called before every update, and gives the last latents.
    """
    states: list[np.ndarray] = []
    outputs: list[np.ndarray] = []

    def see(_: int, step: Step, latents: Lags, network: Lags) -> Step:
        states.append(latents[0].copy())
        outputs.append(network[0].copy())
        return step

    states.append(run(see))
    return Trajectory(states, gram_of([*states, *outputs]))


def gram_of(arrays: Sequence[np.ndarray]) -> np.ndarray:
    """Mean products of the elements of any two arrays of one shape (samples, ...), in float64."""
    total = np.zeros((len(arrays), len(arrays)))
    for sample in range(len(arrays[0])):
        flat = np.stack([array[sample].ravel() for array in arrays]).astype(np.float64)
        total += flat @ flat.T
    return total / arrays[0].size


def solved(gram: np.ndarray, target: np.ndarray) -> np.ndarray:
    """The coefficients (terms,) or (terms, targets) of least squared error, kept small by `RIDGE`.

    Args:
        gram: (terms, terms), mean products of the terms.
        target: (terms,) or (terms, targets), their mean products with what they are to make.
    """
    loaded = gram + RIDGE * np.diag(np.diag(gram))
    solution: np.ndarray = np.linalg.lstsq(loaded, target, rcond=None)[0]
    return solution


def update(trajectory: Trajectory, points: Sequence[int], after: int, states: int, outputs: int) -> Update:
    """The update from some points of the run to the state before row `after` (its number of rows is the end).

    Args:
        trajectory: the run.
        points: rows, the newest last, whose states and outputs are at hand.
        after: the row that the update leads to.
        states: how many of their states are used at most, the newest first.
        outputs: how many of their outputs.
    """
    newest = list(points)[::-1]
    places = newest[:states] + [trajectory.rows + 1 + point for point in newest[:outputs]]
    found = solved(trajectory.gram[np.ix_(places, places)], trajectory.gram[places, after])
    kept = min(states, len(newest))
    return Update(
        x={lag: float(value) for lag, value in enumerate(found[:kept])},
        m={lag: float(value) for lag, value in enumerate(found[kept:])},
    )


class Fit:
    """Fits the update of every row of a run, while it runs, to the state that the uncached run had there.

    Called as `export.loop.Revise`. Each row is fitted to the latents that the rows before it really left, so that it
    corrects what they, or cached network outputs, got wrong. The terms are those of the step it is given.

    Attributes:
        steps: the rows with their fitted updates.
    """

    def __init__(self, targets: Sequence[np.ndarray]) -> None:
        """Take what every row is to lead to: float32 (samples, channels, h, w) per row."""
        self._targets = targets
        self.steps: list[Step] = []

    def __call__(self, row: int, step: Step, latents: Lags, outputs: Lags) -> Step:
        """Fit one row."""
        terms = [*(latents[lag] for lag in step.x), *(outputs[lag] for lag in step.m)]
        gram = gram_of([*terms, self._targets[row]])
        found = [float(value) for value in solved(gram[:-1, :-1], gram[:-1, -1])]
        kept = len(step.x)
        x, m = dict(zip(step.x, found[:kept], strict=True)), dict(zip(step.m, found[kept:], strict=True))
        fitted = replace(step, x=x, m=m)
        self.steps.append(fitted)
        return fitted
