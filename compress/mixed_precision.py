"""Mixed precision: layers of the denoiser get fewer bits where that costs least, by a budget of size or of quality."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from pydantic import BaseModel, ConfigDict, Field

from compress.errors import RefusedError
from compress.progress import Progress
from compress.quantization.scheme import SCHEMES, Scheme, scheme

if TYPE_CHECKING:
    from compress.passes.base import Edit
    from compress.prospects import Prospects
    from export.target import Target

UP_TO = "up to "
"""Before the scheme of a layer that may get fewer bits."""
HALVINGS = 6
"""Of the span of sizes, in search of the smallest one that is good enough."""

DOUBTFUL = 3.0
"""Uniform formats whose predicted error is no more than so many times the chosen one's are measured against it."""
RIVALS = 2
"""The best of them."""

Formats = Callable[[Scheme], list[Scheme]]
"""What a layer of some scheme may get, that scheme included."""


class Budget(BaseModel):
    """What the denoiser may cost; exactly one of the two.

    Attributes:
        size_ratio: its bytes at most, as a share of those in float32.
        latent_psnr_db: of its pictures' latents against the float model's at least: the mean over calibration noises.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)
    size_ratio: float | None = Field(default=None, gt=0.0, lt=1.0)
    latent_psnr_db: float | None = Field(default=None, gt=0.0, le=100.0)


def formats_below(top: Scheme, targets: Sequence[Target]) -> list[Scheme]:
    """The formats that round activations as `top` does, in no more bits a weight, and run as fast on every target."""
    return [
        row
        for row in SCHEMES.values()
        if row.is_quantized and row.activation == top.activation and row.weight.bits <= top.weight.bits
        if all(target.formats.get(row.name) == target.formats.get(top.name) for target in targets)
    ]


def limit(edit: Edit) -> Scheme | None:
    """The largest scheme that the budget may give a layer; None where it has no choice."""
    return scheme(edit.action.removeprefix(UP_TO)) if edit.action.startswith(UP_TO) else None


def limited(edits: Sequence[Edit], open_layers: Mapping[str, Scheme], budget: Budget, formats: Formats) -> list[Edit]:
    """The edits of the denoiser with upper limits in the place of schemes, where the budget has a choice.

    Args:
        edits: of the denoiser.
        open_layers: module of an edit -> its scheme, where nobody has asked for one by name.
        budget: of the denoiser.
        formats: what there is to choose from.

    Raises:
        RefusedError: there is no choice, or even the fewest bits are too many.
    """
    planned, least = [], 0
    for edit in edits:
        top = open_layers.get(edit.module)
        choice = [] if top is None else formats(top)
        if top is None or len(choice) < 2:
            planned.append(edit)
            least += edit.bytes_after
            continue
        why = f"{edit.reason}; the budget may give it fewer bits"
        planned.append(replace(edit, action=UP_TO + top.name, reason=why))
        least += int(edit.bytes_after * min(row.weight.bits for row in choice) / top.weight.bits)
    if not any(limit(edit) for edit in planned):
        raise RefusedError(
            "quantize.budget: no layer of the denoiser has a choice: no format has fewer bits than its scheme and "
            "rounds activations alike; give formats, or another scheme"
        )
    whole = sum(edit.bytes_before for edit in edits)
    if budget.size_ratio is not None and least > budget.size_ratio * whole:
        raise RefusedError(
            f"quantize.budget: size_ratio is {budget.size_ratio:g}, but the fewest bits of every layer come to "
            f"{least / whole:.3f}: raise it, or give formats of fewer bits"
        )
    return planned


def decided(edits: Sequence[Edit], schemes: Mapping[str, str], found: Prospects) -> list[Edit]:
    """The edits with the schemes that were chosen, layer -> scheme."""
    whole = []
    for edit in edits:
        if limit(edit) is not None:
            name = edit.module.partition(".")[2]
            chosen = schemes[name]
            size = next(option.bytes for option in found.options[name] if option.scheme == chosen)
            edit = replace(edit, action=chosen, bytes_after=size)
        whole.append(edit)
    return whole


def choose(
    edits: Sequence[Edit],
    budget: Budget,
    found: Prospects,
    measure: Callable[[list[Edit]], float],
    progress: Progress,
) -> list[Edit]:
    """The edits of the denoiser within the budget; never worse, on calibration noises, than a uniform format that fits.

    Args:
        edits: with upper limits.
        budget: of the denoiser.
        found: what each limited layer could be.
        measure: edits -> latent PSNR, in dB.
        progress: receives (what, done, total).

    Raises:
        RefusedError: it cannot be kept.
    """
    if budget.latent_psnr_db is not None:
        return _smallest(edits, budget.latent_psnr_db, found, measure, progress)
    fixed = sum(edit.bytes_after for edit in edits if limit(edit) is None)
    room = int((budget.size_ratio or 0.0) * sum(edit.bytes_before for edit in edits)) - fixed
    schemes = found.within(room)
    if schemes is None:
        raise RefusedError(
            f"quantize.budget: size_ratio is {budget.size_ratio:g}, which leaves {room} bytes to layers that take "
            f"{found.bounds[0]} at least: raise it, or give formats of fewer bits"
        )
    best = decided(edits, schemes, found)
    rivals = found.rivals(room, DOUBTFUL * found.error(schemes))[:RIVALS]
    if not rivals:
        return best
    tried = [best, *(decided(edits, rival, found) for rival in rivals)]
    reached = []
    for done, one in enumerate(tried):
        reached.append(measure(one))
        progress("compare with uniform formats", done + 1, len(tried))
    return tried[reached.index(max(reached))]


def summary(edits: Sequence[Edit], found: Prospects) -> dict[str, Any]:
    """For the provenance: how many layers have each format, and how well errors were predicted."""
    counts = Counter(edit.action for edit in edits if edit.module.partition(".")[2] in found.options)
    return {"formats": dict(counts.most_common()), "rank_correlation": found.rank_correlation}


def _smallest(
    edits: Sequence[Edit],
    needed: float,
    found: Prospects,
    measure: Callable[[list[Edit]], float],
    progress: Progress,
) -> list[Edit]:
    """The fewest bytes that a measurement finds good enough."""
    low, high = found.bounds
    widest = found.within(high)
    best = decided(edits, widest or {}, found)
    reached = measure(best)
    if reached < needed:
        raise RefusedError(
            f"quantize.budget: latent_psnr_db is {needed:g}, but the largest formats reach {reached:.1f} dB on "
            "calibration noises: lower it, or give a scheme of more bits (or scaled by token)"
        )
    for done in range(HALVINGS):
        middle = round((low * high) ** 0.5)
        schemes = found.within(middle)
        tried = None if schemes is None else decided(edits, schemes, found)
        if tried is not None and measure(tried) >= needed:
            best, high = tried, middle
        else:
            low = middle
        progress("find the smallest size", done + 1, HALVINGS)
    return best
