"""What calibration sees of an uncached run: its latents, and how they hang together linearly."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from export.loop import Lags, Revise
from export.plan_rows import Step

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
