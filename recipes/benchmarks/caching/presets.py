"""What the caching benchmark measures: models, samplers, presets of the `cache` pass, and numbers of steps."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

SHARES = (0.9, 0.75, 0.6, 0.5, 0.4, 0.3, 0.2, 0.14, 0.1)
"""Of the steps: how many the runs with fewer steps take."""

CACHED_SHARE = 0.55
"""What a cached run costs of the full one before it is measured; for the time left alone."""

SAMPLERS: dict[str, dict[str, dict[str, Any]]] = {
    "unet": {
        "DPMSolverMultistepScheduler": {},
        "DDIMScheduler": {"clip_sample": False},
        "UniPCMultistepScheduler": {},
    },
    "mmdit": {
        "FlowMatchEulerDiscreteScheduler": {},
        "FlowMatchHeunDiscreteScheduler": {},
        "UniPCMultistepScheduler": {"prediction_type": "flow_prediction", "use_flow_sigmas": True, "flow_shift": 1.5},
    },
}
"""Model -> scheduler -> its options; the first scheduler is the model's own."""

_UNET = "encoder-propagation fora taylorseer hicache smoothcache pab t-gate guidance-interval low-resolution-start"
_MMDIT = (
    "ddt delta-dit fora smoothcache teacache first-block-cache dbcache magcache taylorseer hicache pab "
    "guidance-interval low-resolution-start"
)

PRESETS: dict[str, dict[str, dict[str, Any]]] = {
    "unet": {
        "deepcache": {"method": "deepcache", "cut": 0, "interval": 3},
        "deepcache taylor1": {"method": "deepcache", "cut": 0, "interval": 4, "forecast": "taylor1"},
        "deepcache signed-power": {"method": "deepcache", "cut": 0, "interval": 3, "schedule": "signed-power"},
        **{name: {"method": name} for name in _UNET.split()},
    },
    "mmdit": {
        "deepcache": {"method": "deepcache", "cut": 1, "interval": 3},
        "deepcache taylor1": {"method": "deepcache", "cut": 1, "interval": 4, "forecast": "taylor1"},
        **{name: {"method": name} for name in _MMDIT.split()},
    },
}
"""Model -> entry -> keys of the pass."""


@dataclass(frozen=True)
class Run:
    """One sampler of one model at one number of steps; all its entries are compared with its entry `full`."""

    model: str
    sampler: str
    steps: int

    def __str__(self) -> str:
        return f"{self.model} {self.sampler} {self.steps}"

    @property
    def calls(self) -> int:
        """Network calls of the full run, for the time left: a Heun sampler makes two a step."""
        return 2 * self.steps - 1 if "Heun" in self.sampler else self.steps

    def fewer(self) -> list[int]:
        """The numbers of steps of the runs with fewer of them."""
        wanted = {max(1, round(share * self.steps)) for share in SHARES}
        return sorted((count for count in wanted if count < self.steps), reverse=True)

    def entries(self, budgets: Sequence[float] = (), only: Sequence[str] | None = None) -> list[str]:
        """Names of what is measured, in order; `full` is always among them."""
        names = ["full", *(f"{count} steps" for count in self.fewer()), *PRESETS[self.model]]
        names += [f"optimised {budget:g}" for budget in budgets]
        return [name for name in names if only is None or name == "full" or name in only]

    def work(self, entry: str) -> float:
        """Full network calls a sample that an entry may take."""
        if entry == "full":
            return float(self.calls)
        count = steps_of(entry)
        return self.calls * (CACHED_SHARE if count is None else count / self.steps)


def steps_of(entry: str) -> int | None:
    """The steps of an entry with fewer of them; None for every other entry."""
    return int(entry.removesuffix(" steps")) if entry.endswith(" steps") else None


def budget_of(entry: str) -> float | None:
    """The latency ratio of an optimised entry; None for every other entry."""
    return float(entry.removeprefix("optimised ")) if entry.startswith("optimised ") else None


def runs(models: Sequence[str], samplers: Sequence[str], steps: Sequence[int]) -> Iterator[Run]:
    """Every run asked for, what matters most first: the models' own samplers at all steps, then the other samplers.

    Args:
        models: keys of `SAMPLERS`.
        samplers: `default`, `all`, or names of schedulers.
        steps: in the order given.
    """
    for place in range(max(len(SAMPLERS[model]) for model in models)):
        for count in steps:
            for model in models:
                for name in list(SAMPLERS[model])[place : place + 1]:
                    if "all" in samplers or name in samplers or (place == 0 and "default" in samplers):
                        yield Run(model, name, count)
