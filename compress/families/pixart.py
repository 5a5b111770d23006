"""PixArtTransformer2DModel: text-conditional DiT with cross-attention (Chen et al. 2023, arXiv 2310.00426)."""

from __future__ import annotations

import torch
from torch import Tensor
from typing_extensions import override

from compress.errors import RefusedError
from compress.families.blocks import BlockTransformer, change, unpatchify
from compress.families.dit import refuse_extra_channels
from compress.families.segments import Network, Unit
from compress.families.sublayers import Kind, Sublayer

_NO_SIZE = {"resolution": None, "aspect_ratio": None}


class PixArt(BlockTransformer):
    """One timestep modulation for all blocks. Latents of the trained size only; a learned variance, the second half
    of the output channels, is dropped.
    """

    name = "pixart"
    denoiser_class = "PixArtTransformer2DModel"
    conditioning = ("hidden_states", "timestep", "encoder_hidden_states", "encoder_attention_mask")
    float_layers = (r"^pos_embed\.", r"^caption_projection\.", r"^proj_out$")
    modulation_layers = (r"^adaln_single\.",)

    @override
    def check(self, denoiser: Network) -> None:
        refuse_extra_channels(denoiser)
        if denoiser.use_additional_conditions:
            raise RefusedError(
                "the transformer is conditioned on resolution and aspect ratio (use_additional_conditions, the default "
                "at sample_size 128), which is not supported: use a 256 or 512 pixel model"
            )
        if denoiser.caption_projection is None:
            raise RefusedError("the transformer has no caption projection (caption_channels), which is not supported")

    @override
    def whole(self, denoiser: Network, *tensors: Tensor) -> Tensor:
        named = dict(zip(self.conditioning, tensors, strict=True))
        output: Tensor = denoiser(**named, added_cond_kwargs=_NO_SIZE, return_dict=False)[0]
        return output[:, : denoiser.config.in_channels]

    @override
    def units(self, denoiser: Network) -> list[Unit]:
        def time(model: Network, timestep: Tensor) -> tuple[Tensor, ...]:
            return model.adaln_single(timestep, _NO_SIZE, batch_size=timestep.shape[0], hidden_dtype=model.dtype)

        def embed(model: Network, hidden: Tensor) -> tuple[Tensor, ...]:
            return (model.pos_embed(hidden),)

        def text(model: Network, states: Tensor, mask: Tensor) -> tuple[Tensor, ...]:
            return model.caption_projection(states), ((1 - mask) * -10000.0).unsqueeze(1)

        def block(index: int) -> Unit:
            def run(
                model: Network, tokens: Tensor, modulation: Tensor, context: Tensor, bias: Tensor
            ) -> tuple[Tensor, ...]:
                state = {"encoder_hidden_states": context, "encoder_attention_mask": bias, "timestep": modulation}
                return (model.transformer_blocks[index](tokens, **state),)

            given = (f"tokens_{index}", "modulation", "context", "bias")
            return Unit(f"block_{index}", given, (f"tokens_{index + 1}",), run, (f"transformer_blocks.{index}",))

        def head(model: Network, tokens: Tensor, temb: Tensor, hidden: Tensor) -> tuple[Tensor, ...]:
            shift, scale = (model.scale_shift_table[None] + temb[:, None]).chunk(2, dim=1)
            patches = model.proj_out(model.norm_out(tokens) * (1 + scale) + shift)
            return (unpatchify(patches, hidden, model.config.patch_size)[:, : model.config.in_channels],)

        def modulate(model: Network, tokens: Tensor, modulation: Tensor) -> tuple[Tensor, ...]:
            first = model.transformer_blocks[0]
            table = first.scale_shift_table[None] + modulation.reshape(tokens.shape[0], 6, -1)
            shift, scale, *_ = table.chunk(6, dim=1)
            return (first.norm1(tokens) * (1 + scale) + shift,)

        count = self.block_count(denoiser)
        prompt = ("encoder_hidden_states", "encoder_attention_mask")
        return [
            Unit("time", ("timestep",), ("modulation", "temb"), time, ("adaln_single",)),
            Unit("embed", ("hidden_states",), ("tokens_0",), embed, ("pos_embed",)),
            Unit("modulate", ("tokens_0", "modulation"), ("modulated",), modulate),
            Unit("text", prompt, ("context", "bias"), text, ("caption_projection",)),
            *(unit for index in range(count) for unit in (block(index), change(index + 1))),
            Unit(
                "head",
                (f"tokens_{count}", "temb", "hidden_states"),
                (self.output,),
                head,
                ("scale_shift_table", "proj_out"),
            ),
        ]

    @override
    def sublayers(self, denoiser: Network) -> list[Sublayer]:
        kinds: dict[str, Kind] = {"attn1": "self_attention", "attn2": "cross_attention", "ff": "mlp"}
        return [Sublayer(kind, f"{block}.{name}") for block in self.cut_names(denoiser) for name, kind in kinds.items()]

    @override
    def example_inputs(
        self, denoiser: Network, batch: int, height: int, width: int, prompt_tokens: int
    ) -> dict[str, Tensor]:
        config, generator = denoiser.config, torch.Generator().manual_seed(0)
        mask = torch.ones(batch, prompt_tokens)
        mask[:, prompt_tokens // 2 + 1 :] = 0.0
        return {
            "hidden_states": torch.randn(batch, config.in_channels, height, width, generator=generator),
            "timestep": torch.linspace(999.0, 0.0, batch + 1)[:batch],
            "encoder_hidden_states": torch.randn(batch, prompt_tokens, config.caption_channels, generator=generator),
            "encoder_attention_mask": mask,
        }

    @override
    def dynamic_axes(self) -> dict[str, dict[int, str]]:
        return {
            "hidden_states": {0: "batch"},
            "timestep": {0: "batch"},
            "encoder_hidden_states": {0: "batch", 1: "prompt_tokens"},
            "encoder_attention_mask": {0: "batch", 1: "prompt_tokens"},
        }
