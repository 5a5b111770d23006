"""DiTTransformer2DModel: class-conditional DiT (Peebles and Xie 2022, arXiv 2212.09748)."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional
from typing_extensions import override

from compress.errors import RefusedError
from compress.families.blocks import BlockTransformer, change, unpatchify
from compress.families.segments import Network, Unit
from compress.families.sublayers import Kind, Sublayer


class DiT(BlockTransformer):
    """Every block embeds timestep and class itself. Square latents of the trained size only; a learned variance,
    the second half of the output channels, is dropped.
    """

    name = "dit"
    denoiser_class = "DiTTransformer2DModel"
    conditioning = ("hidden_states", "timestep", "class_labels")
    float_layers = (r"^pos_embed\.", r"^proj_out_2$")
    modulation_layers = (r"\.norm1\.", r"^proj_out_1$")

    @override
    def check(self, denoiser: Network) -> None:
        refuse_extra_channels(denoiser)

    @override
    def whole(self, denoiser: Network, *tensors: Tensor) -> Tensor:
        output: Tensor = denoiser(**dict(zip(self.conditioning, tensors, strict=True)), return_dict=False)[0]
        return output[:, : denoiser.config.in_channels]

    @override
    def units(self, denoiser: Network) -> list[Unit]:
        def embed(model: Network, hidden: Tensor) -> tuple[Tensor, ...]:
            return (model.pos_embed(hidden),)

        def block(index: int) -> Unit:
            def run(model: Network, tokens: Tensor, timestep: Tensor, label: Tensor) -> tuple[Tensor, ...]:
                return (model.transformer_blocks[index](tokens, timestep=timestep, class_labels=label),)

            given = (f"tokens_{index}", "timestep", "class_labels")
            return Unit(f"block_{index}", given, (f"tokens_{index + 1}",), run, (f"transformer_blocks.{index}",))

        def head(model: Network, tokens: Tensor, hidden: Tensor, timestep: Tensor, label: Tensor) -> tuple[Tensor, ...]:
            emb = model.transformer_blocks[0].norm1.emb(timestep, label, hidden_dtype=tokens.dtype)
            shift, scale = model.proj_out_1(functional.silu(emb)).chunk(2, dim=1)
            patches = model.proj_out_2(model.norm_out(tokens) * (1 + scale[:, None]) + shift[:, None])
            return (unpatchify(patches, hidden, model.config.patch_size)[:, : model.config.in_channels],)

        def modulate(model: Network, tokens: Tensor, timestep: Tensor, label: Tensor) -> tuple[Tensor, ...]:
            norm = model.transformer_blocks[0].norm1
            return (norm(tokens, timestep, label, hidden_dtype=tokens.dtype)[0],)

        modulated = Unit("modulate", ("tokens_0", "timestep", "class_labels"), ("modulated",), modulate)
        count = self.block_count(denoiser)
        ends = ("transformer_blocks.0.norm1.emb", "proj_out_1", "proj_out_2")
        return [
            Unit("embed", ("hidden_states",), ("tokens_0",), embed, ("pos_embed",)),
            modulated,
            *(unit for index in range(count) for unit in (block(index), change(index + 1))),
            Unit("head", (f"tokens_{count}", *self.conditioning), (self.output,), head, ends),
        ]

    @override
    def sublayers(self, denoiser: Network) -> list[Sublayer]:
        kinds: dict[str, Kind] = {"attn1": "self_attention", "ff": "mlp"}
        return [Sublayer(kind, f"{block}.{name}") for block in self.cut_names(denoiser) for name, kind in kinds.items()]

    @override
    def example_inputs(
        self, denoiser: Network, batch: int, height: int, width: int, prompt_tokens: int
    ) -> dict[str, Tensor]:
        config, generator = denoiser.config, torch.Generator().manual_seed(0)
        return {
            "hidden_states": torch.randn(batch, config.in_channels, height, width, generator=generator),
            "timestep": torch.linspace(999.0, 0.0, batch + 1)[:batch],
            "class_labels": torch.arange(batch) % config.num_embeds_ada_norm,
        }

    @override
    def dynamic_axes(self) -> dict[str, dict[int, str]]:
        return {"hidden_states": {0: "batch"}, "timestep": {0: "batch"}, "class_labels": {0: "batch"}}


def refuse_extra_channels(denoiser: Network) -> None:
    """Refuse a transformer whose output is neither the latent nor the latent with its learned variance.

    Raises:
        RefusedError: says how many channels it takes and gives.
    """
    channels, given = denoiser.config.in_channels, denoiser.config.out_channels
    if given not in (None, channels, 2 * channels):
        raise RefusedError(
            f"the transformer takes {channels} channels and gives {given}; supported are as many out as in, or twice "
            "as many (learned variance)"
        )
