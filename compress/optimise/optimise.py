"""From a budget to a plan: the lab is opened, the search is run, and its finding becomes a layout and a step plan."""

from __future__ import annotations

import tempfile
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from compress.errors import RefusedError
from compress.optimise.lab import Lab, open_lab
from compress.optimise.search import Finding, Judged, Search, settle

if TYPE_CHECKING:
    from compress.families import Layout
    from compress.model.latent_diffusion import LatentDiffusion
    from compress.passes.base import PassContext
    from export.step_plan import StepPlan

CUTS = 4
"""Cuts that are exported and searched at most."""
RATIOS = (0.6, 0.4, 0.28, 0.2, 0.14, 0.1)
"""Latency ratios tried for a quality that is asked for, slowest first."""
WORTH = 0.8
"""A cut whose shallow path has more than this share of the MACs saves too little to be considered."""


@dataclass(frozen=True)
class Budget:
    """What the user asks for: exactly one of the two, and how long one search may take.

    Attributes:
        latency_ratio: network time at most, as a share of the uncached run's.
        psnr_db: latent PSNR against the uncached run at least, the mean over held-out noises; the fastest plan wins.
        seconds: of one search, after the graphs are exported and timed.
    """

    latency_ratio: float | None = None
    psnr_db: float | None = None
    seconds: float = 40.0


def optimise(model: LatentDiffusion, budget: Budget, context: PassContext) -> tuple[Layout | None, StepPlan]:
    """Find the best plan for a budget.

    A searched plan is chosen only if it beats uniform caching and fewer steps at equal measured latency, on noises it
    was not searched on; otherwise the better of these two is. What was found is kept in the plan's key as `optimised`.

    Raises:
        RefusedError: no target runs here, or nothing reaches what was asked.
    """
    with tempfile.TemporaryDirectory(prefix="optimise-") as folder:
        lab = open_lab(model, candidate_cuts(model), context, Path(folder), budget.seconds)
        if budget.latency_ratio is not None:
            finding = _search(lab, budget.latency_ratio, budget.seconds, context)
        else:
            finding = _fastest(lab, float(budget.psnr_db or 0.0), budget.seconds, context)
        layout, plan = lab.build(finding.chosen.candidate)
        return layout, replace(plan, key={**plan.key, "optimised": _said(lab, finding)})


def candidate_cuts(model: LatentDiffusion) -> list[int]:
    """The cuts worth searching: those that save most, at different costs."""
    cuts = [cut for cut in model.family.cuts(model.denoiser) if cut.macs_share <= WORTH]
    if not cuts:
        raise RefusedError("cache: no cut of this denoiser saves a fifth of its MACs, so there is nothing to search")
    chosen = cuts[:1]
    for cut in cuts[1:]:
        if cut.macs_share > 1.5 * chosen[-1].macs_share + 0.02:
            chosen.append(cut)
    return [cut.index for cut in chosen[:CUTS]]


def _search(lab: Lab, ratio: float, seconds: float, context: PassContext) -> Finding:
    def told(done: int, left: float) -> None:
        context.progress(f"search at {ratio:.2g} of the latency", max(0, int(seconds - left)), int(seconds))

    search = Search(lab, ratio * lab.full_ms, seconds, progress=told)
    return settle(search, search.run())


def _fastest(lab: Lab, decibels: float, seconds: float, context: PassContext) -> Finding:
    """Halve the interval of ratios until the fastest that keeps the quality is known to the grid."""
    low, high, best = 0, len(RATIOS) - 1, None
    while low <= high:
        middle = (low + high) // 2
        try:
            finding = _search(lab, RATIOS[middle], seconds, context)
        except RefusedError:
            high = middle - 1
            continue
        if finding.chosen.decibels >= decibels:
            best, low = finding, middle + 1
        else:
            high = middle - 1
    if best is None:
        raise RefusedError(
            f"cache: optimize.psnr_db: no plan at {RATIOS[0]:.0%} of the latency reaches {decibels:g} dB: ask for less"
        )
    return best


def _said(lab: Lab, finding: Finding) -> dict[str, Any]:
    """What was found, for the plan's key and the report."""

    def row(judged: Judged | None) -> dict[str, Any] | None:
        if judged is None:
            return None
        one = judged.candidate
        return {
            "held_out_psnr_db": round(judged.decibels, 2),
            "latency_ratio": round(judged.latency / lab.full_ms, 4),
            "calls": one.calls,
            "full_calls": one.full_calls,
            "strip": one.strip,
            "cut": one.cut,
            "damping": one.damping,
            "points": None if one.points is None else list(one.points),
        }

    simpler = finding.chosen != finding.searched
    return {
        "chosen": row(finding.chosen),
        "fewer_steps": row(finding.fewer),
        "uniform_caching": row(finding.uniform),
        "verdict": "the simpler plan is as good, and is kept" if simpler else "the searched plan beats both",
        "full_ms": round(lab.full_ms, 3),
    }
