"""Axes of depth: blocks whose output is their input plus something, so that a network runs on without them."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from diffusers import AutoencoderKL, UNet2DConditionModel
from torch import nn

from compress.pruning.axis import DepthAxis, Network

_STACKS = ("transformer_blocks", "single_transformer_blocks")
_FIRST = ("DiTTransformer2DModel",)  # the head embeds timestep and class with the embedder of the first block
_LAST = ("SD3Transformer2DModel",)  # the last block gives no text tokens, and is built otherwise


def depth_axes(network: Network) -> list[DepthAxis]:
    """Every axis of depth, outer ones first."""
    if isinstance(network, UNet2DConditionModel):
        return [*_levels(network), *_middle(network), *_inner_stacks(network)]
    if isinstance(network, AutoencoderKL):
        return list(_decoder(network))
    return list(_stacks(network))


def _stacks(network: Network) -> Iterator[DepthAxis]:
    """The equal blocks of a transformer."""
    for name in _STACKS:
        blocks = getattr(network, name, None)
        if blocks is None:
            continue
        kind, count = type(network).__name__, len(blocks)
        fixed = frozenset([*[0] * (kind in _FIRST), *[count - 1] * (kind in _LAST)])
        yield _axis(name, [(f"{name}.{i}",) for i in range(count)], fixed)


def _levels(unet: Any) -> Iterator[DepthAxis]:
    """Pairs of a resnet (with its attention) on the way down and one on the way up, and the skip between them.

    Without resnet j its skip equals the one before, so the resnet on the way up that used that one goes too. BK-SDM
    (Kim et al. 2023, arXiv 2305.15798) removes the last pair so defined.
    """
    for b, block in enumerate(unet.down_blocks):
        count, up = len(block.resnets), len(unet.up_blocks) - 1 - b
        down_paths, up_paths = f"down_blocks.{b}", f"up_blocks.{up}"
        if len(unet.up_blocks[up].resnets) != count + 1:
            continue
        units = [()] + [(*_pair(unet, down_paths, j), *_pair(unet, up_paths, count - j)) for j in range(1, count)]
        yield _axis(down_paths, units, frozenset({0}))


def _pair(network: Network, block: str, index: int) -> tuple[str, ...]:
    attentions = getattr(network.get_submodule(block), "attentions", None)
    resnet, attention = f"{block}.resnets.{index}", f"{block}.attentions.{index}"
    return (resnet,) if attentions is None else (resnet, attention)


def _middle(unet: Any) -> Iterator[DepthAxis]:
    """The whole middle block, and its pairs of attention and resnet."""
    if unet.mid_block is not None:
        yield DepthAxis("depth", "mid_block", 1, least=0, units=(("mid_block",),))
        yield _after_first("mid_block", unet.mid_block)


def _after_first(path: str, block: Any) -> DepthAxis:
    pairs = [(f"{path}.attentions.{i}", f"{path}.resnets.{i + 1}") for i in range(len(block.attentions))]
    return _axis(f"{path}.resnets", [(), *pairs], frozenset({0}))


def _inner_stacks(unet: Any) -> Iterator[DepthAxis]:
    """The transformer blocks of each attention."""
    for path, module in unet.named_modules():
        if isinstance(module, nn.ModuleList) and path.endswith(".transformer_blocks"):
            yield _axis(path, [(f"{path}.{i}",) for i in range(len(module))], frozenset())


def _decoder(vae: Any) -> Iterator[DepthAxis]:
    """Resnets of the decoder that keep the number of channels; the encoder stays."""
    if all(attention is not None for attention in vae.decoder.mid_block.attentions):
        yield _after_first("decoder.mid_block", vae.decoder.mid_block)
    for b, block in enumerate(vae.decoder.up_blocks):
        path = f"decoder.up_blocks.{b}.resnets"
        fixed = frozenset(i for i, resnet in enumerate(block.resnets) if resnet.conv_shortcut is not None)
        yield _axis(path, [(f"{path}.{i}",) for i in range(len(block.resnets))], fixed)


def _axis(module: str, units: list[tuple[str, ...]], fixed: frozenset[int]) -> DepthAxis:
    return DepthAxis("depth", module, len(units), fixed=fixed, units=tuple(units))
