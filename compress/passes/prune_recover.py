"""The field `recover` of the pass `prune`: what is left of the denoiser is trained to be what it was."""

from __future__ import annotations

import copy
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Annotated, Self

from annotated_types import Ge, Le

from compress.cost import Cost
from compress.training.effort import Effort

if TYPE_CHECKING:
    from compress.model.latent_diffusion import LatentDiffusion
    from compress.passes.base import PassContext
    from compress.training.cost import SampleCost
    from compress.training.features import Block


@dataclass(kw_only=True)
class Recover(Effort):
    """Training after the cuts, by the network as it was, on its own samples; see `compress.training.recovery`.

    Attributes:
        output: weight of the error to what the whole network gives.
        denoise: of the denoising loss.
        features: of the normalised errors of block outputs; they pay in long runs alone.
        unconditional: share of the samples without their prompt, where the plan is guided.
    """

    output: Annotated[float, Ge(0.0)] = 1.0
    denoise: Annotated[float, Ge(0.0)] = 0.1
    features: Annotated[float, Ge(0.0)] = 0.0
    unconditional: Annotated[float, Ge(0.0), Le(1.0)] = 0.2

    def __post_init__(self) -> None:
        """Refuse fields that do not go together."""
        self.check_effort()
        if not self.output + self.denoise + self.features:
            raise ValueError("output: is 0, and denoise and features too; nothing would be learned")

    def cost(self, one: SampleCost, calls: int, share: float) -> Cost:
        """What it will take.

        Args:
            one: sample, before the cuts.
            calls: of the step plan.
            share: of the multiply-accumulates that is left.

        Raises:
            RefusedError: more than `minutes`.
        """
        training = self.seconds("prune.recover", one.update * share + one.forward)
        memory = self.memory(one) + int(one.weights)  # those of the teacher
        seconds = training + self.samples * calls * one.forward
        return Cost("recovery", seconds, memory, "fewer prune.recover.updates, or a smaller batch")


@dataclass(frozen=True)
class Whole:
    """A model before its cuts.

    Attributes:
        model: with a denoiser of its own.
        blocks: path -> block, of the denoiser that will be cut.
    """

    model: LatentDiffusion
    blocks: dict[str, Block]

    @classmethod
    def of(cls, model: LatentDiffusion) -> Self:
        """Keep a copy."""
        from compress.training.features import blocks_of

        blocks = blocks_of(model.family.units(model.denoiser), model.denoiser)
        kept = replace(model, denoiser=copy.deepcopy(model.denoiser), structures=dict(model.structures))
        return cls(kept, blocks)

    def teach(self, model: LatentDiffusion, how: Recover, context: PassContext) -> None:
        """Train what is left."""
        from compress.training.recovery import Terms, recover

        paths = {id(module): path for path, module in model.denoiser.named_modules()}
        left = [(path, paths[id(block)]) for path, block in self.blocks.items() if id(block) in paths]
        recover(
            model,
            self.model,
            left,
            Terms(how.output, how.denoise, how.features, how.unconditional),
            how.asked(context),
            how.schedule(context.seed),
            minutes=how.minutes,
            bf16=how.bf16,
            store=context.store,
            progress=context.progress,
        )
