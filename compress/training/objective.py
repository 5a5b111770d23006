"""An objective: a latent source, a target rule (which knows its teacher), a loss, and the student that is asked."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from compress.training.losses import Weight, weighted_error
from compress.training.runs import Runs
from compress.training.targets import Drawn, TargetRule
from compress.training.teacher import Network


def in_parts(batch: int, parts: int) -> list[slice]:
    """A batch in so many parts, equally long but for the last."""
    size = -(-batch // parts)
    return [slice(first, first + size) for first in range(0, batch, size)]


@dataclass(frozen=True)
class Objective:
    """What `compress.training.trainer.train` minimises.

    Attributes:
        source: the teacher's own runs.
        rule: which latents, and which clean latents are wanted there.
        student: over the module that learns.
        weight: of the loss, see `compress.training.losses`.
    """

    source: Runs
    rule: TargetRule
    student: Network
    weight: Weight = "snr+1"

    def losses(self, random: torch.Generator, batch: int, parts: int) -> list[Callable[[], Tensor]]:
        """See `compress.training.trainer.Learnable`."""
        drawn = self.rule.draw(self.source, random, batch)
        return [partial(self._loss, drawn.part(rows), batch) for rows in in_parts(batch, parts)]

    def _loss(self, drawn: Drawn, batch: int) -> Tensor:
        source, device = self.source, drawn.latents.device
        target = self.rule.target(source, drawn)
        signal, sigma = source.level(drawn.at)
        clean = self.student.clean(
            drawn.latents, source.times[drawn.at].to(device), signal, sigma, source.conditioned(drawn.runs)
        )
        return weighted_error(clean, target, signal, sigma, self.weight) * (len(drawn.latents) / batch)
