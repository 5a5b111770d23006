"""What transformers of equal blocks have in common: one cut after any number of leading blocks."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor
from typing_extensions import override

from compress.families.base import Family, Network
from export.step_plan import Slot

RESIDUAL = Slot("deep", kind="residual", base="tokens")
"""What the cached blocks add to the image tokens (n, tokens, width)."""


class BlockTransformer(Family):
    """Cut f runs the first f blocks at every network call, and caches what the others add to the image tokens.

    That is the residual cache of a block range, with f front blocks and no back blocks.

    Attributes:
        ends: paths of what runs before the first and after the last block.
    """

    part = "transformer"
    output = "out_hidden_states"
    ends: ClassVar[tuple[str, ...]]

    @override
    def cut_names(self, denoiser: Network) -> list[str]:
        return [f"transformer_blocks.{f}" for f in range(len(denoiser.transformer_blocks))]

    @override
    def shallow_modules(self, denoiser: Network, cut: int) -> list[str]:
        return [*self.ends, *self.cut_names(denoiser)[:cut]]

    @override
    def latent_multiple(self, denoiser: Network) -> int:
        return int(denoiser.config.patch_size)


def unpatchify(patches: Tensor, latent: Tensor, patch: int) -> Tensor:
    """Lay patches (n, h/p * w/p, p * p * c) out as (n, c, h, w); height and width are those of `latent`."""
    n, (h, w) = patches.shape[0], latent.shape[-2:]
    grid = patches.reshape(n, h // patch, w // patch, patch, patch, -1)
    return torch.einsum("nhwpqc->nchpwq", grid).reshape(n, -1, h // patch * patch, w // patch * patch)
