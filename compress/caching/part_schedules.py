"""Published schedules of parts: which attentions or blocks are computed at each network call, the others cached.

A row is one network call, counted from 0.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, NamedTuple

from compress.errors import RefusedError


class AttentionRow(NamedTuple):
    """Which attentions a row computes; the others are read from the last row that computed them."""

    self_attention: bool
    cross_attention: bool


Blocks = Literal["full", "rear", "front"]
"""What a row of Δ-DiT reads from its cache: nothing, the offset of the rear blocks, or that of the front blocks."""


def pyramid(timesteps: Sequence[float], interval: int, low: float = 100, high: float = 800) -> list[int]:
    """The rows at which one kind of attention is computed, ascending: Pyramid Attention Broadcast.

    Row 0, every row whose timestep is not strictly between `low` and `high`, and every `interval`-th row, counted from
    the first row of all and not from where the range begins; as `PyramidAttentionBroadcastConfig` of diffusers decides
    (Zhao et al. 2024, arXiv 2408.12588, where spatial attention has interval 2, temporal 4 and cross 6).

    Args:
        timesteps: one per row, in the units of the scheduler (0 to 1000).
        interval: rows from one computed row of the range to the next.
        low: the timestep above which attention may be reused.
        high: the timestep below which it may.

    Raises:
        RefusedError: `interval` is below 1.
    """
    if interval < 1:
        raise RefusedError(f"interval is {interval}: give 1 or more")
    return [row for row, t in enumerate(timesteps) if row % interval == 0 or not low < t < high]


def t_gate(
    calls: int,
    gate: int | None = None,
    self_interval: int = 5,
    later_interval: int = 1,
    warmup: int | None = None,
) -> list[AttentionRow]:
    """Which attentions every row computes under T-GATE (Zhang et al. 2024, arXiv 2404.02747).

    Cross-attention is computed in the first `gate` rows and never again; row `gate - 1` keeps it, averaged over the two
    halves of classifier-free guidance, and the rows from `gate` on need one half only, without guidance.
    Self-attention is computed in rows 0 to `warmup`, then in multiples of `self_interval`, in row `gate - 1`, and after
    the gate in multiples of `later_interval`.

    Args:
        calls: rows in all.
        gate: how many rows compute cross-attention; by default 10 of 25, scaled to `calls`.
        self_interval: of self-attention before the gate; an interval is a distance and is not scaled.
        later_interval: of self-attention after the gate.
        warmup: the last row of the warm-up; by default row 2 of 25, scaled to `calls`.

    Raises:
        RefusedError: a number is out of range.
    """
    if calls < 1:
        raise RefusedError(f"calls is {calls}: give 1 or more")
    gate = max(1, round(10 * calls / 25)) if gate is None else gate
    warmup = round(2 * calls / 25) if warmup is None else warmup
    if not 1 <= gate <= calls:
        raise RefusedError(f"gate is {gate}: give 1 to {calls}, the number of rows")
    if self_interval < 1 or later_interval < 1 or warmup < 0:
        raise RefusedError("an interval of self-attention is at least 1, and its warm-up at least 0")
    rows = []
    for row in range(calls):
        before = row <= warmup or row % self_interval == 0 or row == gate - 1
        rows.append(AttentionRow(before if row < gate else row % later_interval == 0, row < gate))
    return rows


def delta_dit(calls: int, boundary: int, interval: int) -> list[Blocks]:
    """What every row reads from its cache under Δ-DiT (Chen et al. 2024, arXiv 2406.01125).

    Every `interval`-th row is `full`. The others cache the rear blocks before row `boundary`, when outlines form (the
    front blocks make them), and the front blocks from it on, when details do.

    Raises:
        RefusedError: a number is out of range.
    """
    if calls < 1 or interval < 1:
        raise RefusedError(f"calls is {calls} and interval is {interval}: give 1 or more")
    if not 0 <= boundary <= calls:
        raise RefusedError(f"boundary is {boundary}: give 0 to {calls}, the number of rows")
    return ["full" if row % interval == 0 else "rear" if row < boundary else "front" for row in range(calls)]
