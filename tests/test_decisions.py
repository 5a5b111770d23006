"""Static plans of the dynamic caches: against their real hooks in diffusers, and against schedules worked by hand."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from diffusers import CacheMixin, FirstBlockCacheConfig, MagCacheConfig
from diffusers.hooks.mag_cache import FLUX_MAG_RATIOS
from diffusers.models.attention import BasicTransformerBlock
from typing_extensions import override

from compress.caching import decisions
from compress.errors import PassError, RefusedError


class Transformer(torch.nn.Module, CacheMixin):
    """Three real transformer blocks, which the hooks of diffusers know how to cache."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        blocks = [BasicTransformerBlock(dim=8, num_attention_heads=1, attention_head_dim=8) for _ in range(3)]
        self.transformer_blocks = torch.nn.ModuleList(blocks)

    @override
    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        for block in self.transformer_blocks:
            hidden = block(hidden)
        return hidden


@torch.inference_mode()
def computed_rows(model: Transformer, inputs: torch.Tensor) -> list[int]:
    """The calls at which the middle block really runs."""
    rows: list[int] = []
    row = 0
    model.get_submodule("transformer_blocks.1.attn1.to_q").register_forward_hook(lambda *_: rows.append(row))
    with model.cache_context("test"):
        for row in range(len(inputs)):
            model(inputs[row])
    return rows


def walk(rows: int, pace: float) -> torch.Tensor:
    """Inputs (rows, 1, tokens, channels) that wander from row to row."""
    generator = torch.Generator().manual_seed(1)
    return torch.randn(1, 1, 4, 8, generator=generator) + pace * torch.randn(rows, 1, 4, 8, generator=generator).cumsum(
        0
    )


@pytest.mark.parametrize("threshold", [0.01, 0.03, 0.05, 0.1])
def test_first_block_is_what_diffusers_does(threshold: float) -> None:
    model, inputs = Transformer(), walk(30, 0.03)
    with torch.inference_mode():
        residuals = torch.stack([model.transformer_blocks[0](x) - x for x in inputs]).double().flatten(1)
    moved = (residuals[:, None] - residuals[None]).abs().mean(-1)
    relative = (moved / residuals.abs().mean(-1)).numpy()
    model.enable_cache(FirstBlockCacheConfig(threshold=threshold))
    rows = computed_rows(model, inputs)
    assert decisions.first_block(relative, threshold) == rows
    assert len(rows) > 1


def test_first_block_caches_something_and_not_everything() -> None:
    relative = np.abs(np.subtract.outer(np.arange(10.0), np.arange(10.0))) / 10
    assert decisions.first_block(relative, 0.25) == [0, 3, 6, 9]
    assert decisions.first_block(relative, 0.0) == list(range(10))
    assert decisions.first_block(relative, 9.0) == [0]


@pytest.mark.parametrize(
    ("limits", "rows"),
    [
        ({"warmup": 4}, [0, 1, 2, 3, 8]),
        ({"max_run": 2}, [0, 3, 6, 9]),
        ({"max_run": 0}, list(range(12))),
        ({"max_cached": 5}, [0, 5, 7, 8, 9, 10, 11]),
        ({"last_full": True}, [0, 5, 10, 11]),
        ({"warmup": 2, "max_run": 3, "max_cached": 7}, [0, 1, 5, 9, 11]),
    ],
)
def test_limits_of_dbcache(limits: dict[str, int], rows: list[int]) -> None:
    relative = np.abs(np.subtract.outer(np.arange(12.0), np.arange(12.0))) / 10
    assert decisions.first_block(relative, 0.45, **limits) == rows


def test_first_block_looks_from_the_last_full_row() -> None:
    """Against the row before, nothing ever moves enough; against the last full row, row 3 does."""
    relative = np.zeros((5, 5))
    relative[3, 0] = 1.0
    relative[4, 2] = relative[4, 0] = 1.0
    assert decisions.first_block(relative, 0.5) == [0, 3]


@pytest.mark.parametrize(
    ("threshold", "rows"),
    [(0.3, [0, 3, 4, 6, 7]), (0.0, list(range(8))), (9.0, [0, 7])],
)
def test_teacache(threshold: float, rows: list[int]) -> None:
    """Inputs differ by .1 .1 .1 .4 .1 .2 .1 after the first; doubled and less .1 they are .1 .1 .1 .7 .1 .3 .1."""
    differences = [np.nan, 0.1, 0.1, 0.1, 0.4, 0.1, 0.2, 0.1]
    differences[0] = 5.0
    assert decisions.teacache(differences, [2.0, -0.1 + 1e-12], threshold) == rows


def test_teacache_forgets_the_first_difference() -> None:
    assert decisions.teacache([9.0, 0.1, 0.1, 0.1], [1.0, 0.0], 0.15) == [0, 2, 3]
    assert decisions.teacache([float("nan"), 0.1, 0.1, 0.1], [1.0, 0.0], 0.15) == [0, 2, 3]


