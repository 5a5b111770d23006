"""A low-rank branch in 16 bits beside the few-bit weights, which takes what they round worst.

Source: Li et al. 2024, arXiv 2411.05007 (SVDQuant); here the singular vectors are those of the error of the output, and
branch and rounding are found in turn.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from compress.errors import PassError
from compress.quantization.transforms import product
from export.quant_plan import LowRank

REFINEMENTS = 4
DAMPING = 1e-4
_EXACT = 64
"""Matrices with more rows and columns than this get a randomised decomposition."""


def branch_of(
    rows: Tensor, moments: Tensor, rank: int, round_rows: Callable[[Tensor], Tensor], refinements: int = REFINEMENTS
) -> LowRank:
    """The branch with which the output is closest.

    Args:
        rows: (out_channels, columns) float weights.
        moments: (columns, columns), the mean outer product of the inputs.
        rank: of the branch.
        round_rows: rounds what is left of the weights.
        refinements: how often the branch is found anew for the error of rounding what it leaves.
    """
    root, inverse = _roots(moments)
    target, least = rows, float("inf")
    best: LowRank | None = None
    for _ in range(refinements + 1):
        up, down = _truncated(target @ root, rank)
        branch = LowRank((down @ inverse).half().cpu().numpy(), up.half().cpu().numpy())
        left = rows - product(branch, rows.device)
        rounded = round_rows(left)
        error = float(((left - rounded) @ root).square().sum())
        if error < least:
            least, best = error, branch
        target = rows - rounded
    if best is None:
        raise PassError("the error of rounding is not finite")
    return best


def _roots(moments: Tensor) -> tuple[Tensor, Tensor]:
    """A square root of the damped moments, root @ root.T, and its inverse."""
    damped = moments.double()
    damped.diagonal().add_(DAMPING * damped.diagonal().mean() + 1e-12)
    root = torch.linalg.cholesky(damped)
    identity = torch.eye(len(damped), device=damped.device, dtype=torch.double)
    return root.float(), torch.linalg.solve_triangular(root, identity, upper=False).float()


def _truncated(matrix: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """Factors (rows, rank) and (rank, columns) of the closest matrix of that rank, of equal norms."""
    if min(matrix.shape) > _EXACT:
        with torch.random.fork_rng(devices=[matrix.device] if matrix.is_cuda else []):
            torch.manual_seed(0)
            left, values, right = torch.svd_lowrank(matrix, q=min(rank + 16, *matrix.shape), niter=4)
        right = right.T
    else:
        left, values, right = torch.linalg.svd(matrix, full_matrices=False)
    roots = values[:rank].sqrt()
    return left[:, :rank] * roots, roots[:, None] * right[:rank]
