"""Group normalisation followed by SiLU, in the network's type or rounded to 8 bits for the convolution that reads it.

GroupNorm (Wu and He 2018, arXiv 1803.08494) takes mean and variance over the channels of a group and all pixels. One
kernel finds them for each channel in chunks of pixels, so that few groups still fill a GPU, a second one joins the
chunks and channels of a group (Chan et al. 1983, "Algorithms for computing the sample variance"), and a third one
applies them as a factor and an offset of each channel. Within a chunk, sums and sums of squares are of differences from
its first pixel, so that a mean far from 0 takes no digits away. Channels may come first or last in memory: both are
tiles of pixels and channels, with other strides.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from kernels.capability import INTERPRETER
from kernels.dispatch import Mode, choose
from kernels.language import ceiling, jit, tl
from kernels.launch import Argument, Configuration, Launch, configuration_for
from kernels.machine_code import Case
from kernels.quantize import DTYPES, LIMITS, MOST_CHANNELS, NEEDS, Kind, codes, codes_reference

CONFIGURATIONS = {
    "default": Configuration(
        warps=4, blocks={"STATISTICS": 2048, "APPLY": 4096, "WIDTH": 128, "PROGRAMS": 1056, "JOIN": 2048}
    ),
    "sm_90": Configuration(
        warps=4, blocks={"STATISTICS": 4096, "APPLY": 8192, "WIDTH": 128, "PROGRAMS": 528, "JOIN": 2048}
    ),
    INTERPRETER: Configuration(warps=4, blocks={"STATISTICS": 16, "APPLY": 32, "WIDTH": 8, "PROGRAMS": 48, "JOIN": 8}),
}
"""Elements of a tile of each kernel, channels of a tile where they lie last, and programs that fill a GPU once."""

_LEAST_WIDTH = 32
"""Channels of a tile with channels last, as far as it is ours to choose: fewer make too short a run of memory."""


class GroupNorm(NamedTuple):
    """The parameters of the normalisation.

    Attributes:
        weight, bias: (channels,).
        groups: which divide the channels.
        eps: added to the variance.
    """

    weight: torch.Tensor
    bias: torch.Tensor
    groups: int
    eps: float = 1e-5


def group_norm_silu(x: torch.Tensor, norm: GroupNorm, *, mode: Mode | None = None) -> torch.Tensor:
    """Normalise and activate.

    Args:
        x: (samples, channels, height, width), its channels first or last in memory.
        norm: its parameters.
        mode: see `kernels.dispatch.choose`.

    Returns:
        As x.
    """
    architecture = _architecture(x, None, mode)
    if architecture is None:
        return group_norm_silu_reference(x, norm).to(x.dtype)
    out = torch.empty_like(x)
    for launch in _launches(x, norm, out, None, None, architecture):
        launch.run()
    return out


def group_norm_silu_quantized(
    x: torch.Tensor, norm: GroupNorm, scale: torch.Tensor, kind: Kind, *, mode: Mode | None = None
) -> torch.Tensor:
    """The same, as codes (samples, channels, height, width) by a scale that calibration found, float32 (1,)."""
    architecture = _architecture(x, kind, mode)
    if architecture is None:
        return codes_reference(group_norm_silu_reference(x, norm), scale, kind)
    out = torch.empty_like(x, dtype=DTYPES[kind])
    for launch in _launches(x, norm, out, scale, kind, architecture):
        launch.run()
    return out


def group_norm_silu_reference(x: torch.Tensor, norm: GroupNorm) -> torch.Tensor:
    """The definition, in float32."""
    normalised = torch.nn.functional.group_norm(
        x.float(), norm.groups, norm.weight.float(), norm.bias.float(), norm.eps
    )
    return torch.nn.functional.silu(normalised)


def _architecture(x: torch.Tensor, kind: Kind | None, mode: Mode | None) -> str | None:
    unfit = None
    if not x.is_contiguous() and not _channels_last(x):
        unfit = "the input is contiguous neither with its channels first nor with them last"
    elif x.shape[1] > MOST_CHANNELS:
        unfit = f"{x.shape[1]} channels are more than {MOST_CHANNELS}"
    choice = choose("group_norm_silu", x.device, x.dtype, x.shape, needs=NEEDS[kind], unfit=unfit, mode=mode)
    return choice.architecture if choice.implementation == "triton" else None


def _channels_last(x: torch.Tensor) -> bool:
    return not x.is_contiguous() and x.is_contiguous(memory_format=torch.channels_last)


@jit
def _statistics(
    x: tl.tensor,
    partial: tl.tensor,
    pixels: tl.tensor,
    channels: tl.tensor,
    pixel_stride: tl.tensor,
    channel_stride: tl.tensor,
    blocks: tl.tensor,
    chunks: tl.tensor,
    chunk: tl.tensor,
    HEIGHT: tl.constexpr,
    WIDTH: tl.constexpr,
) -> None:
    """Mean and sum of squared deviations of WIDTH channels, each over one chunk of pixels.

    Every place of the tile sums differences from the chunk's first pixel on its own; the places are added once.
    """
    block, part = tl.program_id(0) % blocks, tl.program_id(0) // blocks
    column, row = tl.arange(0, WIDTH), tl.arange(0, HEIGHT)
    there = block * WIDTH + column < channels
    left = pixels - part * chunk
    corner = x + tl.program_id(1).to(tl.int64) * pixels * channels + (block * WIDTH).to(tl.int64) * channel_stride
    corner += (part * chunk).to(tl.int64) * pixel_stride
    shift = tl.load(corner + column * channel_stride, mask=there, other=0.0).to(tl.float32)
    sums = tl.zeros([HEIGHT, WIDTH], tl.float32)
    squares = tl.zeros([HEIGHT, WIDTH], tl.float32)
    for first in tl.range(0, tl.minimum(left, chunk), HEIGHT, num_stages=3):
        at = first + row
        inside = (at < left)[:, None] & there[None, :]
        place = corner + at[:, None] * pixel_stride + column[None, :] * channel_stride
        values = tl.load(place, mask=inside, other=0.0).to(tl.float32)
        apart = tl.where(inside, values - shift[None, :], 0.0)
        sums += apart
        squares += apart * apart
    count = tl.minimum(left, chunk).to(tl.float32)
    mean = tl.sum(sums, 0) / count
    deviation = tl.sum(squares, 0) - mean * mean * count
    to = partial + (tl.program_id(1) * chunks + part) * 2 * channels + block * WIDTH + column
    tl.store(to, mean + shift, mask=there)
    tl.store(to + channels, deviation, mask=there)


@jit
def _join(
    partial: tl.tensor,
    weight: tl.tensor,
    bias: tl.tensor,
    joined: tl.tensor,
    pixels: tl.tensor,
    chunks: tl.tensor,
    chunk: tl.tensor,
    groups: tl.tensor,
    width: tl.tensor,
    eps: tl.tensor,
    PARTS: tl.constexpr,
    WIDTH: tl.constexpr,
) -> None:
    """Factor and offset of each channel of one group, from the chunks of its `width` channels."""
    sample, group = tl.program_id(0) // groups, tl.program_id(0) % groups
    channels = groups * width
    column = tl.arange(0, WIDTH)
    own = group * width + column
    there = column < width
    seen = tl.zeros([PARTS, WIDTH], tl.float32)
    means = tl.zeros([PARTS, WIDTH], tl.float32)
    deviations = tl.zeros([PARTS, WIDTH], tl.float32)
    for first in range(0, chunks, PARTS):
        part = first + tl.arange(0, PARTS)
        inside = (part < chunks)[:, None] & there[None, :]
        entry = partial + (sample * chunks + part)[:, None] * 2 * channels + own[None, :]
        count = tl.where(inside, tl.minimum(pixels - part * chunk, chunk).to(tl.float32)[:, None], 0.0)
        apart = tl.load(entry, mask=inside, other=0.0) - means
        share = count / tl.maximum(seen + count, 1.0)
        means += apart * share
        deviations += tl.load(entry + channels, mask=inside, other=0.0) + apart * apart * seen * share
        seen += count
    total = tl.sum(seen)
    mean = tl.sum(seen * means) / total
    variance = tl.sum(deviations + seen * (means - mean) * (means - mean)) / total
    factor = tl.load(weight + own, mask=there, other=0.0).to(tl.float32) / tl.sqrt(variance + eps)
    offset = tl.load(bias + own, mask=there, other=0.0).to(tl.float32) - mean * factor
    to = joined + sample * 2 * channels + own
    tl.store(to, factor, mask=there)
    tl.store(to + channels, offset, mask=there)


@jit
def _apply(
    x: tl.tensor,
    joined: tl.tensor,
    out: tl.tensor,
    out_scale: tl.tensor,
    pixels: tl.tensor,
    channels: tl.tensor,
    pixel_stride: tl.tensor,
    channel_stride: tl.tensor,
    blocks: tl.tensor,
    LIMIT: tl.constexpr,
    HEIGHT: tl.constexpr,
    WIDTH: tl.constexpr,
) -> None:
    block, part = tl.program_id(0) % blocks, tl.program_id(0) // blocks
    column, row = tl.arange(0, WIDTH), tl.arange(0, HEIGHT)
    there = block * WIDTH + column < channels
    corner = tl.program_id(1).to(tl.int64) * pixels * channels + (block * WIDTH).to(tl.int64) * channel_stride
    corner += (part * HEIGHT).to(tl.int64) * pixel_stride
    place = row[:, None] * pixel_stride + column[None, :] * channel_stride
    inside = (part * HEIGHT + row < pixels)[:, None] & there[None, :]
    values = tl.load(x + corner + place, mask=inside, other=0.0).to(tl.float32)
    pair = joined + tl.program_id(1) * 2 * channels + block * WIDTH + column
    factor = tl.load(pair, mask=there, other=0.0)
    offset = tl.load(pair + channels, mask=there, other=0.0)
    values = values * factor[None, :] + offset[None, :]
    root = tl.rsqrt(1.0 + tl.exp2(values * -1.4426950408889634))
    values = values * root * root
    if LIMIT > 0.0:
        values *= 1.0 / tl.load(out_scale)
        if out.dtype.element_ty == tl.int8:
            values = tl.minimum(tl.maximum(values, -LIMIT), LIMIT)
        made = codes(values, 1.0, out.dtype.element_ty)
    else:
        made = values.to(out.dtype.element_ty)
    tl.store(out + corner + place, made, mask=inside)


def _launches(
    x: torch.Tensor,
    norm: GroupNorm,
    out: torch.Tensor,
    out_scale: torch.Tensor | None,
    kind: Kind | None,
    architecture: str,
) -> tuple[Launch, Launch, Launch]:
    configuration = configuration_for(CONFIGURATIONS, architecture)
    blocks, warps = configuration.blocks, configuration.warps
    samples, channels = x.shape[:2]
    pixels, of_group, last = x[0, 0].numel(), channels // norm.groups, _channels_last(x)
    height, width = _tile(blocks["STATISTICS"], blocks["WIDTH"], pixels, channels, last)
    across = ceiling(channels, width)
    chunk = height * ceiling(pixels, height * max(1, blocks["PROGRAMS"] // (samples * across)))
    chunks = ceiling(pixels, chunk)
    partial = torch.empty(samples, chunks, 2, channels, dtype=torch.float32, device=x.device)
    joined = torch.empty(samples, 2, channels, dtype=torch.float32, device=x.device)
    shared: dict[str, Argument] = {
        "x": x,
        "pixels": pixels,
        "channels": channels,
        "pixel_stride": channels if last else 1,
        "channel_stride": 1 if last else pixels,
    }
    chunked: dict[str, Argument] = {"partial": partial, "chunks": chunks, "chunk": chunk}
    statistics = Launch(
        _statistics,
        (across * chunks, samples),
        {**shared, **chunked, "blocks": across},
        Configuration(warps, blocks={"HEIGHT": height, "WIDTH": width}),
    )
    of_join: dict[str, Argument] = {
        **chunked,
        "weight": norm.weight,
        "bias": norm.bias,
        "joined": joined,
        "pixels": pixels,
        "groups": norm.groups,
        "width": of_group,
        "eps": norm.eps,
    }
    lanes = _power_of_two(of_group)
    tile = {"PARTS": max(1, blocks["JOIN"] // lanes), "WIDTH": lanes}
    join = Launch(_join, (samples * norm.groups,), of_join, Configuration(warps=8, blocks=tile))
    height, width = _tile(blocks["APPLY"], blocks["WIDTH"], pixels, channels, last)
    across = ceiling(channels, width)
    of_apply: dict[str, Argument] = {
        **shared,
        "joined": joined,
        "out": out,
        "out_scale": out_scale,
        "blocks": across,
        "LIMIT": 0.0 if kind is None else LIMITS[kind],
    }
    apply = Launch(
        _apply,
        (across * ceiling(pixels, height), samples),
        of_apply,
        Configuration(warps, blocks={"HEIGHT": height, "WIDTH": width}),
    )
    return statistics, join, apply


def _tile(elements: int, most: int, pixels: int, channels: int, last: bool) -> tuple[int, int]:
    """Pixels and channels of a tile, powers of two.

    With channels last their number divides the channels where it can, so that no lane is idle; with channels first a
    tile has more than one channel where the pixels of one do not fill it.

    Args:
        elements: the most that a tile may have.
        most: channels that it may have where they lie last.
        pixels: of a sample.
        channels: likewise.
        last: whether the channels lie last in memory.
    """
    if not last:
        height = min(elements, _power_of_two(pixels))
        return height, min(elements // height, _power_of_two(channels))
    dividing = channels & -channels
    width = min(most, dividing if dividing >= _LEAST_WIDTH else _power_of_two(channels))
    return min(elements // width, _power_of_two(pixels)), width


def _power_of_two(number: int) -> int:
    """The smallest power of two that is not below a number."""
    return 1 << (number - 1).bit_length()


def _case(architecture: str, launch: int, last: bool = False, kind: Kind | None = None) -> Launch:
    layout = torch.channels_last if last else torch.contiguous_format
    x = torch.empty(2, 320, 128, 128, dtype=torch.float16, device="meta", memory_format=layout)
    weight, bias = torch.empty(2, 320, dtype=torch.float16, device="meta")
    out = torch.empty_like(x, dtype=x.dtype if kind is None else DTYPES[kind])
    scale = None if kind is None else torch.empty(1, device="meta")
    return _launches(x, GroupNorm(weight, bias, 32), out, scale, kind, architecture)[launch]


CASES = {
    "group-norm-statistics-first": Case(lambda architecture: _case(architecture, 0)),
    "group-norm-statistics-last": Case(lambda architecture: _case(architecture, 0, last=True)),
    "group-norm-join-last": Case(lambda architecture: _case(architecture, 1, last=True), wide=False),
    "group-norm-silu-first": Case(lambda architecture: _case(architecture, 2)),
    "group-norm-silu-last": Case(lambda architecture: _case(architecture, 2, last=True)),
    "group-norm-silu-last-int8": Case(lambda architecture: _case(architecture, 2, True, "int8")),
    "group-norm-silu-last-fp8": Case(lambda architecture: _case(architecture, 2, True, "fp8"), needs=("fp8",)),
}
