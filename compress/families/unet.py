"""UNet2DConditionModel (Stable Diffusion 1.x, 2.x and XL): one cut per skip connection."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from typing_extensions import override

from compress.errors import RefusedError
from compress.families.base import Family
from compress.families.layout import Layout
from compress.families.segments import Network, Unit
from compress.families.sublayers import Kind, Sublayer
from export.step_plan import Slot

_BLOCKS = ("DownBlock2D", "CrossAttnDownBlock2D", "UpBlock2D", "CrossAttnUpBlock2D")
_TEXT = ("encoder_hidden_states",)
_ADDED = {None: (), "text": _TEXT, "text_time": ("text_embeds", "time_ids")}
"""addition_embed_type -> what its embedding, which is added to that of the timestep, is made of."""

TIME_IDS = 6
"""Numbers in `time_ids`: height and width of the picture that was cropped, top and left of the crop, its height and
width (Podell et al. 2023, arXiv 2307.01952, section 2.2)."""

_DOWNSCALE = 8  # of the usual VAE, for examples
_PLAIN_ONLY = {
    "class_embed_type": "class embeddings",
    "num_class_embeds": "class embeddings",
    "encoder_hid_dim": "a projection of the text states",
    "time_embedding_act_fn": "an activation after the time embedding",
    "time_cond_proj_dim": "a guidance embedding",
    "center_input_sample": "centred inputs",
}


class Layers(NamedTuple):
    """Paths of the modules of one unit, in the order they run: resnet, attention, plain (convolution, resampler)."""

    resnet: str | None = None
    attention: str | None = None
    plain: str | None = None

    @property
    def paths(self) -> list[str]:
        """Those there are."""
        return [path for path in self if path is not None]


def down_layers(unet: Network) -> list[Layers]:
    """The units that produce the skips s_0 (conv_in), s_1, ... in order."""
    found = [Layers(plain="conv_in")]
    for b, block in enumerate(unet.down_blocks):
        found += _resnet_layers(f"down_blocks.{b}", block)
        found += [Layers(plain=f"down_blocks.{b}.downsamplers.{d}") for d in range(len(block.downsamplers or ()))]
    return found


def _up_layers(unet: Network) -> list[Layers]:
    """The units that consume the skips s_0, s_1, ...; the last of a block ends with its upsampler."""
    found: list[Layers] = []
    for b, block in enumerate(unet.up_blocks):
        found += _resnet_layers(f"up_blocks.{b}", block)
        if block.upsamplers is not None:
            found[-1] = found[-1]._replace(plain=f"up_blocks.{b}.upsamplers.0")
    return found[::-1]


def _resnet_layers(path: str, block: Network) -> list[Layers]:
    attentions = len(getattr(block, "attentions", ()))
    return [
        Layers(resnet=f"{path}.resnets.{r}", attention=f"{path}.attentions.{r}" if r < attentions else None)
        for r in range(len(block.resnets))
    ]


def _run(
    unet: Network, layers: Layers, hidden: Tensor, emb: Tensor | None = None, text: Tensor | None = None
) -> Tensor:
    if layers.resnet is not None:
        hidden = unet.get_submodule(layers.resnet)(hidden, emb)
    if layers.attention is not None:
        hidden = unet.get_submodule(layers.attention)(hidden, encoder_hidden_states=text, return_dict=False)[0]
    if layers.plain is not None:
        hidden = unet.get_submodule(layers.plain)(hidden)
    return hidden


class UNet(Family):
    """Cut k caches the tensor that enters the up unit which consumes skip k.

    That is branch k of DeepCache (Ma et al. 2023, arXiv 2312.00858): the shallow path runs conv_in, the down units
    1 to k, the up units that consume skips k to 0, and the head; the time embedding is always fresh.
    """

    name = "unet"
    denoiser_class = "UNet2DConditionModel"
    part = "unet"
    conditioning = ("sample", "timestep", "encoder_hidden_states", "text_embeds", "time_ids")
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
        if config.addition_embed_type not in _ADDED:
            raise RefusedError(
                f"the UNet has addition_embed_type {config.addition_embed_type!r}; supported are none, 'text' and "
                "'text_time'"
            )
        blocks = {type(block).__name__ for block in (*denoiser.down_blocks, *denoiser.up_blocks)}
        if unknown := sorted(blocks.difference(_BLOCKS)):
            raise RefusedError(f"the UNet has blocks of type {unknown[0]}; supported are {', '.join(_BLOCKS)}")
        if type(denoiser.mid_block).__name__ not in ("UNetMidBlock2DCrossAttn", "NoneType"):
            raise RefusedError("the UNet's middle block is not UNetMidBlock2DCrossAttn, the only supported type")

    @override
    def inputs(self, denoiser: Network) -> tuple[str, ...]:
        return tuple(dict.fromkeys((*self.conditioning[:3], *_ADDED[denoiser.config.addition_embed_type])))

    @override
    def whole(self, denoiser: Network, *tensors: Tensor) -> Tensor:
        named = dict(zip(self.inputs(denoiser), tensors, strict=True))
        sample, timestep, text = (named.pop(name) for name in self.conditioning[:3])
        return denoiser(sample, timestep, encoder_hidden_states=text, added_cond_kwargs=named, return_dict=False)[0]

    @override
    def cut_names(self, denoiser: Network) -> list[str]:
        return [layers.paths[0] for layers in _up_layers(denoiser)]

    @override
    def units(self, denoiser: Network) -> list[Unit]:
        """Unit `down_i` gives skip i, and `up_i` consumes it; `up_i` is named as the tensor it gives."""
        added = _ADDED[denoiser.config.addition_embed_type]
        down, up = down_layers(denoiser), _up_layers(denoiser)
        last = len(down) - 1
        return [
            Unit("time", ("timestep", *added), ("emb",), _time, ("time_embedding", "add_embedding")),
            *(_down_unit(i, layers) for i, layers in enumerate(down)),
            _mid_unit(denoiser, f"skip_{last}"),
            *(_up_unit(i, layers, "mid" if i == last else f"up_{i + 1}") for i, layers in reversed([*enumerate(up)])),
            Unit("head", ("up_0",), (self.output,), _head, ("conv_norm_out", "conv_out")),
        ]

    @override
    def deep_slot(self, denoiser: Network, cut: int) -> Slot:
        return Slot("mid" if cut == len(self.cut_names(denoiser)) - 1 else f"up_{cut + 1}")

    @override
    def encoder_layout(self, denoiser: Network) -> Layout:
        """All skips and the output of the middle block (Faster Diffusion, Li et al. 2023, arXiv 2312.09608)."""
        skips = [f"skip_{i}" for i in range(len(self.cut_names(denoiser)))]
        slots = {tensor: Slot(tensor) for tensor in (*skips, "mid")}
        return Layout.of(slots, {"decoder": tuple(slots)})

    @override
    def sublayers(self, denoiser: Network) -> list[Sublayer]:
        kinds: dict[str, Kind] = {"attn1": "self_attention", "attn2": "cross_attention", "ff": "mlp"}
        middle = getattr(denoiser.mid_block, "attentions", ())
        mid = [f"mid_block.attentions.{i}" for i in range(len(middle))]
        down, up = (
            [layers.attention for layers in found if layers.attention is not None]
            for found in (down_layers(denoiser), reversed(_up_layers(denoiser)))
        )
        return [
            Sublayer(kind, f"{attention}.transformer_blocks.{i}.{name}")
            for attention in (*down, *mid, *up)
            for i in range(len(denoiser.get_submodule(attention).transformer_blocks))
            for name, kind in kinds.items()
        ]

    @override
    def example_inputs(
        self, denoiser: Network, batch: int, height: int, width: int, prompt_tokens: int
    ) -> dict[str, Tensor]:
        config, generator = denoiser.config, torch.Generator().manual_seed(0)
        inputs = {
            "sample": torch.randn(batch, config.in_channels, height, width, generator=generator),
            "timestep": torch.linspace(999.0, 0.0, batch + 1)[:batch],
            "encoder_hidden_states": torch.randn(batch, prompt_tokens, config.cross_attention_dim, generator=generator),
        }
        if config.addition_embed_type == "text_time":
            size = torch.tensor([[height, width, 0, 0, height, width]], dtype=torch.float32)
            inputs["text_embeds"] = torch.randn(batch, pooled_width(denoiser), generator=generator)
            inputs["time_ids"] = (_DOWNSCALE * size).repeat(batch, 1)
        return inputs

    @override
    def dynamic_axes(self) -> dict[str, dict[int, str]]:
        return {
            "sample": {0: "batch", 2: "height", 3: "width"},
            "timestep": {0: "batch"},
            "encoder_hidden_states": {0: "batch", 1: "prompt_tokens"},
            "text_embeds": {0: "batch"},
            "time_ids": {0: "batch"},
        }

    @override
    def latent_multiple(self, denoiser: Network) -> int:
        return 2 ** int(denoiser.num_upsamplers)


def pooled_width(unet: Network) -> int:
    """Channels of `text_embeds`: what the embedded sizes leave of the input of the added embedding."""
    return int(unet.config.projection_class_embeddings_input_dim) - TIME_IDS * int(unet.config.addition_time_embed_dim)


def _down_unit(index: int, layers: Layers) -> Unit:
    before = "sample" if index == 0 else f"skip_{index - 1}"
    given = (before, *_conditions(layers))

    def run(unet: Network, hidden: Tensor, *conditions: Tensor) -> tuple[Tensor, ...]:
        return (_run(unet, layers, hidden, *conditions),)

    return Unit(f"down_{index}", given, (f"skip_{index}",), run, tuple(layers.paths))


def _up_unit(index: int, layers: Layers, before: str) -> Unit:
    given = (before, f"skip_{index}", *_conditions(layers))

    def run(unet: Network, hidden: Tensor, skip: Tensor, *conditions: Tensor) -> tuple[Tensor, ...]:
        return (_run(unet, layers, torch.cat([hidden, skip], dim=1), *conditions),)

    return Unit(f"up_{index}", given, (f"up_{index}",), run, tuple(layers.paths))


def _conditions(layers: Layers) -> tuple[str, ...]:
    """What the modules of a unit take beside features."""
    return (*("emb",)[: layers.resnet is not None], *_TEXT[: layers.attention is not None])


def _time(unet: Network, timestep: Tensor, *added: Tensor) -> tuple[Tensor, ...]:
    emb = unet.time_embedding(unet.time_proj(timestep).to(unet.dtype))
    named = dict(zip(_ADDED[unet.config.addition_embed_type], added, strict=True))
    text = named.pop("encoder_hidden_states", None)
    extra = unet.get_aug_embed(emb=emb, encoder_hidden_states=text, added_cond_kwargs=named)
    return (emb if extra is None else emb + extra,)


def _mid_unit(unet: Network, before: str) -> Unit:
    """The middle block; where there is none, what it would be given."""
    if unet.mid_block is None:
        return Unit("mid", (before,), ("mid",), lambda _, hidden: (hidden.clone(),))
    return Unit("mid", (before, "emb", *_TEXT), ("mid",), _mid, ("mid_block",))


def _mid(unet: Network, hidden: Tensor, emb: Tensor, text: Tensor) -> tuple[Tensor, ...]:
    return (unet.mid_block(hidden, emb, encoder_hidden_states=text),)


def _head(unet: Network, hidden: Tensor) -> tuple[Tensor, ...]:
    return (unet.conv_out(unet.conv_act(unet.conv_norm_out(hidden))),)
