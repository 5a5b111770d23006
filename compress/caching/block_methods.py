"""Methods that keep what ranges of equal transformer blocks add: DDT, Delta-DiT, TeaCache, MagCache and their like."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from compress.caching import decisions
from compress.caching.dynamic_programme import one_anchor
from compress.caching.method import Job, Method, Recorder, rows_on
from compress.caching.part_schedules import delta_dit
from compress.caching.statistics import ChangeBetweenRows, CosineBetweenRows, Magnitudes, StepwiseChanges
from compress.errors import RefusedError
from compress.families import Layout
from export.step_plan import Gate

CACHED = "cached"


def _range(job: Job, first: int, last: int, watch: tuple[str, ...] = ()) -> Layout:
    slots = job.family.block_slots(job.denoiser, first, last)
    return replace(Layout.of(slots, {CACHED: tuple(slots)}), watch=watch)


def _some_cached(job: Job, full: Sequence[int]) -> list[str]:
    if len(full) == job.calls:
        raise RefusedError(
            f"calibration leaves none of the {job.calls} network calls to cache: raise `threshold`, or take more steps"
        )
    return rows_on(full, job.calls, CACHED)


# DDT: the encoder half is shared between rows, the decoder half is always fresh, its time embedding too.


def _encoder_blocks(job: Job) -> int:
    return int(job.options["front"] or job.share_of_blocks(22 / 28))


def _shared_encoder(job: Job) -> Sequence[str]:
    count = max(1, job.calls // job.options["interval"])
    return _some_cached(job, one_anchor(1.0 - job.statistics, count).rows)


def _cosine(job: Job) -> Recorder:
    return CosineBetweenRows(f"tokens_{_encoder_blocks(job)}", "tokens_0")


DDT = Method(
    paper="DDT, Wang et al. 2025, arXiv 2504.05741",
    layout=lambda job: _range(job, 0, _encoder_blocks(job)),
    paths=_shared_encoder,
    options={"front": None, "interval": 4},
    recorder=_cosine,
)
"""What the first blocks add is shared; rows are chosen by a dynamic programme over the cosine similarity of rows."""


# Delta-DiT: the rear blocks are cached while outlines form, the front blocks afterwards.


def _front(job: Job) -> int:
    return int(job.options["front"] or job.share_of_blocks(0.5))


def _two_ranges(job: Job) -> Layout:
    middle, count = _front(job), job.blocks
    if not 0 < middle < count:
        raise RefusedError(f"front: {middle} of {count} blocks leave none for the other side; give 1 to {count - 1}")
    front = job.family.block_slots(job.denoiser, 0, middle)
    rear = job.family.block_slots(job.denoiser, middle, count)
    return Layout.of(front | rear, {"front": tuple(front), "rear": tuple(rear)})


DELTA_DIT = Method(
    paper="Delta-DiT, Chen et al. 2024, arXiv 2406.01125",
    layout=_two_ranges,
    paths=lambda job: delta_dit(job.calls, round(job.options["boundary"] * job.calls), job.options["interval"]),
    options={"front": None, "boundary": 0.5, "interval": 2},
)
"""`boundary` is the share of the rows before which the rear blocks are the cached ones."""


# Gates on how far something cheap has moved; decided by calibration, or per sample at run time.


def _first_blocks(job: Job) -> int:
    return int(job.options["front"] or job.share_of_blocks(8 / 57))


def _gated_range(job: Job) -> Layout:
    front, back = _first_blocks(job), job.options.get("back", 0)
    if not 0 < front < job.blocks - back:
        raise RefusedError(f"front: {front} blocks before and {back} after leave none of {job.blocks} to cache")
    watch = (f"change_{front}",) if job.options["gate"] == "dynamic" else ()
    return _range(job, front, job.blocks - back, watch)


def _watched_change(job: Job) -> Recorder:
    return ChangeBetweenRows(f"tokens_{_first_blocks(job)}", "tokens_0")


def _moved(job: Job) -> Sequence[str]:
    options = job.options
    warmup = min(options.get("warmup") or 1, job.calls)
    if options["gate"] == "dynamic":
        return rows_on(range(warmup), job.calls, CACHED)
    limits = {"max_run": options["max_run"], "max_cached": options.get("max_cached")}
    return _some_cached(job, decisions.first_block(job.statistics, options["threshold"], warmup, **limits))


def _first_block_gate(job: Job) -> Gate:
    limit = job.options["max_run"] or job.calls
    return Gate(f"change_{_first_blocks(job)}", job.options["threshold"], limit, "last_full")


FIRST_BLOCK_CACHE = Method(
    paper="First-Block-Cache, ParaAttention 2024",
    layout=_gated_range,
    paths=_moved,
    options={"front": 1, "threshold": 0.05, "max_run": None, "gate": "static"},
    recorder=_watched_change,
    gate=_first_block_gate,
)
DBCACHE = Method(
    paper="DBCache, cache-dit 2025",
    layout=_gated_range,
    paths=_moved,
    options={
        "front": None,
        "back": 0,
        "threshold": 0.08,
        "warmup": 8,
        "max_run": None,
        "max_cached": None,
        "gate": "static",
    },
    recorder=_watched_change,
    gate=_first_block_gate,
)
"""First-Block-Cache with `front` blocks watched (8 of 57, in proportion) and `back` blocks always fresh."""


def _all_blocks(job: Job) -> Layout:
    watch = ("modulated",) if job.options.get("gate") == "dynamic" else ()
    return _range(job, 0, job.blocks, watch)


def _modulated(job: Job) -> Recorder:
    first = next(s.module for s in job.family.sublayers(job.denoiser) if s.kind == "self_attention")
    return StepwiseChanges(first, f"tokens_{job.blocks}", "tokens_0")


def _accumulated(job: Job) -> Sequence[str]:
    if job.options["gate"] == "dynamic":
        if job.options["polynomial"] is None:
            raise RefusedError("polynomial: a dynamic gate needs coefficients, highest power first: calibrate first")
        return rows_on([0, job.calls - 1], job.calls, CACHED)
    inputs, outputs = job.statistics
    polynomial = job.options["polynomial"]
    if polynomial is None:
        polynomial = decisions.fit_polynomial(inputs[1:], outputs[1:], min(4, len(inputs) - 2))
    return _some_cached(job, decisions.teacache(inputs, polynomial, job.options["threshold"]))


TEACACHE = Method(
    paper="TeaCache, Liu et al. 2024, arXiv 2411.19108",
    layout=_all_blocks,
    paths=_accumulated,
    options={"threshold": 0.25, "polynomial": None, "max_run": None, "gate": "static"},
    recorder=_modulated,
    gate=lambda job: Gate(
        "modulated",
        job.options["threshold"],
        job.options["max_run"] or job.calls,
        "previous",
        tuple(job.options["polynomial"]),
    ),
)
"""The polynomial from changes of the input to changes of the output is fitted in calibration."""


def _magnitudes(job: Job) -> Recorder:
    return Magnitudes(f"tokens_{job.blocks}", "tokens_0")


def _magnitude_rows(job: Job) -> Sequence[str]:
    options = job.options
    limits = (options["threshold"], options["max_run"], options["retention"])
    return _some_cached(job, decisions.magcache(list(job.statistics), *limits))


MAGCACHE = Method(
    paper="MagCache, Ma et al. 2025, arXiv 2506.09045",
    layout=_all_blocks,
    paths=_magnitude_rows,
    options={"threshold": 0.06, "max_run": 3, "retention": 0.2},
    recorder=_magnitudes,
)
