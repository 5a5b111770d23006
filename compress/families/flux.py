"""FluxTransformer2DModel: double and single stream blocks over packed latents (Black Forest Labs 2024, FLUX.1)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from typing_extensions import override

from compress.errors import RefusedError
from compress.families.base import Guidance
from compress.families.blocks import BlockTransformer, change
from compress.families.segments import Network, Unit
from compress.families.sublayers import Sublayer

_DOUBLE, _SINGLE = "transformer_blocks", "single_transformer_blocks"
_PACK = 2  # a token is a square of latent pixels this wide


class Flux(BlockTransformer):
    """Latents stay (n, c, h, w): packing and unpacking are in the graph, and so are the rotary positions.

    The timestep is the scheduler's, 1000 where the latent is all noise; the pipeline's division by 1000 is in the
    graph too. `rope_cos` and `rope_sin` are (n, text and image tokens, head channels), the same for every sample.

    A double block's sub-layers are its attention (two streams) and the MLP of each stream. A single block computes
    attention and MLP side by side and projects both at once: kept are its attention before that projection, and the
    first layer of its MLP; the projection is always fresh.
    """

    name = "flux"
    denoiser_class = "FluxTransformer2DModel"
    conditioning = ("hidden_states", "timestep", "encoder_hidden_states", "pooled_projections", "guidance")
    stacks = (_DOUBLE, _SINGLE)
    streams = ("tokens", "context")
    float_layers = (r"^x_embedder$", r"^context_embedder$", r"^proj_out$")
    modulation_layers = (r"^time_text_embed\.", r"\.norm1(_context)?\.linear$", r"\.norm\.linear$", r"^norm_out\.")

    @override
    def check(self, denoiser: Network) -> None:
        config = denoiser.config
        channels, given, axes = config.in_channels, config.out_channels, config.axes_dims_rope
        if given not in (None, channels):
            raise RefusedError(
                f"the transformer takes {channels} channels and gives {given}; image conditioning by extra input "
                "channels is not supported: use a model with as many in as out"
            )
        if channels % _PACK**2:
            raise RefusedError(
                f"the transformer takes {channels} channels, which are no packed {_PACK} x {_PACK} latent"
            )
        if config.patch_size != 1:
            raise RefusedError(f"the transformer has patch_size {config.patch_size!r}; only 1 is supported")
        if not all(len(denoiser.get_submodule(stack)) for stack in self.stacks):
            raise RefusedError(f"the transformer has no {_DOUBLE} or no {_SINGLE}, which is not supported")
        even = isinstance(axes, list | tuple) and all(isinstance(size, int) and size % 2 == 0 < size for size in axes)
        if not even or len(axes) != 3 or sum(axes) != config.attention_head_dim:
            raise RefusedError(
                f"axes_dims_rope of the transformer is {axes!r}: it must be three even numbers that add up to "
                f"attention_head_dim ({config.attention_head_dim})"
            )

    @override
    def inputs(self, denoiser: Network) -> tuple[str, ...]:
        return self.conditioning if denoiser.config.guidance_embeds else self.conditioning[:-1]

    @override
    def guidance(self, denoiser: Network) -> Guidance:
        return "embedded" if denoiser.config.guidance_embeds else "none"

    @override
    def sampler_options(self, denoiser: Network, height: int, width: int) -> dict[str, Any]:
        return {"even_sigmas": True, "image_seq_len": (height // _PACK) * (width // _PACK)}

    @override
    def latent_channels(self, denoiser: Network) -> int:
        return int(denoiser.config.in_channels) // _PACK**2

    @override
    def latent_side(self, denoiser: Network) -> int:
        """The configuration does not say; the pipeline's default is 1024 pixels."""
        return 128

    @override
    def latent_multiple(self, denoiser: Network) -> int:
        return _PACK

    @override
    def whole(self, denoiser: Network, *tensors: Tensor) -> Tensor:
        named = dict(zip(self.inputs(denoiser), tensors, strict=True))
        hidden, states = named["hidden_states"], named["encoder_hidden_states"]
        named |= {"hidden_states": _pack(hidden), "timestep": named["timestep"] / 1000}
        text, image = _ids(hidden, states)
        packed = denoiser(**named, txt_ids=text, img_ids=image, return_dict=False)[0]
        return _unpack(packed, hidden)

    @override
    def units(self, denoiser: Network) -> list[Unit]:
        doubles, singles = (len(denoiser.get_submodule(stack)) for stack in self.stacks)
        count = doubles + singles

        def time(model: Network, timestep: Tensor, pooled: Tensor, *guidance: Tensor) -> tuple[Tensor, ...]:
            scaled = (timestep / 1000).to(model.dtype) * 1000
            return (model.time_text_embed(scaled, *(scale.to(model.dtype) * 1000 for scale in guidance), pooled),)

        def embed(model: Network, hidden: Tensor) -> tuple[Tensor, ...]:
            return (model.x_embedder(_pack(hidden)),)

        def text(model: Network, states: Tensor) -> tuple[Tensor, ...]:
            return (model.context_embedder(states),)

        def rope(model: Network, hidden: Tensor, states: Tensor) -> tuple[Tensor, ...]:
            tables = model.pos_embed(torch.cat(_ids(hidden, states)))
            return tuple(table.expand(hidden.shape[0], -1, -1) for table in tables)

        def block(index: int) -> Unit:
            path = f"{_DOUBLE}.{index}" if index < doubles else f"{_SINGLE}.{index - doubles}"
            made = (f"tokens_{index + 1}", f"context_{index + 1}")[: 1 if index == count - 1 else 2]

            def run(model: Network, *given: Tensor) -> tuple[Tensor, ...]:
                tokens, context, temb, cos, sin = given
                context, tokens = model.get_submodule(path)(tokens, context, temb, (cos[0], sin[0]))
                return (tokens, context)[: len(made)]

            given = (f"tokens_{index}", f"context_{index}", "temb", "rope_cos", "rope_sin")
            return Unit(f"block_{index}", given, made, run, (path,))

        def modulate(model: Network, tokens: Tensor, temb: Tensor) -> tuple[Tensor, ...]:
            return (model.transformer_blocks[0].norm1(tokens, emb=temb)[0],)

        def head(model: Network, tokens: Tensor, temb: Tensor, hidden: Tensor) -> tuple[Tensor, ...]:
            return (_unpack(model.proj_out(model.norm_out(tokens, temb)), hidden),)

        scale = ("guidance",) if self.guidance(denoiser) == "embedded" else ()
        return [
            Unit("time", ("timestep", "pooled_projections", *scale), ("temb",), time, ("time_text_embed",)),
            Unit("embed", ("hidden_states",), ("tokens_0",), embed, ("x_embedder",)),
            Unit("modulate", ("tokens_0", "temb"), ("modulated",), modulate),
            Unit("text", ("encoder_hidden_states",), ("context_0",), text, ("context_embedder",)),
            Unit("rope", ("hidden_states", "encoder_hidden_states"), ("rope_cos", "rope_sin"), rope),
            *(unit for index in range(count) for unit in (block(index), change(index + 1))),
            Unit("head", (f"tokens_{count}", "temb", "hidden_states"), (self.output,), head, ("norm_out", "proj_out")),
        ]

    @override
    def sublayers(self, denoiser: Network) -> list[Sublayer]:
        found = []
        for path in self.cut_names(denoiser):
            if path.startswith(_SINGLE):
                found += [Sublayer("self_attention", f"{path}.attn"), Sublayer("mlp", f"{path}.proj_mlp")]
            else:
                found.append(Sublayer("self_attention", f"{path}.attn", streams=2, returns=2))
                found += [Sublayer("mlp", f"{path}.ff"), Sublayer("mlp", f"{path}.ff_context")]
        return found

    @override
    def example_inputs(
        self, denoiser: Network, batch: int, height: int, width: int, prompt_tokens: int
    ) -> dict[str, Tensor]:
        config, generator = denoiser.config, torch.Generator().manual_seed(0)
        inputs = {
            "hidden_states": torch.randn(batch, self.latent_channels(denoiser), height, width, generator=generator),
            "timestep": torch.linspace(1000.0, 0.0, batch + 1)[:batch],
            "encoder_hidden_states": torch.randn(batch, prompt_tokens, config.joint_attention_dim, generator=generator),
            "pooled_projections": torch.randn(batch, config.pooled_projection_dim, generator=generator),
            "guidance": torch.linspace(3.5, 1.0, batch + 1)[:batch],
        }
        return {name: inputs[name] for name in self.inputs(denoiser)}

    @override
    def dynamic_axes(self) -> dict[str, dict[int, str]]:
        return {
            "hidden_states": {0: "batch", 2: "height", 3: "width"},
            "timestep": {0: "batch"},
            "encoder_hidden_states": {0: "batch", 1: "prompt_tokens"},
            "pooled_projections": {0: "batch"},
            "guidance": {0: "batch"},
        }


def _pack(latent: Tensor) -> Tensor:
    """(n, c, h, w) to tokens (n, h/2 * w/2, 4c), as `FluxPipeline._pack_latents`."""
    return functional.pixel_unshuffle(latent, _PACK).flatten(2).transpose(1, 2)


def _unpack(tokens: Tensor, latent: Tensor) -> Tensor:
    """Tokens (n, h/2 * w/2, 4c) to (n, c, h, w); height and width are those of `latent`."""
    height, width = (size // _PACK for size in latent.shape[-2:])
    return functional.pixel_shuffle(tokens.transpose(1, 2).unflatten(2, (height, width)), _PACK)


def _ids(latent: Tensor, states: Tensor) -> tuple[Tensor, Tensor]:
    """Positions (tokens, 3) of the text, all zero, and of the image: zero, row, column."""
    height, width = (size // _PACK for size in latent.shape[-2:])
    row = torch.arange(height, dtype=latent.dtype, device=latent.device)[:, None].expand(height, width)
    column = torch.arange(width, dtype=latent.dtype, device=latent.device)[None].expand(height, width)
    image = torch.stack([torch.zeros_like(row), row, column], dim=-1).flatten(0, 1)
    return image.new_zeros(states.shape[1], 3), image
