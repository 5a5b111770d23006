"""Quality metrics: against published definitions, independent values, and their own statistical promises."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest

from compress.measure import metrics


def pictures(n: int, height: int, width: int, seed: int) -> np.ndarray:
    """Smooth random uint8 pictures (n, height, width, 3)."""
    steps = np.random.default_rng(seed).normal(0, 12, (n, height, width, 3))
    return np.clip(np.cumsum(steps, axis=1) + 128, 0, 255).astype(np.uint8)


def spoil(images: np.ndarray, sigma: float, seed: int) -> np.ndarray:
    """Add Gaussian noise of `sigma` grey levels."""
    return np.clip(images + np.random.default_rng(seed).normal(0, sigma, images.shape), 0, 255).astype(np.uint8)


def test_image_psnr_is_the_definition() -> None:
    reference = np.full((2, 12, 12, 3), 100, np.uint8)
    other = reference.copy()
    other[0] += 10
    other[1] += 1
    estimate = metrics.image_psnr_db(reference, other)
    expected = [20 * math.log10(255 / 10), 20 * math.log10(255)]
    assert estimate.value == pytest.approx(np.mean(expected))
    assert estimate.n == 2
    assert estimate.interval is not None
    assert estimate.interval[0] < estimate.value < estimate.interval[1]


def test_identical_arrays_read_the_cap_and_stay_json() -> None:
    reference = pictures(3, 16, 16, 0)
    latents = np.random.default_rng(0).standard_normal((3, 4, 8, 8)).astype(np.float32)
    for estimate in (metrics.image_psnr_db(reference, reference), metrics.latent_psnr_db(latents, latents)):
        assert estimate.value == metrics.DB_CAP
        json.dumps(estimate.to_dict(), allow_nan=False)
    assert metrics.ssim(reference, reference).value == pytest.approx(1.0, abs=1e-12)


def test_latent_psnr_has_a_peak_of_four_sigma() -> None:
    latents = np.random.default_rng(1).standard_normal((8, 4, 8, 8)) * 3
    shifted = latents + 0.12 * latents.std()
    assert metrics.latent_psnr_db(latents, shifted).value == pytest.approx(20 * math.log10(4 / 0.12))
    assert metrics.latent_psnr_db(latents, np.full_like(latents, 0.5)).value < 13


def test_ssim_agrees_with_scikit_image() -> None:
    """Values of skimage 0.26 structural_similarity(gaussian_weights, sigma 1.5, no sample covariance)."""
    generator = np.random.default_rng(5)
    expected = [0.9876335983936809, 0.9549156700684746, 0.8786491640113805, 0.8332978853928911]
    for k, value in enumerate(expected):
        reference = np.clip(np.cumsum(generator.normal(0, 12, (24, 30, 3)), 0) + 128, 0, 255).astype(np.uint8)
        other = np.clip(reference + generator.normal(0, 5 * (k + 1), reference.shape), 0, 255).astype(np.uint8)
        assert metrics.ssim(reference[None], other[None]).value == pytest.approx(value, abs=1e-12)


def test_ssim_agrees_with_the_formula_window_by_window() -> None:
    a, b = pictures(1, 13, 14, 2)[0], spoil(pictures(1, 13, 14, 2)[0], 30, 3)
    offsets = np.arange(-5, 6)
    window = np.exp(-(offsets[:, None] ** 2 + offsets[None] ** 2) / (2 * 1.5**2))
    window /= window.sum()
    c1, c2, values = (0.01 * 255) ** 2, (0.03 * 255) ** 2, []
    for top in range(3):
        for left in range(4):
            for channel in range(3):
                x = a[top : top + 11, left : left + 11, channel].astype(float)
                y = b[top : top + 11, left : left + 11, channel].astype(float)
                mx, my = (window * x).sum(), (window * y).sum()
                vx, vy = (window * (x - mx) ** 2).sum(), (window * (y - my) ** 2).sum()
                cov = (window * (x - mx) * (y - my)).sum()
                values.append((2 * mx * my + c1) * (2 * cov + c2) / ((mx**2 + my**2 + c1) * (vx + vy + c2)))
    assert metrics.ssim(a[None], b[None]).value == pytest.approx(np.mean(values), abs=1e-10)


def test_paired_metrics_fall_with_every_damage() -> None:
    reference = pictures(4, 32, 32, 4)
    damaged = [spoil(reference, sigma, 5) for sigma in (2, 8, 32, 90)]
    psnr = [metrics.image_psnr_db(reference, images).value for images in damaged]
    similar = [metrics.ssim(reference, images).value for images in damaged]
    assert psnr == sorted(psnr, reverse=True)
    assert similar == sorted(similar, reverse=True)


def test_frechet_distance_of_known_gaussians() -> None:
    """Means 1 apart and standard deviations 1 and 2 on each axis: d^2 = k * 1 + k * (1 - 2)^2."""
    generator = np.random.default_rng(0)
    n, width = 20000, 3
    x, y = 1 + 2 * generator.standard_normal((n, width)), generator.standard_normal((n, width))
    estimate = metrics.frechet_distance(x, y, paired=False, rounds=20)
    assert estimate.value == pytest.approx(6.0, rel=0.05)
    assert estimate.interval is not None
    assert estimate.interval[0] < 6.0 < estimate.interval[1]


def test_frechet_distance_is_biased_at_small_n_as_it_says() -> None:
    generator = np.random.default_rng(1)
    reference = generator.standard_normal((2048, 16))
    small, large = (
        metrics.frechet_distance(generator.standard_normal((n, 16)), reference, paired=False, rounds=5).value
        for n in (64, 1024)
    )
    assert small > 4 * large > 0


def test_frechet_distance_reduces_wide_features_and_knows_pairs() -> None:
    generator = np.random.default_rng(2)
    reference = generator.standard_normal((40, 200))
    near = reference + 0.01 * generator.standard_normal(reference.shape)
    paired = metrics.frechet_distance(near, reference, paired=True)
    unpaired = metrics.frechet_distance(near, reference, paired=False)
    assert paired.value == unpaired.value < 0.1
    assert paired.interval is not None
    assert unpaired.interval is not None
    assert paired.interval[1] - paired.interval[0] < 0.1 * (unpaired.interval[1] - unpaired.interval[0])
    with pytest.raises(ValueError, match="at least 32"):
        metrics.frechet_distance(reference[:3], reference, paired=False)


def test_attribute_hits_count_only_what_the_prompt_asks() -> None:
    logits = {"colour": np.array([[2.0, 1.0], [0.0, 1.0]]), "shape": np.array([[0.0, 1.0, 0.0], [3.0, 0.0, 0.0]])}
    heads = {"colour": ("red", "blue"), "shape": ("circle", "ring", "square")}
    hits = metrics.attribute_hits(logits, heads, [{"colour": "red", "shape": "ring"}, {"shape": "ring"}])
    assert hits.tolist() == [[2, 2], [0, 1]]
    assert metrics.attribute_accuracy(hits).value == pytest.approx(2 / 3)
    with pytest.raises(ValueError, match="no class 'green'"):
        metrics.attribute_hits(logits, heads, [{"colour": "green"}])
    with pytest.raises(ValueError, match="no head 'size'"):
        metrics.attribute_hits(logits, heads, [{"size": "large"}])


def test_wilson_interval_of_a_perfect_score_does_not_collapse() -> None:
    """100 of 100 right: the textbook Wilson interval is [0.963, 1]."""
    estimate = metrics.attribute_accuracy(np.full((100, 2), 1))
    assert estimate.interval is not None
    assert estimate.interval == pytest.approx((0.9630, 1.0), abs=1e-4)


def test_accuracy_interval_covers_the_truth_about_as_often_as_promised() -> None:
    generator, covered = np.random.default_rng(3), 0
    for _ in range(300):
        share = generator.beta(19, 1, 128)
        hits = np.stack([generator.binomial(5, share), np.full(128, 5)], axis=1)
        low, high = metrics.attribute_accuracy(hits).interval or (2.0, 2.0)
        covered += low <= 0.95 <= high
    assert 0.88 < covered / 300 < 0.99


def test_accuracy_change_uses_the_pairs() -> None:
    before = np.stack([np.tile([5, 4], 50), np.full(100, 5)], axis=1)
    same = metrics.accuracy_change(before, before)
    assert same.value == 0.0
    assert same.interval == (0.0, 0.0)
    after = before.copy()
    after[:10, 0] -= 1
    change = metrics.accuracy_change(before, after)
    assert change.value == pytest.approx(-10 / 500)
    assert change.interval is not None
    assert change.interval[1] < 0


def test_mean_interval_covers_and_refuses_nonsense() -> None:
    generator, covered = np.random.default_rng(4), 0
    for _ in range(300):
        low, high = metrics.mean(generator.normal(7, 3, 50)).interval or (9.0, 9.0)
        covered += low <= 7 <= high
    assert 0.90 < covered / 300 < 0.985
    assert metrics.mean(np.array([4.0])).interval is None
    for bad in (np.array([]), np.array([1.0, np.nan])):
        with pytest.raises(ValueError, match="a mean"):
            metrics.mean(bad)


def test_sqnr_and_relative_error_at_the_edges() -> None:
    x = np.array([3.0, 4.0])
    assert metrics.sqnr_db(x, x) == metrics.DB_CAP
    assert metrics.sqnr_db(x, x * 1.1) == pytest.approx(20)
    assert metrics.sqnr_db(x, np.array([np.nan, 1.0])) == -metrics.DB_CAP
    assert metrics.sqnr_db(np.zeros(2), x) == -metrics.DB_CAP
    assert metrics.relative_l2(x, x * 1.1) == pytest.approx(0.1)
    assert metrics.relative_l2(np.zeros(2), x) == pytest.approx(5.0)
    with pytest.raises(ValueError, match="cannot be compared"):
        metrics.sqnr_db(x, x[:1])
