"""Axes inside blocks: attention heads, hidden channels of MLPs, inner channels of resnets; by the classes of diffusers.

None of them touches the residual stream, so skips, adaptive norms, position buffers and latents stay as they are.
"""

from __future__ import annotations

from typing import Any

from diffusers.models.attention import FeedForward
from diffusers.models.resnet import ResnetBlock2D
from diffusers.models.transformers.transformer_flux import FluxSingleTransformerBlock
from torch import nn

from compress.pruning.axis import Kind, Network, Slice, WidthAxis

_PROJECTIONS = ("to_q", "to_k", "to_v", "add_q_proj", "add_k_proj", "add_v_proj")
_NORMS = ("norm_q", "norm_k", "norm_added_q", "norm_added_k")


def width_axis(network: Network, kind: Kind, path: str) -> WidthAxis | None:
    """The axis of a kind that belongs to a module; None where the module has none."""
    module = network.get_submodule(path)
    if kind == "heads" and hasattr(module, "to_q") and hasattr(module, "heads"):
        return _heads(network, path, module)
    if kind == "ffn" and isinstance(module, FeedForward):
        return _hidden(path, module)
    if kind == "ffn" and isinstance(module, FluxSingleTransformerBlock):
        return _single_hidden(path, module)
    if kind == "resnet" and isinstance(module, ResnetBlock2D):
        return _inner(path, module)
    return None


def _heads(network: Network, path: str, attention: Any) -> WidthAxis | None:
    """Whole heads: each keeps its width, and so the temperature of its softmax.

    The output projection of a Flux single block is its parent's, and begins with the heads.
    """
    heads, inner = int(attention.heads), attention.to_q.out_features
    width = inner // heads
    norms = [getattr(attention, name, None) for name in _NORMS]
    across = any(tensor.shape[0] != width for norm in norms if norm is not None for tensor in norm.parameters())
    if attention.to_k.out_features != inner or across:
        return None
    makers = [name for name in _PROJECTIONS if isinstance(getattr(attention, name, None), nn.Linear)]
    slices = [one for name in makers for one in _made(f"{path}.{name}", getattr(attention, name), width)]
    outputs = getattr(attention, "to_out", None)
    if outputs is not None:
        slices.append(Slice(f"{path}.to_out.0.weight", 1, 0, width))
    if getattr(attention, "to_add_out", None) is not None:
        slices.append(Slice(f"{path}.to_add_out.weight", 1, 0, width))
    parent = path.rpartition(".")[0]
    if isinstance(network.get_submodule(parent), FluxSingleTransformerBlock):
        slices.append(Slice(f"{parent}.proj_out.weight", 1, 0, width))
    if not any(one.dim == 1 for one in slices):
        return None
    known = {"heads": 1, "sliceable_head_dim": 1, "inner_dim": width, "inner_kv_dim": width}
    settings = tuple((path, name, amount) for name, amount in known.items() if hasattr(attention, name))
    return WidthAxis("heads", path, heads, slices=tuple(slices), settings=settings)


def _hidden(path: str, mlp: FeedForward) -> WidthAxis | None:
    """Of a gated MLP (GEGLU, SwiGLU) a unit is a value and its gate, which lie half the layer apart."""
    first, last = getattr(mlp.net[0], "proj", None), mlp.net[2]
    if not isinstance(first, nn.Linear) or not isinstance(last, nn.Linear):
        return None
    hidden = last.in_features
    starts = range(0, first.out_features, hidden)
    slices = [one for start in starts for one in _made(f"{path}.net.0.proj", first, 1, start)]
    slices.append(Slice(f"{path}.net.2.weight", 1, 0, 1))
    return WidthAxis("ffn", path, hidden, slices=tuple(slices))


def _single_hidden(path: str, block: FluxSingleTransformerBlock) -> WidthAxis:
    """The MLP of a Flux single block shares its output projection with the attention, whose columns come first."""
    hidden = block.proj_mlp.out_features
    slices = _made(f"{path}.proj_mlp", block.proj_mlp, 1)
    slices.append(Slice(f"{path}.proj_out.weight", 1, block.proj_out.in_features - hidden, 1))
    return WidthAxis("ffn", path, hidden, slices=tuple(slices), settings=((path, "mlp_hidden_dim", 1),))


def _inner(path: str, resnet: ResnetBlock2D) -> WidthAxis:
    """Whole groups of the second norm, so that what is left is normalised as before."""
    groups, channels = resnet.norm2.num_groups, resnet.norm2.num_channels
    width = channels // groups
    slices = _made(f"{path}.conv1", resnet.conv1, width)
    if (time := resnet.time_emb_proj) is not None:
        starts = range(0, time.out_features, channels)
        slices += [one for start in starts for one in _made(f"{path}.time_emb_proj", time, width, start)]
    slices += [Slice(f"{path}.norm2.{name}", 0, 0, width) for name in ("weight", "bias")]
    slices.append(Slice(f"{path}.conv2.weight", 1, 0, width))
    settings = ((f"{path}.norm2", "num_groups", 1),)
    return WidthAxis("resnet", path, groups, slices=tuple(slices), settings=settings)


def _made(path: str, layer: Any, width: int, first: int = 0) -> list[Slice]:
    """What a layer makes of each unit: rows of its weight, and of its bias where it has one."""
    names = ("weight",) if layer.bias is None else ("weight", "bias")
    return [Slice(f"{path}.{name}", 0, first, width) for name in names]
