"""Methods that keep the outputs of attention and MLP layers: FORA, TaylorSeer, HiCache, SmoothCache, PAB, T-GATE."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import combinations
from typing import Any

from compress.caching import schedules
from compress.caching.decisions import smoothcache
from compress.caching.method import Job, Method, Recorder, rows_on
from compress.caching.part_schedules import pyramid, t_gate
from compress.caching.statistics import LookAhead
from compress.errors import RefusedError
from compress.families import Layout
from compress.families.layout import FULL, LayoutPath
from compress.families.sublayers import Kind
from export.step_plan import Step

CACHED = "cached"
EVERYTHING: Mapping[str, tuple[Kind, ...]] = {CACHED: ("self_attention", "cross_attention", "mlp")}
ATTENTION_AND_MLP: Mapping[str, tuple[Kind, ...]] = {
    "attention": ("self_attention", "cross_attention"),
    "mlp": ("mlp",),
}
ATTENTIONS: Mapping[str, tuple[Kind, ...]] = {
    "self_attention": ("self_attention",),
    "cross_attention": ("cross_attention",),
}


def layout_of(job: Job, groups: Mapping[str, Sequence[Kind]]) -> Layout:
    """One path per non-empty set of groups that are cached together; every path keeps what it computes.

    Groups the denoiser has no layers of are left out.

    Raises:
        RefusedError: it has none of any.
    """
    have = {layer.kind for layer in job.family.sublayers(job.denoiser)}
    present = [name for name, kinds in groups.items() if have.intersection(kinds)]
    if not present:
        raise RefusedError(f"a {job.family.name} denoiser has no layers of kind {', '.join(sorted(groups))}")
    reads: dict[str, dict[str, Any]] = {}
    for size in range(1, len(present) + 1):
        for chosen in combinations(present, size):
            kinds = [kind for name in chosen for kind in groups[name]]
            reads[path_name(chosen)] = job.family.sublayer_slots(job.denoiser, kinds)
    slots = {name: slot for read in reads.values() for name, slot in read.items()}
    kinds_of = {tensor: layer.kind for layer in job.family.sublayers(job.denoiser) for tensor in layer.tensors}
    every = [name for name in job.family.sublayer_slots(job.denoiser) if name in slots]
    paths = {FULL: LayoutPath(write=tuple(slots))}
    for name, read in reads.items():
        cached = {kind for group in name.split("+") for kind in groups[group]}
        # Where attention is cached, a text stream is not computed as it should be: what it gives is not to be kept.
        sound = every if "self_attention" in cached else slots
        paths[name] = LayoutPath(tuple(read), tuple(slot for slot in sound if kinds_of[slot] not in cached))
    return Layout(slots, paths)


def path_name(groups: Sequence[str]) -> str:
    """The path that reads these groups."""
    return "+".join(groups) if groups else FULL


def _chosen(layout: Layout, computed: Mapping[str, Sequence[bool]], calls: int) -> list[str]:
    """Path per row, from whether each group is computed in each row."""
    have = {name for path in layout.paths if path != FULL for name in path.split("+")}
    groups = [name for name in computed if name in have]
    return [path_name([name for name in groups if not computed[name][row]]) for row in range(calls)]


def _on(full: Sequence[int], calls: int) -> list[bool]:
    chosen = set(full)
    return [row in chosen for row in range(calls)]


def _everything(job: Job) -> Layout:
    return layout_of(job, EVERYTHING)


FORA = Method(
    paper="FORA, Selvaraju et al. 2024, arXiv 2407.01425",
    layout=_everything,
    paths=lambda job: rows_on(
        [*schedules.uniform(job.calls, job.options["interval"]), job.calls - 1], job.calls, CACHED
    ),
    options={"interval": 3},
)
"""Attention and MLP outputs are reused between every `interval`-th row; the last row is full."""

TAYLORSEER = Method(
    paper="TaylorSeer, Liu et al. 2025, arXiv 2503.06923",
    layout=_everything,
    paths=lambda job: rows_on(
        schedules.taylorseer(job.calls, job.options["interval"], min(job.options["warmup"], job.calls)),
        job.calls,
        CACHED,
    ),
    options={"interval": 4, "order": 2, "warmup": 3, "forecast": "taylor", "damping": None},
)
HICACHE = Method(
    paper="HiCache, Feng et al. 2025, arXiv 2508.16984",
    layout=_everything,
    paths=TAYLORSEER.paths,
    options={"interval": 4, "order": 2, "warmup": 3, "forecast": "hermite", "damping": 0.5},
)


def _look_ahead(job: Job) -> Recorder:
    layers = job.family.sublayers(job.denoiser)
    slots = layout_of(job, ATTENTION_AND_MLP).slots
    groups = {
        name: [tensor for layer in layers if layer.kind in kinds for tensor in layer.tensors if tensor in slots]
        for name, kinds in ATTENTION_AND_MLP.items()
    }
    return LookAhead({name: tensors for name, tensors in groups.items() if tensors}, job.options["max_run"])


def _smooth(job: Job) -> Sequence[str]:
    computed = {
        name: _on(smoothcache(errors, job.options["threshold"], job.options["max_run"]), job.calls)
        for name, errors in job.statistics.items()
    }
    if all(all(rows) for rows in computed.values()):
        raise RefusedError(
            f"calibration leaves none of the {job.calls} network calls to cache: raise `threshold`, or take more steps"
        )
    return _chosen(layout_of(job, ATTENTION_AND_MLP), computed, job.calls)


SMOOTHCACHE = Method(
    paper="SmoothCache, Liu et al. 2024, arXiv 2411.10510",
    layout=lambda job: layout_of(job, ATTENTION_AND_MLP),
    paths=_smooth,
    options={"threshold": 0.18, "max_run": 3},
    recorder=_look_ahead,
)
"""Attention and MLP have schedules of their own, as long as calibration finds their outputs within `threshold`."""


def _pyramid(job: Job) -> Sequence[str]:
    times, (low, high) = [step.t for step in job.plan.steps], job.options["timesteps"]
    computed = {
        "self_attention": _on(pyramid(times, job.options["interval"], low, high), job.calls),
        "cross_attention": _on(pyramid(times, job.options["cross_interval"], low, high), job.calls),
    }
    return _chosen(layout_of(job, ATTENTIONS), computed, job.calls)


PAB = Method(
    paper="Pyramid Attention Broadcast, Zhao et al. 2024, arXiv 2408.12588",
    layout=lambda job: layout_of(job, ATTENTIONS),
    paths=_pyramid,
    options={"interval": 2, "cross_interval": 6, "timesteps": (100.0, 800.0)},
)


def _t_gate_layout(job: Job) -> Layout:
    if not any(layer.kind == "cross_attention" for layer in job.family.sublayers(job.denoiser)):
        raise RefusedError(f"a {job.family.name} denoiser has no cross-attention, which T-GATE keeps")
    layout = layout_of(job, ATTENTIONS)
    crossed = {layer.tensors[0] for layer in job.family.sublayers(job.denoiser) if layer.kind == "cross_attention"}
    slots = {
        name: replace(slot, halves="mean" if slot.tensor in crossed else "each") for name, slot in layout.slots.items()
    }
    return replace(layout, slots=slots)


def _gate_row(job: Job) -> int:
    return max(1, round(job.options["gate_share"] * job.calls))


def _t_gate(job: Job) -> Sequence[str]:
    options = job.options
    rows = t_gate(job.calls, _gate_row(job), options["interval"], options["later_interval"])
    computed = {name: [getattr(row, name) for row in rows] for name in ATTENTIONS}
    return _chosen(layout_of(job, ATTENTIONS), computed, job.calls)


def _one_half(job: Job, steps: Sequence[Step]) -> Sequence[Step]:
    """After the gate only the conditional half runs, without guidance."""
    gate = _gate_row(job)
    return [
        replace(step, guidance="none", guidance_scale=1.0) if row >= gate else step for row, step in enumerate(steps)
    ]


T_GATE = Method(
    paper="T-GATE, Zhang et al. 2024, arXiv 2404.02747",
    layout=_t_gate_layout,
    paths=_t_gate,
    options={"gate_share": 0.4, "interval": 5, "later_interval": 1},
    finish=_one_half,
)
"""Cross-attention is computed in the first `gate_share` of the rows only; guidance ends with it."""
