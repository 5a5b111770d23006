"""Tensors of heads, (batch, heads, tokens, channels): which ones the attention kernels take, and tiles of them."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from kernels.errors import KernelError
from kernels.language import jit, tl
from kernels.launch import MOST_PROGRAMS, Descriptor

_CHANNELS = range(16, 129, 8)


def check_heads(query: Tensor, key: Tensor, value: Tensor, scale: float | None) -> None:
    """Refuse tensors that are not the query, key and value of one attention.

    Args:
        query: (batch, heads, queries, channels).
        key: (batch, heads, keys, channels).
        value: (batch, heads, keys, channels).
        scale: of the scores, or None.

    Raises:
        KernelError: their shapes, types or devices do not fit each other, or the scale is not above zero.
    """
    shapes = ", ".join(str(tuple(tensor.shape)) for tensor in (query, key, value))
    if query.ndim != 4 or key.shape != value.shape or {*query.shape, *key.shape} & {0}:
        raise KernelError(
            f"attention takes tensors (batch, heads, tokens, channels) with something in them, not {shapes}"
        )
    if query.shape[:2] != key.shape[:2] or query.shape[3] != key.shape[3]:
        raise KernelError(f"query, key and value must agree in batch, heads and channels: {shapes}")
    if len({(tensor.dtype, tensor.device) for tensor in (query, key, value)}) > 1:
        kinds = ", ".join(f"{tensor.dtype} on {tensor.device}" for tensor in (query, key, value))
        raise KernelError(f"query, key and value must be of one type and on one device: {kinds}")
    if scale is not None and not 0.0 < scale < math.inf:
        raise KernelError(f"the scale of the scores must be above zero, not {scale}")


def check_per_key(query: Tensor, keys: int, **numbers: Tensor | None) -> None:
    """Refuse what is not one number a key, (batch, keys), on the device of the query; None is left out.

    Raises:
        KernelError: a shape or a device is another.
    """
    for name, given in numbers.items():
        if given is not None and (given.shape != (query.shape[0], keys) or given.device != query.device):
            there = f"{tuple(given.shape)} on {given.device}"
            raise KernelError(f"{name} must be {(query.shape[0], keys)} on {query.device}, not {there}")


def unfit(query: Tensor) -> str | None:
    """Why the kernels do not take a query (batch, heads, tokens, channels) and what belongs to it; None where they do.

    Channels are padded to the next power of two inside the kernel: 40 cost what 64 do, 80 what 128 do. 160 would
    cost what 256 do, and an accumulator that wide does not fit the registers.
    """
    batch, heads, _, channels = query.shape
    if query.dtype not in (torch.float16, torch.bfloat16):
        return f"it takes float16 and bfloat16, not {query.dtype}"
    if channels not in _CHANNELS:
        return f"it takes heads of {_CHANNELS[0]} to {_CHANNELS[-1]} channels, a multiple of 8, not {channels}"
    if batch * heads > MOST_PROGRAMS:
        return f"it takes batch x heads up to {MOST_PROGRAMS}, not {batch * heads}"
    return None


def score_count(query: Tensor, key: Tensor) -> int:
    """How many scores attention takes: batch x heads x queries x keys."""
    batch, heads, queries, _ = query.shape
    return batch * heads * queries * key.shape[2]


def power_of_2(count: int) -> int:
    """The side of a tile that holds so many: a power of two, at least 16, which is what tensor cores multiply."""
    return max(16, 1 << (count - 1).bit_length())


def aligned(tensor: Tensor) -> Tensor:
    """The tensor itself where kernels can read it 16 bytes at a time, else a contiguous copy.

    Strides of (batch, heads, tokens, channels) may be in any order, so that `(batch, tokens, heads x channels)` seen as
    heads is read where it lies.
    """
    *outer, last = tensor.stride()
    fits = last == 1 and all(stride > 0 and stride % 8 == 0 for stride in outer) and tensor.data_ptr() % 16 == 0
    return tensor if fits else tensor.clone(memory_format=torch.contiguous_format)


def output_for(query: Tensor) -> Tensor:
    """An empty tensor like the query, (batch, heads, tokens, channels), laid out for the projection that follows.

    What follows attention takes (batch, tokens, heads x channels), which is then a view.
    """
    batch, heads, tokens, channels = query.shape
    return query.new_empty(batch, tokens, heads, channels).transpose(1, 2)


def strides(**tensors: Tensor) -> dict[str, tuple[int, ...]]:
    """Arguments of a kernel: `<name>_strides` of (batch, heads, tokens), in elements."""
    return {f"{name}_strides": tensor.stride()[:3] for name, tensor in tensors.items()}


def described(tensors: Mapping[str, Tensor], queries: int, keys: int) -> dict[str, Descriptor]:
    """Describe tensors (batch, heads, tokens, channels) to the hardware that copies tiles.

    Args:
        tensors: by name.
        queries: tokens in a tile of the tensors `query` and `output`.
        keys: tokens in a tile of all others.
    """
    from triton.tools.tensor_descriptor import TensorDescriptor

    return {
        name: TensorDescriptor.from_tensor(
            tensor, [1, 1, queries if name in ("query", "output") else keys, power_of_2(tensor.shape[3])]
        )
        for name, tensor in tensors.items()
    }


COPIES_TILES = ("sm_90", "sm_100", "sm_120")
"""Architectures with a unit that copies whole tiles, which tensor descriptors are for."""


@jit
def load_tile(
    source: tl.tensor,
    strides: tl.tensor,
    batch: tl.tensor,
    head: tl.tensor,
    first: tl.tensor,
    tokens: tl.tensor,
    CHANNELS: tl.constexpr,
    BLOCK_TOKENS: tl.constexpr,
    BLOCK_CHANNELS: tl.constexpr,
    DESCRIPTORS: tl.constexpr,
) -> tl.tensor:
    """Read tokens `first` and following of one head, (BLOCK_TOKENS, BLOCK_CHANNELS); outside the tensor stand zeros.

    With DESCRIPTORS, `source` is a tensor descriptor (see `described`), which knows strides and shape by itself.
    """
    if DESCRIPTORS:
        tile = source.load([batch, head, first, 0]).reshape(BLOCK_TOKENS, BLOCK_CHANNELS)
    else:
        start, offsets, inside = elements(strides, batch, head, first, tokens, CHANNELS, BLOCK_TOKENS, BLOCK_CHANNELS)
        tile = tl.load(source + start + offsets, mask=inside, other=0.0)
    return tile


@jit
def store_tile(
    target: tl.tensor,
    strides: tl.tensor,
    tile: tl.tensor,
    batch: tl.tensor,
    head: tl.tensor,
    first: tl.tensor,
    tokens: tl.tensor,
    CHANNELS: tl.constexpr,
    BLOCK_TOKENS: tl.constexpr,
    BLOCK_CHANNELS: tl.constexpr,
    DESCRIPTORS: tl.constexpr,
) -> None:
    """Write a tile from token `first` of one head on, cast to the target's type; nothing is written outside of it."""
    if DESCRIPTORS:
        target.store([batch, head, first, 0], tile.to(target.dtype).reshape(1, 1, BLOCK_TOKENS, BLOCK_CHANNELS))
    else:
        start, offsets, inside = elements(strides, batch, head, first, tokens, CHANNELS, BLOCK_TOKENS, BLOCK_CHANNELS)
        tl.store(target + start + offsets, tile.to(target.dtype.element_ty), mask=inside)


@jit
def elements(
    strides: tl.tensor,
    batch: tl.tensor,
    head: tl.tensor,
    first: tl.tensor,
    tokens: tl.tensor,
    CHANNELS: tl.constexpr,
    BLOCK_TOKENS: tl.constexpr,
    BLOCK_CHANNELS: tl.constexpr,
) -> tuple[tl.tensor, tl.tensor, tl.tensor]:
    """Where a tile starts, where its elements lie from there, and which of them are inside the tensor.

    All strides are multiples of 8 elements, see `aligned`; only if the compiler is told so does it read 16 bytes at a
    time where they are no multiples of 16, as with 40 channels.
    """
    row, column = tl.arange(0, BLOCK_TOKENS), tl.arange(0, BLOCK_CHANNELS)
    start = tl.multiple_of(batch * tl.cast(strides[0], tl.int64), 8)
    start += tl.multiple_of(head * tl.cast(strides[1], tl.int64), 8)
    start += tl.multiple_of(first * tl.cast(strides[2], tl.int64), 8)
    offsets = tl.multiple_of(row[:, None] * strides[2], [8, 8]) + column[None, :]
    return start, offsets, (first + row[:, None] < tokens) & (column[None, :] < CHANNELS)
