"""What distilled weights were trained for, and what a step plan over them must therefore be."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from export.plan_rows import Step, StepPlanError


@dataclass(frozen=True)
class Contract:
    """The sampler that weights belong to.

    Attributes:
        prediction: what the network predicts.
        timesteps: that it was trained at, in the order of a run.
        every: the run makes exactly these calls, each update leading from one to the next (a few-step student); else it
            may make any of them (guidance alone was distilled).
        guidance_scale: of the classifier-free guidance that the weights give by themselves, in the convention
            `uncond + guidance_scale * (cond - uncond)`; None is none, so that rows may be guided.
    """

    prediction: str
    timesteps: tuple[float, ...]
    every: bool
    guidance_scale: float | None = None

    def check(self, prediction: str, steps: Sequence[Step]) -> None:
        """Compare a plan with it.

        Raises:
            StepPlanError: one sentence with what was distilled and what was asked.
        """
        if not self.timesteps or not all(math.isfinite(t) for t in self.timesteps):
            raise StepPlanError("the contract of the distilled weights names no timesteps, or one that is not finite")
        if prediction != self.prediction:
            raise StepPlanError(f"the distilled weights predict {self.prediction}, but the plan reads {prediction}")
        asked = tuple(step.t for step in steps)
        if self.every and asked != self.timesteps:
            raise StepPlanError(
                f"the weights were distilled for {len(self.timesteps)} calls at the timesteps {shown(self.timesteps)}, "
                f"but the plan makes {len(asked)} at {shown(asked)}; distil again for another sampler"
            )
        strange = [t for t in asked if t not in self.timesteps]
        if strange:
            raise StepPlanError(
                f"the weights were distilled at the timesteps {shown(self.timesteps)}, but the plan calls them at "
                f"{strange[0]:g}; distil again for another sampler"
            )
        guided = next((row for row, step in enumerate(steps) if step.guidance != "none"), None)
        if self.guidance_scale is not None and guided is not None:
            raise StepPlanError(
                f"step {guided} is guided, but the distilled weights give guidance of scale {self.guidance_scale:g} by "
                "themselves"
            )

    def started(self, row: int) -> Contract:
        """What holds for a run that begins at a row."""
        return replace(self, timesteps=self.timesteps[row:]) if self.every else self


def shown(timesteps: Sequence[float]) -> str:
    """The numbers in words, the middle left out where there are many."""
    texts = [f"{t:g}" for t in timesteps]
    return ", ".join(texts if len(texts) <= 8 else [*texts[:3], "...", texts[-1]])


def read(raw: dict[str, Any] | None) -> Contract | None:
    """A contract from its JSON object, or none; TypeError for values of another type."""
    if raw is None:
        return None
    fields = dict(raw)
    timesteps, scale = fields.pop("timesteps"), fields.pop("guidance_scale", None)
    if not isinstance(fields.get("every"), bool) or not isinstance(fields.get("prediction"), str):
        raise TypeError("the contract needs a prediction and whether every call is made")
    if not isinstance(timesteps, list) or not all(_is_number(t) for t in (*timesteps, 0.0 if scale is None else scale)):
        raise TypeError("timesteps and guidance scale of the contract are numbers")
    return Contract(
        timesteps=tuple(float(t) for t in timesteps),
        guidance_scale=None if scale is None else float(scale),
        **fields,
    )


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)
