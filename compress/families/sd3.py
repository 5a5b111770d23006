"""SD3Transformer2DModel: the MMDiT of Stable Diffusion 3 (Esser et al. 2024, arXiv 2403.03206)."""

from __future__ import annotations

import torch
from torch import Tensor
from typing_extensions import override

from compress.errors import RefusedError
from compress.families.blocks import BlockTransformer, change, unpatchify
from compress.families.segments import Network, Unit
from compress.families.sublayers import Sublayer


class SD3(BlockTransformer):
    """Image and text tokens in joint blocks. The text tokens need no slot: nothing reads them after the last block."""

    name = "sd3"
    denoiser_class = "SD3Transformer2DModel"
    conditioning = ("hidden_states", "timestep", "encoder_hidden_states", "pooled_projections")
    streams = ("tokens", "context")
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
    def units(self, denoiser: Network) -> list[Unit]:
        count = self.block_count(denoiser)

        def time(model: Network, timestep: Tensor, pooled: Tensor) -> tuple[Tensor, ...]:
            return (model.time_text_embed(timestep, pooled),)

        def text(model: Network, states: Tensor) -> tuple[Tensor, ...]:
            return (model.context_embedder(states),)

        def embed(model: Network, hidden: Tensor) -> tuple[Tensor, ...]:
            return (model.pos_embed(hidden).contiguous(),)

        def block(index: int) -> Unit:
            def run(model: Network, tokens: Tensor, context: Tensor, temb: Tensor) -> tuple[Tensor, ...]:
                context, tokens = model.transformer_blocks[index](tokens, context, temb)
                return (tokens,) if index == count - 1 else (tokens, context)

            given = (f"tokens_{index}", f"context_{index}", "temb")
            made = (f"tokens_{index + 1}", f"context_{index + 1}")[: 1 if index == count - 1 else 2]
            return Unit(f"block_{index}", given, made, run, (f"transformer_blocks.{index}",))

        def modulate(model: Network, tokens: Tensor, temb: Tensor) -> tuple[Tensor, ...]:
            return (model.transformer_blocks[0].norm1(tokens, emb=temb)[0],)

        def head(model: Network, tokens: Tensor, temb: Tensor, hidden: Tensor) -> tuple[Tensor, ...]:
            patches = model.proj_out(model.norm_out(tokens, temb))
            return (unpatchify(patches, hidden, model.config.patch_size),)

        return [
            Unit("time", ("timestep", "pooled_projections"), ("temb",), time, ("time_text_embed",)),
            Unit("embed", ("hidden_states",), ("tokens_0",), embed, ("pos_embed",)),
            Unit("modulate", ("tokens_0", "temb"), ("modulated",), modulate),
            Unit("text", ("encoder_hidden_states",), ("context_0",), text, ("context_embedder",)),
            *(unit for index in range(count) for unit in (block(index), change(index + 1))),
            Unit("head", (f"tokens_{count}", "temb", "hidden_states"), (self.output,), head, ("norm_out", "proj_out")),
        ]

    @override
    def sublayers(self, denoiser: Network) -> list[Sublayer]:
        found = []
        for path in self.cut_names(denoiser):
            block = denoiser.get_submodule(path)
            streams = 1 if block.context_pre_only else 2
            found.append(Sublayer("self_attention", f"{path}.attn", streams, returns=2))
            if block.use_dual_attention:
                found.append(Sublayer("self_attention", f"{path}.attn2"))
            found.append(Sublayer("mlp", f"{path}.ff"))
            if not block.context_pre_only:
                found.append(Sublayer("mlp", f"{path}.ff_context"))
        return found

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
