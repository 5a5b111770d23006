"""SD3Transformer2DModel (MMDiT): one cut after any number of leading joint blocks."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from compress.errors import RefusedError
from compress.families.base import Family, Piece
from export.step_plan import Slot


class SD3(Family):
    """Cut f runs the first f joint blocks at every call and caches what the others add to the image tokens.

    The text tokens need no slot: nothing after the last block reads them. (Esser et al. 2024, arXiv 2403.03206, for
    the network; the residual cache of a block range is that of DBCache with F = f, B = 0.)
    """

    name = "sd3"
    denoiser_class = "SD3Transformer2DModel"
    part = "transformer"
    conditioning = ("hidden_states", "timestep", "encoder_hidden_states", "pooled_projections")
    output = "out_hidden_states"
    float_layers = (
        r"^pos_embed\.",
        r"^time_text_embed\.",
        r"^context_embedder$",
        r"norm1(_context)?\.linear$",
        r"^norm_out\.",
        r"^proj_out$",
    )

    def check(self, denoiser: nn.Module) -> None:
        config: Any = denoiser.config
        if config.in_channels != config.out_channels:
            raise RefusedError(
                f"the transformer takes {config.in_channels} channels and gives {config.out_channels}; image "
                "conditioning by extra input channels is not supported"
            )

    def whole(self, denoiser: nn.Module, *tensors: Tensor) -> Tensor:
        hidden, timestep, text, pooled = tensors
        return denoiser(
            hidden_states=hidden,
            timestep=timestep,
            encoder_hidden_states=text,
            pooled_projections=pooled,
            return_dict=False,
        )[0]

    def cut_names(self, denoiser: nn.Module) -> list[str]:
        return [f"transformer_blocks.{f}" for f in range(len(denoiser.transformer_blocks))]  # type: ignore[arg-type]

    def pieces(self, denoiser: nn.Module, cut: int) -> tuple[Piece, Piece, Piece, Slot]:
        def entry(
            model: Any, hidden: Tensor, timestep: Tensor, text: Tensor, pooled: Tensor
        ) -> tuple[Tensor, Tensor, Tensor]:
            tokens = model.pos_embed(hidden).contiguous()
            temb = model.time_text_embed(timestep, pooled)
            context = model.context_embedder(text)
            for block in model.transformer_blocks[:cut]:
                context, tokens = block(hidden_states=tokens, encoder_hidden_states=context, temb=temb)
            return tokens, context, temb

        def deep(model: Any, tokens: Tensor, context: Tensor, temb: Tensor) -> tuple[Tensor]:
            for block in model.transformer_blocks[cut:]:
                context, tokens = block(hidden_states=tokens, encoder_hidden_states=context, temb=temb)
            return (tokens,)

        def exit_(model: Any, tokens: Tensor, temb: Tensor, hidden: Tensor) -> tuple[Tensor]:
            patches = model.proj_out(model.norm_out(tokens, temb))
            return (unpatchify(patches, hidden, model.config.patch_size),)

        return (
            Piece("entry", self.conditioning, ("tokens", "context", "temb"), entry),
            Piece("deep", ("tokens", "context", "temb"), ("deep",), deep),
            Piece("exit", ("deep", "temb", "hidden_states"), (self.output,), exit_),
            Slot("deep", kind="residual", base="tokens"),
        )

    def shallow_modules(self, denoiser: nn.Module, cut: int) -> list[str]:
        ends = ["pos_embed", "time_text_embed", "context_embedder", "norm_out", "proj_out"]
        return ends + [f"transformer_blocks.{f}" for f in range(cut)]

    def example_inputs(
        self, denoiser: nn.Module, batch: int, height: int, width: int, prompt_tokens: int
    ) -> dict[str, Tensor]:
        config: Any = denoiser.config
        generator = torch.Generator().manual_seed(0)
        return {
            "hidden_states": torch.randn(batch, config.in_channels, height, width, generator=generator),
            "timestep": torch.linspace(1000.0, 0.0, batch + 1)[:batch],
            "encoder_hidden_states": torch.randn(batch, prompt_tokens, config.joint_attention_dim, generator=generator),
            "pooled_projections": torch.randn(batch, config.pooled_projection_dim, generator=generator),
        }

    def dynamic_axes(self) -> dict[str, dict[int, str]]:
        return {
            "hidden_states": {0: "batch", 2: "height", 3: "width"},
            "timestep": {0: "batch"},
            "encoder_hidden_states": {0: "batch", 1: "prompt_tokens"},
            "pooled_projections": {0: "batch"},
        }

    def latent_multiple(self, denoiser: nn.Module) -> int:
        return int(denoiser.config.patch_size)  # type: ignore[union-attr, arg-type]

    def latent_side(self, denoiser: nn.Module) -> int:
        return int(denoiser.config.sample_size)  # type: ignore[union-attr, arg-type]


def unpatchify(patches: Tensor, latent: Tensor, patch: int) -> Tensor:
    """Lay patches (n, h/p * w/p, p * p * c) out as (n, c, h, w), height and width taken from `latent`."""
    n, (h, w) = patches.shape[0], latent.shape[-2:]
    grid = patches.reshape(n, h // patch, w // patch, patch, patch, -1)
    return torch.einsum("nhwpqc->nchpwq", grid).reshape(n, -1, h // patch * patch, w // patch * patch)
