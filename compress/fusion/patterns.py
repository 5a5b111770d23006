"""PATTERNS: which modules of diffusers have a fused form, which of them do not fit it, and why some have none."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from diffusers import DiTTransformer2DModel, PixArtTransformer2DModel, UNet2DConditionModel
from diffusers.models.activations import GEGLU, GELU
from diffusers.models.attention import BasicTransformerBlock, JointTransformerBlock
from diffusers.models.attention_processor import Attention, AttnProcessor2_0, JointAttnProcessor2_0
from diffusers.models.normalization import (
    AdaLayerNormContinuous,
    AdaLayerNormZero,
    AdaLayerNormZeroSingle,
    RMSNorm,
    SD35AdaLayerNormZeroX,
)
from diffusers.models.resnet import ResnetBlock2D
from diffusers.models.transformers.transformer_flux import (
    FluxAttention,
    FluxAttnProcessor,
    FluxSingleTransformerBlock,
    FluxTransformerBlock,
)
from torch import nn

from compress.fusion import blocks, layers

Module = Any
"""A module of diffusers, whose attributes the type checker does not know."""

_ATTENTION = "attention"
_MODULATED = "modulated norm"
_BLOCK = "modulated norms and gated residuals"


@dataclass(frozen=True, eq=False)
class Pattern:
    """One kind of module.

    Attributes:
        name: what is fused in it.
        of: its class, which must be this very one.
        forms: path in the module (empty: itself) -> the class it computes as; none where nothing is gained.
        unfit: why a module keeps its own computation; None where it is fused.
        where: whether a module of the class is meant at all.
    """

    name: str
    of: type[nn.Module]
    forms: Mapping[str, type[nn.Module]]
    unfit: Callable[[Module], str | None] = field(default=lambda _: None)
    where: Callable[[Module], bool] = field(default=lambda _: True)


def pattern_of(module: nn.Module) -> Pattern | None:
    """The pattern of a module; None where there is nothing to fuse."""
    found = [pattern for pattern in PATTERNS if type(module) is pattern.of and pattern.where(module)]
    return found[0] if found else None


def _resnet(module: Module) -> str | None:
    if module.upsample is not None or module.downsample is not None:
        return "it resamples between its norm and its convolution"
    if module.time_embedding_norm != "default":
        return f"its second norm is modulated ({module.time_embedding_norm})"
    return _silu(module.nonlinearity)


def _silu(activation: nn.Module) -> str | None:
    return None if isinstance(activation, nn.SiLU) else f"its activation is {type(activation).__name__}, not SiLU"


def _head(module: Module) -> str | None:
    if not isinstance(module.conv_norm_out, nn.GroupNorm):
        return "it has no norm at its end"
    return _silu(module.conv_act)


def _attends(module: Module) -> str | None:
    processor = type(module.processor)
    if processor not in (AttnProcessor2_0, JointAttnProcessor2_0, FluxAttnProcessor):
        return f"its processor is {processor.__name__}, which may attend in another way"
    return None


def _rms(module: Module) -> str | None:
    if module.weight is None or module.bias is not None:
        return "it has no weight, or a bias"
    return None


def _plain(*norms: str) -> Callable[[Module], str | None]:
    """Whether these norms of a module are layer norms without parameters of their own."""

    def unfit(module: Module) -> str | None:
        for name in norms:
            norm = getattr(module, name)
            if not isinstance(norm, nn.LayerNorm | None):
                return f"{name} is {type(norm).__name__}, not a layer norm"
            if norm is not None and norm.weight is not None:
                return f"{name} has a weight of its own beside the modulation"
        return None

    return unfit


def _chunked(unfit: Callable[[Module], str | None]) -> Callable[[Module], str | None]:
    """Refuse blocks that were told to compute their feed-forward layer in chunks."""

    def chunked(module: Module) -> str | None:
        if getattr(module, "_chunk_size", None) is not None:
            return "its feed-forward layer is computed in chunks"
        return unfit(module)

    return chunked


def _always(reason: str) -> Callable[[Module], str | None]:
    return lambda _: reason


_INLINE = "its last norm is modulated in the forward of the whole network, once a call"

PATTERNS = (
    Pattern(
        "group norm and SiLU",
        ResnetBlock2D,
        {"": layers.FusedResnet, "norm1": layers.NormAndSiLU, "norm2": layers.NormAndSiLU},
        _resnet,
    ),
    Pattern(
        "group norm and SiLU",
        UNet2DConditionModel,
        {"conv_norm_out": layers.NormAndSiLU, "conv_act": nn.Identity},
        _head,
    ),
    Pattern("GEGLU", GEGLU, {"": layers.FusedGEGLU}),
    Pattern("GELU", GELU, {}, _always("GELU alone is one launch in torch, too")),
    Pattern("RMS norm", RMSNorm, {"": layers.FusedRMSNorm}, _rms),
    Pattern(_ATTENTION, Attention, {"": layers.FusedAttention}, _attends),
    Pattern(_ATTENTION, FluxAttention, {"": layers.FusedFluxAttention}, _attends),
    Pattern(_MODULATED, AdaLayerNormZero, {"": layers.FusedAdaLayerNormZero}, _plain("norm")),
    Pattern(_MODULATED, AdaLayerNormZeroSingle, {"": layers.FusedAdaLayerNormZeroSingle}, _plain("norm")),
    Pattern(_MODULATED, SD35AdaLayerNormZeroX, {"": layers.FusedAdaLayerNormZeroX}, _plain("norm")),
    Pattern(_MODULATED, AdaLayerNormContinuous, {"": layers.FusedAdaLayerNormContinuous}, _plain("norm")),
    Pattern(
        _BLOCK,
        BasicTransformerBlock,
        {"": blocks.FusedDiTBlock},
        _chunked(_plain("norm3")),
        lambda block: block.norm_type == "ada_norm_zero" and block.attn2 is None,
    ),
    Pattern(
        _BLOCK,
        BasicTransformerBlock,
        {"": blocks.FusedPixArtBlock},
        _chunked(_plain("norm1", "norm2")),
        lambda block: block.norm_type == "ada_norm_single",
    ),
    Pattern(_BLOCK, JointTransformerBlock, {"": blocks.FusedJointBlock}, _chunked(_plain("norm2", "norm2_context"))),
    Pattern(_BLOCK, FluxTransformerBlock, {"": blocks.FusedFluxBlock}, _plain("norm2", "norm2_context")),
    Pattern("gated residual", FluxSingleTransformerBlock, {"": blocks.FusedFluxSingleBlock}),
    Pattern(_MODULATED, DiTTransformer2DModel, {}, _always(_INLINE)),
    Pattern(_MODULATED, PixArtTransformer2DModel, {}, _always(_INLINE)),
)
"""In no order: a module fits one at most."""
