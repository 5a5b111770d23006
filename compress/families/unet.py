"""UNet2DConditionModel (Stable Diffusion 1.x and 2.x): one cut per skip connection."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from typing_extensions import override

from compress.errors import RefusedError
from compress.families.base import Family, Network, Piece
from export.step_plan import Slot

_BLOCKS = ("DownBlock2D", "CrossAttnDownBlock2D", "UpBlock2D", "CrossAttnUpBlock2D")
_PLAIN_ONLY = {
    "class_embed_type": "class embeddings",
    "num_class_embeds": "class embeddings",
    "encoder_hid_dim": "a projection of the text states",
    "time_embedding_act_fn": "an activation after the time embedding",
    "time_cond_proj_dim": "a guidance embedding",
    "center_input_sample": "centred inputs",
}


class Unit(NamedTuple):
    """Paths of the modules of one unit, in the order they run: plain (convolution, resampler), resnet, attention."""

    resnet: str | None = None
    attention: str | None = None
    plain: str | None = None

    @property
    def paths(self) -> list[str]:
        """Those there are."""
        return [path for path in self if path is not None]


def _down_units(unet: Network) -> list[Unit]:
    """The units that produce the skips s_0 (conv_in), s_1, ... in order."""
    units = [Unit(plain="conv_in")]
    for b, block in enumerate(unet.down_blocks):
        units += _resnet_units(f"down_blocks.{b}", block)
        units += [Unit(plain=f"down_blocks.{b}.downsamplers.{d}") for d in range(len(block.downsamplers or ()))]
    return units


def _up_units(unet: Network) -> list[Unit]:
    """The units that consume the skips s_0, s_1, ...; the last of a block ends with its upsampler."""
    units: list[Unit] = []
    for b, block in enumerate(unet.up_blocks):
        units += _resnet_units(f"up_blocks.{b}", block)
        if block.upsamplers is not None:
            units[-1] = units[-1]._replace(plain=f"up_blocks.{b}.upsamplers.0")
    return units[::-1]


def _resnet_units(path: str, block: Network) -> list[Unit]:
    attentions = len(getattr(block, "attentions", ()))
    return [
        Unit(resnet=f"{path}.resnets.{r}", attention=f"{path}.attentions.{r}" if r < attentions else None)
        for r in range(len(block.resnets))
    ]


def _run_unit(unet: Network, unit: Unit, hidden: Tensor, emb: Tensor, text: Tensor | None) -> Tensor:
    if unit.resnet is not None:
        hidden = unet.get_submodule(unit.resnet)(hidden, emb)
    if unit.attention is not None:
        hidden = unet.get_submodule(unit.attention)(hidden, encoder_hidden_states=text, return_dict=False)[0]
    if unit.plain is not None:
        hidden = unet.get_submodule(unit.plain)(hidden)
    return hidden


class UNet(Family):
    """Cut k caches the tensor that enters the up unit which consumes skip k.

    That is branch k of DeepCache (Ma et al. 2023, arXiv 2312.00858): the shallow path runs conv_in, the down units
    1 to k, the up units that consume skips k to 0, and the head; the time embedding is always fresh.
    """

    name = "unet"
    denoiser_class = "UNet2DConditionModel"
    part = "unet"
    conditioning = ("sample", "timestep", "encoder_hidden_states")
    output = "out_sample"
    float_layers = (r"^conv_in$", r"^conv_out$")
    modulation_layers = (r"^time_embedding\.", r"^add_embedding\.", r"time_emb_proj$")

    @override
    def check(self, denoiser: Network) -> None:
        config = denoiser.config
        if config.in_channels != config.out_channels:
            raise RefusedError(
                f"the UNet takes {config.in_channels} channels and gives {config.out_channels}; inpainting and image "
                "conditioning by extra input channels are not supported: use a model with as many in as out"
            )
        if not isinstance(config.sample_size, int):
            raise RefusedError("the UNet's config.json must give the side of its latent as one number (sample_size)")
        if not isinstance(config.cross_attention_dim, int):
            raise RefusedError("the UNet has a cross_attention_dim for every block; only one for all is supported")
        for key, meaning in _PLAIN_ONLY.items():
            if config.get(key):
                raise RefusedError(f"the UNet has {meaning} ({key}), which is not supported")
        if config.addition_embed_type not in (None, "text"):
            raise RefusedError(
                f"the UNet has addition_embed_type {config.addition_embed_type!r}; only none and 'text' are supported"
            )
        blocks = {type(block).__name__ for block in (*denoiser.down_blocks, *denoiser.up_blocks)}
        if unknown := sorted(blocks.difference(_BLOCKS)):
            raise RefusedError(f"the UNet has blocks of type {unknown[0]}; supported are {', '.join(_BLOCKS)}")
        if type(denoiser.mid_block).__name__ != "UNetMidBlock2DCrossAttn":
            raise RefusedError("the UNet's middle block is not UNetMidBlock2DCrossAttn, the only supported type")

    @override
    def whole(self, denoiser: Network, *tensors: Tensor) -> Tensor:
        sample, timestep, text = tensors
        return denoiser(sample, timestep, encoder_hidden_states=text, return_dict=False)[0]

    @override
    def cut_names(self, denoiser: Network) -> list[str]:
        return [unit.paths[0] for unit in _up_units(denoiser)]

    @override
    def pieces(self, denoiser: Network, cut: int) -> tuple[Piece, Piece, Piece, Slot]:
        down, up = _down_units(denoiser), _up_units(denoiser)
        skips = tuple(f"skip_{i}" for i in range(cut + 1))
        below, above = down[: cut + 1], down[cut + 1 :]
        deep_up, exit_up = up[:cut:-1], up[cut::-1]
        pooled = denoiser.config.addition_embed_type == "text"

        def text(needed: bool) -> tuple[str, ...]:
            return ("encoder_hidden_states",) if needed else ()

        def entry(unet: Network, sample: Tensor, timestep: Tensor, text: Tensor | None = None) -> tuple[Tensor, ...]:
            emb = _time_embedding(unet, sample, timestep, text)
            hidden, outputs = sample, []
            for unit in below:
                hidden = _run_unit(unet, unit, hidden, emb, text)
                outputs.append(hidden)
            return (emb, *outputs)

        def deep(unet: Network, hidden: Tensor, emb: Tensor, text: Tensor) -> tuple[Tensor, ...]:
            inner = []
            for unit in above:
                hidden = _run_unit(unet, unit, hidden, emb, text)
                inner.append(hidden)
            hidden = unet.mid_block(hidden, emb, encoder_hidden_states=text)
            return (_consume(unet, deep_up, hidden, inner, emb, text),)

        def exit_(unet: Network, hidden: Tensor, emb: Tensor, *rest: Tensor) -> tuple[Tensor, ...]:
            outer, text = rest[: cut + 1], rest[cut + 1] if len(rest) > cut + 1 else None
            hidden = _consume(unet, exit_up, hidden, outer, emb, text)
            return (unet.conv_out(unet.conv_act(unet.conv_norm_out(hidden))),)

        entry_text = text(pooled or _attends(below))
        return (
            Piece("entry", ("sample", "timestep", *entry_text), ("emb", *skips), entry),
            Piece("deep", (skips[-1], "emb", "encoder_hidden_states"), ("deep",), deep),
            Piece("exit", ("deep", "emb", *skips, *text(_attends(exit_up))), (self.output,), exit_),
            Slot("deep"),
        )

    @override
    def shallow_modules(self, denoiser: Network, cut: int) -> list[str]:
        units = _down_units(denoiser)[: cut + 1] + _up_units(denoiser)[: cut + 1]
        ends = ["time_embedding", "add_embedding", "conv_norm_out", "conv_out"]
        return ends + [path for unit in units for path in unit.paths]

    @override
    def example_inputs(
        self, denoiser: Network, batch: int, height: int, width: int, prompt_tokens: int
    ) -> dict[str, Tensor]:
        config, generator = denoiser.config, torch.Generator().manual_seed(0)
        return {
            "sample": torch.randn(batch, config.in_channels, height, width, generator=generator),
            "timestep": torch.linspace(999.0, 0.0, batch + 1)[:batch],
            "encoder_hidden_states": torch.randn(batch, prompt_tokens, config.cross_attention_dim, generator=generator),
        }

    @override
    def dynamic_axes(self) -> dict[str, dict[int, str]]:
        return {
            "sample": {0: "batch", 2: "height", 3: "width"},
            "timestep": {0: "batch"},
            "encoder_hidden_states": {0: "batch", 1: "prompt_tokens"},
        }

    @override
    def latent_multiple(self, denoiser: Network) -> int:
        return 2 ** int(denoiser.num_upsamplers)


def _attends(units: Sequence[Unit]) -> bool:
    return any(unit.attention is not None for unit in units)


def _time_embedding(unet: Network, sample: Tensor, timestep: Tensor, text: Tensor | None) -> Tensor:
    emb = unet.time_embedding(unet.get_time_embed(sample=sample, timestep=timestep))
    extra = unet.get_aug_embed(emb=emb, encoder_hidden_states=text, added_cond_kwargs={})
    return emb if extra is None else emb + extra


def _consume(
    unet: Network, units: Sequence[Unit], hidden: Tensor, skips: Sequence[Tensor], emb: Tensor, text: Tensor | None
) -> Tensor:
    """Run up units, each on its input joined with the next skip, the last skip first."""
    for unit, skip in zip(units, reversed(skips), strict=True):
        hidden = _run_unit(unet, unit, torch.cat([hidden, skip], dim=1), emb, text)
    return hidden
