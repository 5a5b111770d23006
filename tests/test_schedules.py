"""Published schedules: full rows and parts, against what was published, what diffusers does, and by hand."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from typing import Any

import pytest
import torch
from diffusers import CacheMixin, PyramidAttentionBroadcastConfig, TaylorSeerCacheConfig
from diffusers.models.attention_processor import Attention
from typing_extensions import override

from compress.caching import part_schedules, schedules
from compress.errors import RefusedError


def test_uniform_by_hand() -> None:
    assert schedules.uniform(10, 3) == [0, 3, 6, 9]
    assert schedules.uniform(10, 4, 2) == [0, 1, 5, 9]
    assert schedules.uniform(7, 3, 3) == [0, 1, 2, 5]
    assert schedules.uniform(1, 5) == [0]


def test_signed_power_as_published() -> None:
    assert schedules.signed_power(50, 10) == [0, 6, 11, 14, 15, 19, 24, 29, 35, 42]
    assert schedules.signed_power(100, 10) == schedules.signed_power(100, 10, center=30)
    assert schedules.signed_power(12, 4, power=1.0) == [0, 3, 6, 9]


def test_signed_power_is_lowered_only_until_no_rows_coincide() -> None:
    crowded = schedules.signed_power(50, 25)
    assert crowded == [0, 3, 5, 7, 9, 11, 12, 14, 15, 16, 17, 19, 21, 23, 25, 27, 29, 31, 33, 36, 38, 40, 42, 45, 47]
    assert crowded != list(range(0, 50, 2))
    assert schedules.signed_power(50, 50) == list(range(50))


def test_signed_power_gives_every_number_of_rows() -> None:
    for calls in range(1, 61):
        for number in range(1, calls + 1):
            rows = schedules.signed_power(calls, number)
            assert rows[0] == 0
            assert len(rows) == number
            assert rows == sorted(set(rows))
            assert rows[-1] < calls


def test_signed_power_crowds_around_its_center() -> None:
    rows = schedules.signed_power(100, 12, center=60, power=1.6)
    gaps = {(late - early) for early, late in pairwise(rows) if abs(early - 60) < 8}
    assert max(gaps) < rows[1] - rows[0]
    assert max(gaps) < 100 - rows[-1]


class OneAttention(torch.nn.Module, CacheMixin):
    """The least that the hooks of diffusers find an attention in."""

    def __init__(self) -> None:
        super().__init__()
        attention = Attention(query_dim=8, heads=1, dim_head=8)
        self.transformer_blocks = torch.nn.ModuleList([torch.nn.ModuleDict({"attn": attention})])

    @override
    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        attention: torch.nn.Module = self.get_submodule("transformer_blocks.0.attn")
        return attention(hidden)


def computed_rows(model: OneAttention, calls: int, before: Callable[[int], None] = lambda call: None) -> list[int]:
    """The calls at which the attention really multiplies."""
    rows: list[int] = []
    call = 0
    query = model.get_submodule("transformer_blocks.0.attn.to_q")
    query.register_forward_hook(lambda *_: rows.append(call))
    with model.cache_context("test"):
        for call in range(calls):
            before(call)
            model(torch.ones(1, 4, 8))
    return rows


@pytest.mark.parametrize(("interval", "before"), [(5, 3), (2, 1), (4, 2), (3, 5), (1, 1)])
def test_taylorseer_is_what_diffusers_does(interval: int, before: int) -> None:
    model = OneAttention()
    model.enable_cache(TaylorSeerCacheConfig(interval, before, taylor_factors_dtype=torch.float32))
    assert schedules.taylorseer(28, interval, before) == computed_rows(model, 28)
    assert schedules.taylorseer(28) == [0, 1, 2, 4, 9, 14, 19, 24]


@pytest.mark.parametrize(("interval", "low", "high"), [(2, 100, 800), (4, 100, 800), (3, 300, 500), (6, 0, 1000)])
def test_pyramid_is_what_diffusers_does(interval: int, low: int, high: int) -> None:
    timesteps = list(range(999, -1, -37))
    now = [0]
    config = PyramidAttentionBroadcastConfig(
        spatial_attention_block_skip_range=interval,
        spatial_attention_timestep_skip_range=(low, high),
        current_timestep_callback=lambda: now[0],
    )

    def before(call: int) -> None:
        now[0] = timesteps[call]

    model = OneAttention()
    model.enable_cache(config)
    rows = computed_rows(model, len(timesteps), before)
    assert part_schedules.pyramid(timesteps, interval, low, high) == rows
    assert len(rows) < len(timesteps)


def test_pyramid_keeps_both_ends_of_its_range() -> None:
    assert part_schedules.pyramid([900, 800, 700, 600, 500, 400, 100], 4) == [0, 1, 4, 6]


@pytest.mark.parametrize(
    ("keys", "calls", "rows"),
    [
        ("50ls", 50, [0, 1, 2, 3, 5, 10, 15, 25, 35]),
        ("50ls", 20, [0, 1, 2, 4, 6, 10, 14]),
        ("50ls2", 50, [0, 10, 11, 12, 15, 20, 25, 30, 35, 45]),
        ("50ls3", 100, [0, 40, 50, 60, 70, 90, 92, 94, 96, 98]),
        ("50ls4", 50, [0, 9, 13, 14, 15, 28, 29, 32, 36, 45]),
        ("75ls", 75, [*range(10), *range(10, 66, 5), *range(66, 75)]),
        ("100ls", 100, [*range(10), *range(10, 86, 5), *range(86, 100)]),
        ("s2", 50, [*range(20), *range(20, 41, 2), *range(41, 50)]),
        ("pro", 50, [0, 2, 5, 9, 14, 20, 27, 35, 44]),
        (4, 10, [0, 4, 8]),
        ([3, 7], 10, [0, 3, 7]),
    ],
)
def test_key_steps(keys: Any, calls: int, rows: list[int]) -> None:
    assert schedules.key_steps(keys, calls) == rows


@pytest.mark.parametrize("name", schedules.KEY_STEPS)
def test_every_key_set_fits_any_number_of_calls(name: str) -> None:
    for calls in range(1, 120):
        rows = schedules.key_steps(name, calls)
        assert rows[0] == 0
        assert rows == sorted(set(rows))
        assert rows[-1] < calls


def test_t_gate_of_25_rows() -> None:
    """As for SDXL: self-attention in the warm-up, at multiples of 5, at the gate, and in all rows after it."""
    rows = part_schedules.t_gate(25)
    assert [row for row, parts in enumerate(rows) if parts.cross_attention] == list(range(10))
    assert [row for row, parts in enumerate(rows) if parts.self_attention] == [0, 1, 2, 5, 9, *range(10, 25)]
    later = part_schedules.t_gate(25, later_interval=4)
    assert [row for row, parts in enumerate(later) if parts.self_attention] == [0, 1, 2, 5, 9, 12, 16, 20, 24]


def test_t_gate_scales_its_positions_and_not_its_intervals() -> None:
    rows = part_schedules.t_gate(50, later_interval=10)
    assert sum(parts.cross_attention for parts in rows) == 20
    assert [row for row, parts in enumerate(rows) if parts.self_attention] == [0, 1, 2, 3, 4, 5, 10, 15, 19, 20, 30, 40]
    assert part_schedules.t_gate(4, gate=1) == [(True, True), *[(True, False)] * 3]


def test_delta_dit() -> None:
    assert part_schedules.delta_dit(7, 4, 3) == ["full", "rear", "rear", "full", "front", "front", "full"]
    assert part_schedules.delta_dit(4, 0, 2) == ["full", "front", "full", "front"]


@pytest.mark.parametrize(
    ("ask", "reason"),
    [
        (lambda: schedules.uniform(10, 0), "interval is 0"),
        (lambda: schedules.uniform(0, 2), "calls is 0"),
        (lambda: schedules.uniform(10, 2, 0), "warmup is 0"),
        (lambda: schedules.signed_power(10, 11), "11 of 10 rows"),
        (lambda: schedules.signed_power(10, 3, center=10), "center 10"),
        (lambda: schedules.signed_power(10, 3, power=0.9), "power is 0.9"),
        (lambda: schedules.signed_power(10, 3, power=float("inf")), "power is inf"),
        (lambda: schedules.taylorseer(10, 5, 0), "before is 0"),
        (lambda: schedules.key_steps("60ls", 50), "'60ls' is not a set of key steps; known are 50ls"),
        (lambda: schedules.key_steps(0, 50), "every is 0"),
        (lambda: schedules.key_steps([0, 50], 50), r"key steps \[50\]"),
        (lambda: part_schedules.pyramid([1, 2], 0), "interval is 0"),
        (lambda: part_schedules.t_gate(10, gate=11), "gate is 11"),
        (lambda: part_schedules.t_gate(10, self_interval=0), "interval of self-attention"),
        (lambda: part_schedules.delta_dit(10, 11, 2), "boundary is 11"),
        (lambda: part_schedules.delta_dit(10, 5, 0), "interval is 0"),
    ],
)
def test_refuses(ask: Callable[[], object], reason: str) -> None:
    with pytest.raises(RefusedError, match=reason):
        ask()
