"""Quality metrics of generated pictures and latents, each with its 95 % interval, in plain NumPy."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

DB_CAP = 150.0
"""Decibels reported for identical arrays, whose ratio to the noise is infinite."""

Z95 = 1.959963984540054
FRECHET_DIMENSIONS = 32
FRECHET_MINIMUM = 32
"""Fewer pictures than this give no Frechet distance worth a number."""

SSIM_WINDOW = 11
BOOTSTRAP_ROUNDS = 100


@dataclass(frozen=True)
class Estimate:
    """A number with what is known about it.

    Attributes:
        value: the point estimate.
        interval: its 95 % interval; None where one sample or one exact count leaves nothing to estimate it from.
        n: how many samples it comes from.
    """

    value: float
    interval: tuple[float, float] | None
    n: int

    def to_dict(self) -> dict[str, object]:
        """Return plain data for JSON."""
        return {"value": self.value, "interval": None if self.interval is None else list(self.interval), "n": self.n}


def mean(values: np.ndarray) -> Estimate:
    """Average per-sample values, with the normal 95 % interval of the mean.

    Args:
        values: (n,), finite.

    Raises:
        ValueError: there are no values, or one is not finite.
    """
    values = np.asarray(values, np.float64)
    if values.ndim != 1 or not values.size:
        raise ValueError(f"a mean needs a list of values, not an array of shape {values.shape}")
    if not np.isfinite(values).all():
        raise ValueError("a mean over values that are not finite says nothing")
    centre = float(values.mean())
    if values.size == 1:
        return Estimate(centre, None, 1)
    half = Z95 * float(values.std(ddof=1)) / math.sqrt(values.size)
    return Estimate(centre, (centre - half, centre + half), int(values.size))


def psnr_per_sample(reference: np.ndarray, other: np.ndarray, peak: float) -> np.ndarray:
    """Peak signal-to-noise ratio of every sample, in dB, at most `DB_CAP`.

    Args:
        reference: (n, ...).
        other: (n, ...), the same shape.
        peak: the largest value the signal can take, in its own unit.

    Returns:
        float64 (n,): 10 log10(peak^2 / mean squared error).
    """
    _same_shape(reference, other)
    error = np.array(
        [np.mean(np.square(a.astype(np.float64) - b.astype(np.float64))) for a, b in zip(reference, other, strict=True)]
    )
    with np.errstate(divide="ignore"):
        return np.minimum(10.0 * np.log10(peak**2 / error), DB_CAP)


def latent_psnr_db(reference: np.ndarray, latents: np.ndarray) -> Estimate:
    """PSNR between latents made from the same noise, in dB; the peak is four standard deviations of the reference.

    Args:
        reference: float (n, channels, height, width).
        latents: the same shape.
    """
    return mean(psnr_per_sample(reference, latents, latent_peak(reference)))


def latent_peak(reference: np.ndarray) -> float:
    """Return four standard deviations of all the reference latents: the range that stands for their peak."""
    return 4.0 * float(np.std(reference, dtype=np.float64))


def image_psnr_db(reference: np.ndarray, images: np.ndarray) -> Estimate:
    """PSNR between pictures made from the same noise, in dB; the peak is 255.

    Args:
        reference: uint8 (n, height, width, 3).
        images: the same shape.
    """
    return mean(psnr_per_sample(reference, images, 255.0))


def ssim(reference: np.ndarray, images: np.ndarray) -> Estimate:
    """Structural similarity, averaged over windows and colour channels.

    Source: Wang, Bovik, Sheikh, Simoncelli 2004, "Image quality assessment", equation 13, with its 11 x 11 Gaussian
    window of sigma 1.5, K1 = 0.01, K2 = 0.03, and only windows that lie wholly in the picture.

    Args:
        reference: uint8 (n, height, width, channels), height and width at least 11.
        images: the same shape.
    """
    _same_shape(reference, images)
    if min(reference.shape[1:3]) < SSIM_WINDOW:
        raise ValueError(f"SSIM needs pictures of at least {SSIM_WINDOW} x {SSIM_WINDOW} pixels")
    return mean(np.array([_ssim(a, b) for a, b in zip(reference, images, strict=True)]))


_WINDOW = np.exp(-0.5 * np.square((np.arange(SSIM_WINDOW) - SSIM_WINDOW // 2) / 1.5))
_WINDOW /= _WINDOW.sum()


def _blur(image: np.ndarray) -> np.ndarray:
    """Average over the Gaussian window; (height, width, channels) loses ten rows and ten columns."""
    for axis in (0, 1):
        length = image.shape[axis] - SSIM_WINDOW + 1
        rows = [weight * np.take(image, range(i, i + length), axis) for i, weight in enumerate(_WINDOW)]
        image = np.sum(rows, axis=0)
    return image


def _ssim(reference: np.ndarray, other: np.ndarray) -> float:
    x, y = reference.astype(np.float64), other.astype(np.float64)
    c1, c2 = (0.01 * 255) ** 2, (0.03 * 255) ** 2
    mean_x, mean_y, xx, yy, xy = np.split(_blur(np.concatenate([x, y, x * x, y * y, x * y], axis=2)), 5, axis=2)
    variance_x, variance_y, covariance = xx - mean_x**2, yy - mean_y**2, xy - mean_x * mean_y
    similar = (2 * mean_x * mean_y + c1) * (2 * covariance + c2)
    return float(np.mean(similar / ((mean_x**2 + mean_y**2 + c1) * (variance_x + variance_y + c2))))


def frechet_distance(
    features: np.ndarray,
    reference: np.ndarray,
    *,
    paired: bool,
    dimensions: int = FRECHET_DIMENSIONS,
    rounds: int = BOOTSTRAP_ROUNDS,
) -> Estimate:
    """Squared Frechet distance between Gaussians fitted to scorer features.

    The features are projected on the leading principal components of the reference. The estimate is biased upwards
    by about 1/n, so it is only to be compared at equal n. The interval is normal, with the bootstrap's standard
    error: the percentiles of a bootstrap lie above the estimate, whose bias the resampling doubles.

    Source: Dowson and Landau 1982; Heusel et al. 2017, arXiv 1706.08500.

    Args:
        features: (n, width) of the pictures that are judged.
        reference: (m, width) of the pictures they should resemble.
        paired: row i of both comes from the same prompt and seed, so they are resampled together; otherwise the
            reference is held fixed.
        dimensions: at most this many principal components; fewer where n, m or the width demands it.
        rounds: how many bootstrap samples give the standard error.
    """
    features, reference = np.asarray(features, np.float64), np.asarray(reference, np.float64)
    n, m = len(features), len(reference)
    if min(n, m) < FRECHET_MINIMUM:
        raise ValueError(f"a Frechet distance needs at least {FRECHET_MINIMUM} pictures on each side, not {n} and {m}")
    if paired and n != m:
        raise ValueError(f"paired features need equal counts, not {n} and {m}")
    centre = reference.mean(axis=0)
    axes = np.linalg.svd(reference - centre, full_matrices=False)[2][: min(dimensions, n // 2, m // 2)]
    x, y = (features - centre) @ axes.T, (reference - centre) @ axes.T
    generator = np.random.default_rng(0)
    draws = []
    for _ in range(rounds):
        rows = generator.integers(0, n, n)
        draws.append(_frechet(x[rows], y[rows] if paired else y))
    value = _frechet(x, y)
    half = Z95 * float(np.std(draws, ddof=1))
    return Estimate(value, (max(value - half, 0.0), value + half), n)


def _frechet(x: np.ndarray, y: np.ndarray) -> float:
    covariance_x, covariance_y = (np.atleast_2d(np.cov(side, rowvar=False)) for side in (x, y))
    values, vectors = np.linalg.eigh(covariance_x)
    root = (vectors * np.sqrt(np.clip(values, 0.0, None))) @ vectors.T
    cross = np.sqrt(np.clip(np.linalg.eigvalsh(root @ covariance_y @ root), 0.0, None)).sum()
    offset = np.square(x.mean(axis=0) - y.mean(axis=0)).sum()
    return max(float(offset + np.trace(covariance_x) + np.trace(covariance_y) - 2.0 * cross), 0.0)


def attribute_hits(
    logits: Mapping[str, np.ndarray], heads: Mapping[str, Sequence[str]], labels: Sequence[Mapping[str, str]]
) -> np.ndarray:
    """Count, per picture, the attributes of its prompt that the scorer reads back.

    Args:
        logits: head -> (n, classes).
        heads: head -> class names, in the order of the logits.
        labels: one mapping head -> class name per picture; a head that is absent does not count.

    Returns:
        int64 (n, 2): attributes right, attributes asked for.

    Raises:
        ValueError: a label names a head or a class that the scorer does not have.
    """
    hits = np.zeros((len(labels), 2), np.int64)
    for row, label in enumerate(labels):
        for head, name in label.items():
            if head not in heads:
                raise ValueError(f"the scorer has no head {head!r}; it has {', '.join(heads)}")
            if name not in heads[head]:
                raise ValueError(
                    f"the head {head!r} of the scorer has no class {name!r}; it has {', '.join(heads[head])}"
                )
            hits[row] += (heads[head][int(np.argmax(logits[head][row]))] == name, 1)
    return hits


def attribute_accuracy(hits: np.ndarray) -> Estimate:
    """Share of all (picture, attribute) pairs that are right, with a Wilson 95 % interval.

    The attributes of one picture hang together, so the interval counts as many independent trials as give the
    variance found between pictures (the design effect): never fewer than pictures, never more than pairs.

    Source: Wilson 1927; Kish 1965, section 5.4 (effective sample size).

    Args:
        hits: (n, 2) from `attribute_hits`.
    """
    right, asked = hits[:, 0].astype(np.float64), hits[:, 1].astype(np.float64)
    if not asked.sum():
        raise ValueError("no prompt has attributes to check")
    pictures = int((asked > 0).sum())
    share = float(right.sum() / asked.sum())
    spread = float(np.square(right - share * asked).sum() / asked.sum() ** 2)
    trials = share * (1 - share) / spread if spread else pictures
    trials = min(max(trials, pictures), float(asked.sum()))
    shrink = 1 + Z95**2 / trials
    middle = (share + Z95**2 / (2 * trials)) / shrink
    half = Z95 * math.sqrt(share * (1 - share) / trials + Z95**2 / (4 * trials**2)) / shrink
    return Estimate(share, (max(middle - half, 0.0), min(middle + half, 1.0)), pictures)


def accuracy_change(before: np.ndarray, after: np.ndarray) -> Estimate:
    """Change of attribute accuracy over the same prompts and seeds, with the normal interval over pictures.

    Args:
        before: (n, 2) from `attribute_hits`.
        after: the same for the same prompts.
    """
    _same_shape(before, after)
    asked = before[:, 1].sum()
    if not asked:
        raise ValueError("no prompt has attributes to check")
    gained = (after[:, 0] - before[:, 0]).astype(np.float64)
    change = float(gained.sum() / asked)
    n = int((before[:, 1] > 0).sum())
    if n < 2:
        return Estimate(change, None, n)
    half = Z95 * math.sqrt(float(np.square(gained - change * before[:, 1]).sum())) / float(asked)
    return Estimate(change, (change - half, change + half), n)


def paired_change(before: np.ndarray, after: np.ndarray) -> Estimate:
    """Mean of per-sample differences `after - before`, with its interval.

    Args:
        before: (n,).
        after: (n,), from the same prompts and seeds.
    """
    _same_shape(before, after)
    return mean(np.asarray(after, np.float64) - np.asarray(before, np.float64))


def sqnr_db(reference: np.ndarray, other: np.ndarray) -> float:
    """Signal-to-quantisation-noise ratio of a whole tensor, in dB, within +-`DB_CAP`.

    10 log10(sum reference^2 / sum (other - reference)^2); not-a-number or infinite values in `other` read -`DB_CAP`.
    """
    _same_shape(reference, other)
    if not np.isfinite(other).all():
        return -DB_CAP
    noise = float(np.square(np.subtract(other, reference, dtype=np.float64)).sum())
    signal = float(np.square(reference, dtype=np.float64).sum())
    if noise == 0.0:
        return DB_CAP
    if signal == 0.0:
        return -DB_CAP
    return min(max(10.0 * math.log10(signal / noise), -DB_CAP), DB_CAP)


def relative_l2(reference: np.ndarray, other: np.ndarray) -> float:
    """Norm of the difference over the norm of the reference, over the whole arrays."""
    _same_shape(reference, other)
    scale = float(np.linalg.norm(reference.astype(np.float64).ravel()))
    error = float(np.linalg.norm((other.astype(np.float64) - reference).ravel()))
    return error / scale if scale else error


def _same_shape(a: np.ndarray, b: np.ndarray) -> None:
    if a.shape != b.shape:
        raise ValueError(f"arrays of the shapes {a.shape} and {b.shape} cannot be compared")
