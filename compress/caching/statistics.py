"""Calibration statistics: uncached runs are watched row by row, and what caching would miss is measured."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import numpy as np

from compress.caching.dynamic_programme import cosine_similarity
from compress.errors import PassError
from compress.families.layout import FULL
from export.step_plan import Segment

if TYPE_CHECKING:
    from compress.caching.method import Recorder
    from compress.families import Layout
    from compress.model.latent_diffusion import LatentDiffusion
    from compress.passes.base import PassContext

Row = Mapping[str, np.ndarray]
"""The tensors of one row of one batch."""


def collect(model: LatentDiffusion, layout: Layout, recorder: Recorder, context: PassContext) -> Any:
    """Make one uncached picture per calibration prompt, and let the recorder see every row.

    Args:
        model: with its compiled sampler; nothing of it is changed.
        layout: whose slot tensors are to be seen.
        recorder: see `compress.caching.method.Recorder`.
        context: prompts, seed and size.
    """
    if model.step_plan is None:
        raise PassError("the model has no step plan yet; compile its sampler first")
    layout = replace(layout, watch=(*layout.watch, *recorder.watch))
    segments, paths, _ = model.family.segments(model.denoiser, layout)
    steps = tuple(replace(step, path=FULL) for step in model.step_plan.steps)
    table = {segment.name: Segment(segment.inputs, segment.outputs) for segment in segments}
    plan = replace(model.step_plan, segments=table, paths={FULL: paths[FULL]}, slots={}, steps=steps)
    runtime = replace(model, layout=layout, step_plan=plan).runtime(simulate=False)
    with _inputs(model.denoiser, recorder.inputs) as seen:

        def see(row: int, _: np.ndarray, tensors: dict[str, np.ndarray]) -> None:
            rows.append({**tensors, **seen})

        for first in range(0, len(context.prompts), context.batch):
            rows: list[Row] = []
            prompts = list(context.prompts[first : first + context.batch])
            seeds = [context.seed + first + i for i in range(len(prompts))]
            runtime.sample(prompts, seeds, context.height, context.width, on_step=see)
            recorder.batch(rows)
            context.progress("watch what changes from call to call", first + len(prompts), len(context.prompts))
    return recorder.result()


@contextlib.contextmanager
def _inputs(denoiser: Any, wanted: Mapping[str, str]) -> Iterator[dict[str, np.ndarray]]:
    """Collect name -> the first input of the last call of each wanted module."""
    seen: dict[str, np.ndarray] = {}
    hooks = []
    for name, path in wanted.items():

        def keep(_: Any, args: Any, kwargs: Any, name: str = name) -> None:
            given = args[0] if args else kwargs["hidden_states"]
            seen[name] = given.detach().cpu().numpy().copy()

        hooks.append(denoiser.get_submodule(path).register_forward_pre_hook(keep, with_kwargs=True))
    try:
        yield seen
    finally:
        for hook in hooks:
            hook.remove()


def relative_l1(a: np.ndarray, b: np.ndarray) -> float:
    """Mean |a - b| / mean |b|."""
    return float(np.abs(a - b).mean() / max(float(np.abs(b).mean()), 1e-12))


class _Mean:
    """The mean of arrays of one shape."""

    def __init__(self) -> None:
        self._total: np.ndarray | None = None
        self._count = 0

    def add(self, value: np.ndarray) -> None:
        self._total = value if self._total is None else self._total + value
        self._count += 1

    def value(self) -> np.ndarray:
        if self._total is None:
            raise PassError("calibration needs at least one prompt")
        return self._total / self._count


class _Residuals:
    """What a recorder of `tensor - base` has in common."""

    inputs: Mapping[str, str] = {}

    def __init__(self, tensor: str, base: str) -> None:
        self.watch: tuple[str, ...] = (tensor, base)
        self._tensor, self._base = tensor, base
        self._mean = _Mean()

    def residuals(self, rows: Sequence[Row]) -> list[np.ndarray]:
        return [row[self._tensor] - row[self._base] for row in rows]

    def result(self) -> np.ndarray:
        """The mean over the batches."""
        return self._mean.value()


class ChangeBetweenRows(_Residuals):
    """(rows, rows): the relative L1 of `tensor - base` at row i to that at row j < i (First-Block-Cache)."""

    def batch(self, rows: Sequence[Row]) -> None:
        """Take one batch."""
        residuals = self.residuals(rows)
        changes = np.zeros((len(rows), len(rows)))
        for i, later in enumerate(residuals):
            for j in range(i):
                changes[i, j] = relative_l1(later, residuals[j])
        self._mean.add(changes)


class CosineBetweenRows(_Residuals):
    """(rows, rows): the mean cosine of the tokens of `tensor - base` of any two rows (DDT)."""

    def batch(self, rows: Sequence[Row]) -> None:
        """Take one batch."""
        features = np.stack(self.residuals(rows))
        self._mean.add(cosine_similarity(features.reshape(len(rows), -1, features.shape[-1])))


class Magnitudes(_Residuals):
    """(rows,): the mean over tokens of |residual| / |residual of the row before|, the first 1 (MagCache)."""

    def batch(self, rows: Sequence[Row]) -> None:
        """Take one batch."""
        norms = [np.linalg.norm(residual, axis=-1) for residual in self.residuals(rows)]
        ratios = [float((after / np.maximum(before, 1e-12)).mean()) for before, after in pairwise(norms)]
        self._mean.add(np.array([1.0, *ratios]))


class StepwiseChanges(_Residuals):
    """(2, rows): relative L1 from row to row of the input of a module, and of `tensor - base` (TeaCache)."""

    def __init__(self, module: str, tensor: str, base: str) -> None:
        super().__init__(tensor, base)
        self.inputs = {"modulated input": module}

    def batch(self, rows: Sequence[Row]) -> None:
        """Take one batch."""
        pairs = ([row["modulated input"] for row in rows], self.residuals(rows))
        self._mean.add(np.array([[0.0, *(relative_l1(b, a) for a, b in pairwise(v))] for v in pairs]))


class LookAhead:
    """Group -> (rows, reach + 1): the mean relative L1 of its tensors at row i + n to those at row i (SmoothCache)."""

    watch: tuple[str, ...] = ()
    inputs: Mapping[str, str] = {}

    def __init__(self, groups: Mapping[str, Sequence[str]], reach: int) -> None:
        self._groups, self._reach = groups, reach
        self._means = {name: _Mean() for name in groups}

    def batch(self, rows: Sequence[Row]) -> None:
        """Take one batch."""
        for name, tensors in self._groups.items():
            errors = np.zeros((len(rows), self._reach + 1))
            for i in range(len(rows)):
                for n in range(1, min(self._reach, len(rows) - 1 - i) + 1):
                    changes = [relative_l1(rows[i + n][tensor], rows[i][tensor]) for tensor in tensors]
                    errors[i, n] = float(np.mean(changes))
            self._means[name].add(errors)

    def result(self) -> dict[str, np.ndarray]:
        """The mean over the batches."""
        return {name: mean.value() for name, mean in self._means.items()}
