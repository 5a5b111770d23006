"""The softmax that attention computes while it walks over the keys, in base 2, and what it carries along.

Source: Milakov and Gimelshein 2018, arXiv 1805.02867 (the running maximum and sum); Dao et al. 2022, arXiv 2205.14135
(with the weighted values).
"""

from __future__ import annotations

from kernels.language import jit, tl


@jit
def base_2(exponent: tl.tensor) -> tl.tensor:
    """The exponent of 2 that stands for one of e; powers of 2 are what the hardware computes."""
    return exponent * 1.4426950408889634


@jit
def fold(
    scores: tl.tensor, scale: tl.tensor, maximum: tl.tensor, total: tl.tensor, SHIFT: tl.constexpr
) -> tuple[tl.tensor, tl.tensor, tl.tensor, tl.tensor]:
    """Take a block of scores (queries, keys) into the running softmax.

    A weight is 2**(scale * score - maximum + SHIFT); the shift cancels in the quotient and only chooses the range of
    the weights. The maximum is rounded up to a whole number: corrections are then powers of two, which are exact, and
    weights rounded to few digits do not depend on the order of the keys. A query that has seen no key yet has the
    maximum -inf and the total zero.

    Returns:
        The weights of the block; the factor for all that was summed before; the maximum; the total of the weights.
    """
    higher = tl.maximum(maximum, tl.ceil(tl.max(scores, 1) * scale))
    origin = tl.where(higher == -float("inf"), 0.0, higher)
    weights = tl.exp2(scores * scale - (origin - SHIFT)[:, None])
    correction = tl.exp2(maximum - origin)
    return weights, correction, higher, total * correction + tl.sum(weights, 1)


@jit
def fold_patiently(
    scores: tl.tensor,
    scale: tl.tensor,
    accumulator: tl.tensor,
    maximum: tl.tensor,
    total: tl.tensor,
    SHIFT: tl.constexpr,
    PATIENCE: tl.constexpr,
) -> tuple[tl.tensor, tl.tensor, tl.tensor, tl.tensor]:
    """Take a block of scores in, like `fold`, but correct what was summed only where it matters.

    The maxima of all queries stay what they are until a score, times the scale, is beyond one of them by more than
    PATIENCE; weights are at most 2**(SHIFT + PATIENCE). So most blocks correct nothing, which saves a multiplication
    for every number of the accumulator. Maxima are whole numbers here too. Every block must show each query a key.

    Returns:
        The weights of the block; the accumulator (queries, channels); the maximum; the total of the weights.
    """
    peak = tl.max(scores, 1) * scale
    beyond = tl.reshape(peak - maximum, [peak.shape[0]], can_reorder=True)  # else Triton 3.7 fails on sm_100
    if tl.max(beyond, 0) > PATIENCE:
        higher = tl.maximum(maximum, tl.ceil(peak))
        correction = tl.exp2(maximum - higher)
        accumulator *= correction[:, None]
        total *= correction
        maximum = higher
    weights = tl.exp2(scores * scale - (maximum - SHIFT)[:, None])
    return weights, accumulator, maximum, total + tl.sum(weights, 1)


@jit
def without_zeros(total: tl.tensor, maximum: tl.tensor, count: tl.tensor, SHIFT: tl.constexpr) -> tl.tensor:
    """Take the weights of `count` keys out of a total: keys of padding, whose score is zero."""
    return total - count * tl.exp2(SHIFT - maximum)


@jit
def normalised(accumulator: tl.tensor, total: tl.tensor) -> tl.tensor:
    """Divide weighted values (queries, channels) by the total of the weights; a query that saw no key gets zeros."""
    return accumulator / tl.where(total == 0.0, 1.0, total)[:, None]
