"""Gives functions of a folded engine, called one by one, what its plan computes before the loop."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from export.program import PartFunction
from export.step_plan import StepPlan

Tensors = Mapping[str, np.ndarray]


class Beforehand:
    """What `plan.once` computes, for the call at hand: from what this function, or one before it, was given.

    A later segment of a cut denoiser is given the embedding that an earlier one made of the timestep; where that is a
    table, the timestep itself is needed, which the earlier one was given.

    Args:
        plan: of the engine.
        functions: of the engine, by name.
    """

    def __init__(self, plan: StepPlan, functions: Mapping[str, PartFunction]) -> None:
        self._plan, self._functions = plan, functions
        self._read = {name for segment in plan.once for name in plan.segments[segment].inputs}
        self._known: dict[str, np.ndarray] = {}

    def fill(self, function: str, arrays: Tensors) -> Tensors:
        """The arrays a function is called with, and what the segments before the loop make of them."""
        if function not in self._plan.segments:
            return arrays
        self._known.update({name: array for name, array in arrays.items() if name in self._read})
        known = dict(self._known)
        for name in self._plan.once:
            inputs = self._plan.segments[name].inputs
            if known.keys() >= set(inputs):
                result = self._functions[name]({key: known[key] for key in inputs})
                known.update({key: result[key] for key in self._plan.segments[name].outputs})
        return {**known, **arrays}

    def functions(self) -> dict[str, PartFunction]:
        """The functions of the engine, as functions of what an engine that is not folded takes."""
        return {name: self._filled(name, function) for name, function in self._functions.items()}

    def _filled(self, name: str, function: PartFunction) -> PartFunction:
        return lambda arrays: function(self.fill(name, arrays))
