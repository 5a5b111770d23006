"""SD3Transformer2DModel: the MMDiT of Stable Diffusion 3 (Esser et al. 2024, arXiv 2403.03206)."""

from __future__ import annotations

import torch
from torch import Tensor
from typing_extensions import override

from compress.errors import RefusedError
from compress.families.base import Network, Piece
from compress.families.blocks import RESIDUAL, BlockTransformer, unpatchify
from export.step_plan import Slot


class SD3(BlockTransformer):
    """Image and text tokens in joint blocks. The text tokens need no slot: nothing reads them after the last block."""

    name = "sd3"
    denoiser_class = "SD3Transformer2DModel"
    conditioning = ("hidden_states", "timestep", "encoder_hidden_states", "pooled_projections")
    ends = ("pos_embed", "time_text_embed", "context_embedder", "norm_out", "proj_out")
    float_layers = (r"^pos_embed\.", r"^context_embedder$", r"^proj_out$")
    modulation_layers = (r"^time_text_embed\.", r"\.norm1(_context)?\.linear$", r"^norm_out\.")

    @override
    def check(self, denoiser: Network) -> None:
        channels, given = denoiser.config.in_channels, denoiser.config.out_channels
        if given not in (None, channels):
            raise RefusedError(
                f"the transformer takes {channels} channels and gives {given}; image conditioning by extra input "
                "channels is not supported: use a model with as many in as out"
            )

    @override
    def whole(self, denoiser: Network, *tensors: Tensor) -> Tensor:
        return denoiser(**dict(zip(self.conditioning, tensors, strict=True)), return_dict=False)[0]

    @override
    def pieces(self, denoiser: Network, cut: int) -> tuple[Piece, Piece, Piece, Slot]:
        def entry(model: Network, hidden: Tensor, timestep: Tensor, text: Tensor, pooled: Tensor) -> tuple[Tensor, ...]:
            tokens = model.pos_embed(hidden).contiguous()
            context = model.context_embedder(text)
            temb = model.time_text_embed(timestep, pooled)
            for block in model.transformer_blocks[:cut]:
                context, tokens = block(tokens, context, temb)
            return tokens, context, temb

        def deep(model: Network, tokens: Tensor, context: Tensor, temb: Tensor) -> tuple[Tensor, ...]:
            for block in model.transformer_blocks[cut:]:
                context, tokens = block(tokens, context, temb)
            return (tokens,)

        def exit_(model: Network, tokens: Tensor, temb: Tensor, hidden: Tensor) -> tuple[Tensor, ...]:
            patches = model.proj_out(model.norm_out(tokens, temb))
            return (unpatchify(patches, hidden, model.config.patch_size),)

        return (
            Piece("entry", self.conditioning, ("tokens", "context", "temb"), entry),
            Piece("deep", ("tokens", "context", "temb"), ("deep",), deep),
            Piece("exit", ("deep", "temb", "hidden_states"), (self.output,), exit_),
            RESIDUAL,
        )

    @override
    def example_inputs(
        self, denoiser: Network, batch: int, height: int, width: int, prompt_tokens: int
    ) -> dict[str, Tensor]:
        config, generator = denoiser.config, torch.Generator().manual_seed(0)
        return {
            "hidden_states": torch.randn(batch, config.in_channels, height, width, generator=generator),
            "timestep": torch.linspace(1000.0, 0.0, batch + 1)[:batch],
            "encoder_hidden_states": torch.randn(batch, prompt_tokens, config.joint_attention_dim, generator=generator),
            "pooled_projections": torch.randn(batch, config.pooled_projection_dim, generator=generator),
        }

    @override
    def dynamic_axes(self) -> dict[str, dict[int, str]]:
        return {
            "hidden_states": {0: "batch", 2: "height", 3: "width"},
            "timestep": {0: "batch"},
            "encoder_hidden_states": {0: "batch", 1: "prompt_tokens"},
            "pooled_projections": {0: "batch"},
        }
