"""How much a recipe lets a pass train: the fields that all passes that train have, and what follows from them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated

from annotated_types import Ge, Gt, Le

from compress.errors import RefusedError

if TYPE_CHECKING:
    from compress.passes.base import PassContext
    from compress.training.cost import SampleCost
    from compress.training.runs import Asked
    from compress.training.trainer import Schedule

RUNS_SEED = 1 << 32
"""Added to the seed for the teacher's runs: they share no noise with calibration or evaluation."""


@dataclass(kw_only=True)
class Effort:
    """How long and how fast; `updates`, or as many as fit into `minutes`.

    With both, a run that would take longer than `minutes` is refused beforehand.

    Attributes:
        updates: of the weights, in all.
        minutes: of training, on this machine; the teacher's runs come before.
        samples: runs of the teacher.
        batch: samples an update.
        accumulate: parts that a batch is computed in, for less memory.
        rate: the largest learning rate.
        average: decay of the averaged weights, which are the ones that are kept.
        bf16: networks compute in bfloat16 while training; the sampler's arithmetic stays float32.
    """

    updates: Annotated[int, Ge(1)] | None = None
    minutes: Annotated[float, Gt(0.0)] | None = None
    samples: Annotated[int, Ge(1)] = 256
    batch: Annotated[int, Ge(1)] = 16
    accumulate: Annotated[int, Ge(1)] = 1
    rate: Annotated[float, Gt(0.0), Le(1.0)] = 3e-4
    average: Annotated[float, Ge(0.0), Le(0.999999)] = 0.99
    bf16: bool = False

    def check_effort(self) -> None:
        """Refuse fields that do not go together.

        Raises:
            ValueError: begins with the field.
        """
        if self.updates is None and self.minutes is None:
            raise ValueError("updates: is missing; give updates, or minutes that they may take")
        if self.accumulate > self.batch:
            raise ValueError(f"accumulate: a batch of {self.batch} has no {self.accumulate} parts; give fewer")

    def schedule(self, seed: int, rounds: int = 1) -> Schedule:
        """Of one of so many rounds; with 0 updates where their number follows from the minutes."""
        from compress.training.trainer import Schedule

        return Schedule(
            updates=0 if self.updates is None else -(-self.updates // rounds),
            rate=self.rate,
            batch=self.batch,
            accumulate=self.accumulate,
            average=self.average,
            seed=seed,
        )

    def asked(self, context: PassContext) -> Asked:
        """The teacher's runs."""
        from compress.training.runs import Asked

        return Asked(context.prompts, context.seed + RUNS_SEED, self.samples, context.height, context.width)

    def seconds(self, what: str, sample: float) -> float:
        """What the updates will take.

        Args:
            what: is trained, as errors name it.
            sample: seconds an update takes for each of its samples.

        Raises:
            RefusedError: more than `minutes`.
        """
        if self.updates is None:
            return 60.0 * (self.minutes or 0.0)
        seconds = self.updates * self.batch * sample
        if self.minutes is not None and seconds > 60.0 * self.minutes:
            raise RefusedError(
                f"{what}: {self.updates} updates of {self.batch} samples would take {seconds / 60.0:.0f} minutes "
                f"here, and minutes allows {self.minutes:g}: give fewer, a smaller batch, or more minutes"
            )
        return seconds

    def memory(self, one: SampleCost) -> int:
        """Bytes at the peak of an update."""
        return int(one.memory(-(-self.batch // self.accumulate)))
