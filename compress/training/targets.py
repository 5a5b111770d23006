"""Target rules: which latents a student is shown, and which clean latents it is asked for there."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Protocol

import torch
from torch import Tensor

from compress.training.runs import Runs
from compress.training.teacher import Teacher


@dataclass(frozen=True)
class Drawn:
    """Where a student is asked, a sample a row.

    Attributes:
        latents: float32 (samples, channels, h, w), as the network takes them.
        at: points of the runs' levels, int64 (samples,).
        runs: which runs the samples are of, int64 (samples,).
    """

    latents: Tensor
    at: Tensor
    runs: Tensor

    def part(self, rows: slice) -> Drawn:
        """Some of the samples."""
        return replace(self, latents=self.latents[rows], at=self.at[rows], runs=self.runs[rows])


def noised(source: Runs, random: torch.Generator, count: int) -> Drawn:
    """Clean latents of the teacher's runs with fresh noise, at all points alike."""
    runs = torch.randint(len(source.states), (count,), generator=random)
    at = torch.randint(len(source.times), (count,), generator=random)
    clean = source.states[runs, -1]
    noise = torch.randn(clean.shape, generator=random).to(clean.device)
    signal, sigma = source.level(at)
    return Drawn(signal * clean + sigma * noise, at, runs)


class TargetRule(Protocol):
    """One way to teach."""

    def draw(self, source: Runs, random: torch.Generator, count: int) -> Drawn:
        """Choose latents; every random number comes from `random`."""
        ...

    def target(self, source: Runs, drawn: Drawn) -> Tensor:
        """The clean latents wanted there, float32 (samples, channels, h, w)."""
        ...


@dataclass(frozen=True)
class GuidedTarget:
    """The teacher's own guided estimate, of noised samples, at all points of its plan alike.

    Source: Meng et al. 2022, arXiv 2210.03142, section 3.1, at one guidance scale, which need not be told.

    Attributes:
        teacher: to be imitated.
        scales: of classifier-free guidance at every point, float32 (points,); 1 is none.
    """

    teacher: Teacher
    scales: Tensor

    def draw(self, source: Runs, random: torch.Generator, count: int) -> Drawn:
        """Samples of the teacher with fresh noise."""
        return noised(source, random, count)

    @torch.no_grad()
    def target(self, source: Runs, drawn: Drawn) -> Tensor:
        """`uncond + scale * (cond - uncond)`, as a clean latent."""
        signal, sigma = source.level(drawn.at)
        conditioning, times = source.conditioned(drawn.runs), source.times[drawn.at]
        return self.teacher.guided(drawn.latents, times, signal, sigma, conditioning, self.scales[drawn.at])


@dataclass(frozen=True)
class SegmentTarget:
    """The clean latent for which one deterministic step lands where the teacher's own run came to in several.

    The runs' points are the student's own: from each, it is to reach the next (cf. Yan et al. 2024, arXiv 2405.07510).
    With two teacher steps to a segment this is progressive distillation (Salimans and Ho 2022, arXiv 2202.00512,
    algorithm 2), on latents that the sampler really visits.
    """

    def draw(self, source: Runs, random: torch.Generator, count: int) -> Drawn:
        """Points on the teacher's runs."""
        runs = torch.randint(len(source.states), (count,), generator=random)
        at = torch.randint(source.states.shape[1] - 1, (count,), generator=random)
        return Drawn(source.states[runs, at], at, runs)

    def target(self, source: Runs, drawn: Drawn) -> Tensor:
        """See `between`."""
        after = source.states[drawn.runs, drawn.at + 1]
        return between(drawn.latents, after, source.level(drawn.at), source.level(drawn.at + 1))


def between(before: Tensor, after: Tensor, level: tuple[Tensor, Tensor], following: tuple[Tensor, Tensor]) -> Tensor:
    """The clean latent x that solves `before = signal * x + sigma * noise` and the same for `after`, with one noise.

    Args:
        before: latents (samples, channels, h, w).
        after: the same, less noisy.
        level: signal and sigma of `before`, (samples, 1, 1, 1).
        following: of `after`.
    """
    (signal, sigma), (signal_after, sigma_after) = level, following
    return (sigma * after - sigma_after * before) / (signal_after * sigma - sigma_after * signal)
