"""A method that begins at a low resolution: the first calls see a smaller latent, which the plan then enlarges."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from compress.caching.method import Job, Method, Starts
from compress.errors import RefusedError
from export.step_plan import Step


def _clean(job: Job, step: Step) -> tuple[float, float]:
    """Coefficients of latent and network output that give the clean estimate of a row.

    With x = signal clean + sigma noise: a noise prediction gives (x - sigma m) / signal; v = signal noise - sigma clean
    gives signal x - sigma m where signal^2 + sigma^2 = 1; a flow, noise - clean, gives x - sigma m.
    """
    signal, sigma = step.signal, step.sigma
    match job.plan.prediction:
        case "epsilon" if signal > 0.0:
            return 1.0 / signal, -sigma / signal
        case "v_prediction" if abs(signal**2 + sigma**2 - 1.0) < 1e-3:
            return signal, -sigma
        case "flow":
            return 1.0, -sigma
        case "sample":
            return 0.0, 1.0
    raise RefusedError(
        f"the clean estimate of a {job.plan.prediction} prediction is not known for this sampler: take another sampler"
    )


def _smaller(job: Job, steps: Sequence[Step]) -> Sequence[Step]:
    """Rows at the level up to where sampling may begin anew; from there on as image-to-image would go on."""
    sizes = {axis for axes in job.family.dynamic_axes().values() for axis in axes.values()}
    if not {"height", "width"} <= sizes:
        raise RefusedError(f"a {job.family.name} denoiser has one size, so it cannot begin at a smaller one")
    level, wanted = job.options["level"], max(1, round(job.options["share"] * job.calls))
    begins = [row for row in sorted(job.plan.starts) if row >= wanted]
    if not 0.0 < level < 1.0 or not begins:
        raise RefusedError(
            f"level {level:g} for {job.options['share']:g} of the calls: give a level and a share inside (0, 1)"
        )
    rise = begins[0]
    rows = [replace(step, level=level) if row < rise else step for row, step in enumerate(steps)]
    x, m = _clean(job, rows[rise - 1])
    rows[rise - 1] = replace(rows[rise - 1], x={0: x} if x else {}, m={0: m}, noise=0.0)
    for row, update in enumerate(job.plan.starts[rise], start=rise):
        rows[row] = replace(rows[row], x=update.x, m=update.m, noise=update.noise)
    return rows


def _risen(job: Job, steps: Sequence[Step]) -> Starts:
    """Late starts after the rise alone: a picture has the full size."""
    rise = next(row for row, step in enumerate(steps) if step.level == 1.0)
    return {row: updates for row, updates in job.plan.starts.items() if row >= rise}


LOW_RESOLUTION_START = Method(
    paper="after LowDiff, 2025, arXiv 2509.15342, without its training",
    layout=lambda job: None,
    paths=lambda job: [step.path for step in job.plan.steps],
    options={"level": 0.5, "share": 0.3},
    finish=_smaller,
    starts=_risen,
)
"""The first `share` of the calls run at `level` of height and width; the model must know such sizes."""
