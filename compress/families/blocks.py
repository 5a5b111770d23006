"""What transformers of equal blocks have in common: a cut after any number of blocks, and slots for ranges of them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

import torch
from torch import Tensor
from typing_extensions import override

from compress.errors import RefusedError
from compress.families.base import Family
from compress.families.segments import Network, Unit
from compress.families.sublayers import KINDS, Kind
from export.step_plan import Slot


class BlockTransformer(Family):
    """Cut f runs the first f blocks at every network call, and caches what the others add to the image tokens.

    That is the residual cache of a block range, with f front blocks and no back blocks.

    Attributes:
        stacks: the module lists that hold the blocks, in running order.
        streams: the tensors that go from block to block (before block i: `tokens_i`, ...), image tokens first; the
            others end with the last block.
    """

    part = "transformer"
    output = "out_hidden_states"
    stacks: ClassVar[tuple[str, ...]] = ("transformer_blocks",)
    streams: ClassVar[tuple[str, ...]] = ("tokens",)

    @override
    def cut_names(self, denoiser: Network) -> list[str]:
        return [f"{stack}.{i}" for stack in self.stacks for i in range(len(denoiser.get_submodule(stack)))]

    @override
    def block_count(self, denoiser: Network) -> int:
        return len(self.cut_names(denoiser))

    @override
    def block_slots(self, denoiser: Network, first: int, last: int) -> dict[str, Slot]:
        count = self.block_count(denoiser)
        if not 0 <= first < last <= count:
            raise RefusedError(f"there are no blocks {first} to {last - 1}: this denoiser has blocks 0 to {count - 1}")
        streams = self.streams if last < count else self.streams[:1]
        return {f"{s}_{first}_{last}": Slot(f"{s}_{last}", "residual", f"{s}_{first}") for s in streams}

    @override
    def deep_slot(self, denoiser: Network, cut: int) -> Slot:
        return next(iter(self.block_slots(denoiser, cut, self.block_count(denoiser)).values()))

    @override
    def sublayer_slots(self, denoiser: Network, kinds: Sequence[Kind] = KINDS) -> dict[str, Slot]:
        """Where all joint attention is kept, no image token reads a text token any more: the text needs no slots."""
        slots = super().sublayer_slots(denoiser, kinds)
        if len(self.streams) == 1 or "self_attention" not in kinds:
            return slots
        return {name: slot for name, slot in slots.items() if not name.endswith(("_attn_1", "_ff_context"))}

    @override
    def latent_multiple(self, denoiser: Network) -> int:
        return int(denoiser.config.patch_size)


def change(count: int) -> Unit:
    """The unit that says what the first `count` blocks add to the image tokens: what First-Block-Cache watches."""

    def run(_: Network, tokens: Tensor, first: Tensor) -> tuple[Tensor, ...]:
        return (tokens - first,)

    return Unit(f"change_{count}", (f"tokens_{count}", "tokens_0"), (f"change_{count}",), run)


def unpatchify(patches: Tensor, latent: Tensor, patch: int) -> Tensor:
    """Lay patches (n, h/p * w/p, p * p * c) out as (n, c, h, w); height and width are those of `latent`."""
    n, (h, w) = patches.shape[0], latent.shape[-2:]
    grid = patches.reshape(n, h // patch, w // patch, patch, patch, -1)
    return torch.einsum("nhwpqc->nchpwq", grid).reshape(n, -1, h // patch * patch, w // patch * patch)