def test_fit_polynomial_finds_the_one_that_made_the_points() -> None:
    published = (498.65, -283.78, 55.859, -3.8202, 0.26423)
    inputs = np.linspace(0.02, 0.3, 27)
    outputs = np.polyval(published, inputs)
    assert decisions.fit_polynomial(inputs.tolist(), outputs.tolist()) == pytest.approx(published, rel=1e-6)
    assert decisions.fit_polynomial([0, 1, 2], [1, 3, 5], degree=1) == pytest.approx((2, 1))
    noisy = outputs + 0.01 * np.random.default_rng(0).normal(size=27)
    fitted = np.polyval(decisions.fit_polynomial(inputs.tolist(), noisy.tolist()), inputs)
    assert np.square(fitted - noisy).sum() <= np.square(outputs - noisy).sum()


@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize(("calls", "measured"), [(28, 28), (20, 28), (50, 28), (7, 3), (2, 9)])
def test_magcache_is_what_diffusers_does(seed: int, calls: int, measured: int) -> None:
    generator = np.random.default_rng(seed)
    ratios = [1.0, *generator.normal(1.0, 0.03, measured - 1).tolist()]
    threshold, max_skip = float(generator.uniform(0.02, 0.3)), int(generator.integers(1, 6))
    retention = float(generator.choice([0.0, 0.1, 0.2, 0.5]))
    model = Transformer()
    model.enable_cache(
        MagCacheConfig(
            threshold=threshold,
            max_skip_steps=max_skip,
            retention_ratio=retention,
            num_inference_steps=calls,
            mag_ratios=torch.tensor(ratios, dtype=torch.float64),
        )
    )
    rows = computed_rows(model, walk(calls, 0.1))
    assert decisions.magcache(ratios, threshold, max_skip, retention, calls) == rows


def test_magcache_by_hand() -> None:
    """Products after row 1: .98, .9604 (errors .02, .0396, sum .0596); the third would be .1184 in all."""
    assert decisions.magcache([1.0] + [0.98] * 7, threshold=0.06, max_skip=9, retention=0.2) == [0, 1, 4, 7]
    assert decisions.magcache([1.0] * 8, max_skip=2, retention=0.25) == [0, 1, 4, 7]
    assert decisions.magcache([1.0] * 4, max_skip=0) == [0, 1, 2, 3]
    flux = decisions.magcache(FLUX_MAG_RATIOS.tolist())
    assert flux[:6] == [0, 1, 2, 3, 4, 5]
    assert len(flux) < 20


def test_nearest_ratios_are_those_of_diffusers() -> None:
    ratios = torch.linspace(0.5, 1.5, 29, dtype=torch.float64)
    for calls in range(1, 120):
        theirs = MagCacheConfig(num_inference_steps=calls, mag_ratios=ratios).mag_ratios
        np.testing.assert_array_equal(decisions._nearest(ratios.numpy(), calls), theirs.numpy())


def test_smoothcache() -> None:
    """Look-aheads 1, 2, 3 of a group whose outputs change slowly at first; the largest within alpha counts."""
    errors = np.array(
        [
            [0.0, 0.1, 0.2, 0.3],
            [0.0, 0.1, 0.2, 0.3],
            [0.0, 0.1, 0.2, 0.3],
            [0.0, 0.3, 0.1, 0.3],
            [0.0, 0.9, 0.9, 0.9],
            [0.0, 0.9, 0.9, 0.9],
            [0.0, 0.9, 0.9, 0.9],
            [0.0, 0.1, np.nan, np.nan],
            [0.0, np.nan, np.nan, np.nan],
        ]
    )
    assert decisions.smoothcache(errors, 0.2) == [0, 3, 6, 7, 8]
    assert decisions.smoothcache(errors, 0.2, max_skip=1) == [0, 2, 4, 5, 6, 7, 8]
    assert decisions.smoothcache(errors, 0.35) == [0, 4, 5, 6, 7, 8]
    assert decisions.smoothcache(errors, 0.0) == list(range(9))
    assert decisions.smoothcache(errors[:, :2], 0.2) == [0, 2, 4, 5, 6, 7, 8]
    assert decisions.smoothcache(errors[:1], 0.2) == [0]


@pytest.mark.parametrize(
    ("ask", "error", "reason"),
    [
        (lambda: decisions.first_block(np.zeros((3, 4)), 0.1), PassError, "square"),
        (lambda: decisions.first_block(np.zeros((3, 3)), -0.1), RefusedError, "threshold is -0.1"),
        (lambda: decisions.first_block(np.zeros((3, 3)), 0.1, warmup=0), RefusedError, "warmup is 0"),
        (lambda: decisions.teacache([0.0, 1.0], [1.0], float("nan")), RefusedError, "threshold is nan"),
        (lambda: decisions.fit_polynomial([1, 2], [1, 2, 3], 1), PassError, "2 differences of inputs and 3"),
        (lambda: decisions.fit_polynomial([1, 2, 3], [1, 2, 3], 3), PassError, "polynomial of degree 3"),
        (lambda: decisions.magcache([]), RefusedError, "0 ratios"),
        (lambda: decisions.magcache([1.0], calls=0), RefusedError, "1 ratios for 0 rows"),
        (lambda: decisions.magcache([1.0], retention=1.5), RefusedError, "retention 1.5"),
        (lambda: decisions.smoothcache(np.zeros(3), 0.1), PassError, "matrix"),
        (lambda: decisions.smoothcache(np.zeros((3, 3)), 0.1, -1), RefusedError, "max_skip is -1"),
    ],
)
def test_raises(ask: Callable[[], object], error: type[Exception], reason: str) -> None:
    with pytest.raises(error, match=reason):
        ask()
