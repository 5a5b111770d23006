"""Group normalisation followed by SiLU, in the network's type or rounded to 8 bits for the convolution that reads it.

GroupNorm (Wu and He 2018, arXiv 1803.08494) takes mean and variance over the channels of a group and all pixels. One
kernel finds them for chunks of pixels, so that few groups still fill a GPU, a second one joins the chunks of a group
(Chan et al. 1983, "Algorithms for computing the sample variance"; no sum of squares is ever subtracted), and a third
one applies them. Channels may come first or last in memory.
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
    "default": Configuration(warps=8, blocks={"BLOCK": 4096, "CHUNKS": 64}),
    INTERPRETER: Configuration(warps=8, blocks={"BLOCK": 32, "CHUNKS": 4}),
}


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
    length: tl.tensor,
    chunk: tl.tensor,
    lists: tl.tensor,
    CHUNKS: tl.constexpr,
    BLOCK: tl.constexpr,
    WIDTH: tl.constexpr,
) -> None:
    """Mean and sum of squared deviations of one chunk, for each list of numbers in it.

    With channels first, a list is a group, `length` numbers in a row, and a program has one (WIDTH = 1). With channels
    last, a list is a channel, `length` pixels, and a program has all `lists` of a sample side by side.
    """
    HEIGHT: tl.constexpr = BLOCK // WIDTH
    start = tl.program_id(1) * chunk
    stop = tl.minimum(start + chunk, length)
    column = tl.arange(0, WIDTH)
    if WIDTH == 1:
        apart, entry = 1, (tl.program_id(0) // lists * CHUNKS + tl.program_id(1)) * lists + tl.program_id(0) % lists
        base = x + tl.program_id(0).to(tl.int64) * length
    else:
        apart, entry = lists, (tl.program_id(0) * CHUNKS + tl.program_id(1)) * lists
        base = x + tl.program_id(0).to(tl.int64) * length * lists
    there = (column < apart)[None, :]
    seen = 0.0
    mean = tl.zeros([WIDTH], tl.float32)
    deviation = tl.zeros([WIDTH], tl.float32)
    for first in range(start, stop, HEIGHT):
        at = first + tl.arange(0, HEIGHT)
        inside = (at < stop)[:, None] & there
        values = tl.load(base + at[:, None] * apart + column[None, :], mask=inside, other=0.0).to(tl.float32)
        count = tl.minimum(stop - first, HEIGHT).to(tl.float32)
        here = tl.sum(values, 0) / count
        centred = tl.where(inside, values - here[None, :], 0.0)
        share = count / (seen + count)
        deviation += tl.sum(centred * centred, 0) + (here - mean) * (here - mean) * seen * share
        mean += (here - mean) * share
        seen += count
    to = partial + (entry + column) * 2
    tl.store(to, mean, mask=column < apart)
    tl.store(to + 1, deviation, mask=column < apart)


@jit
def _join(
    partial: tl.tensor,
    weight: tl.tensor,
    joined: tl.tensor,
    length: tl.tensor,
    chunk: tl.tensor,
    groups: tl.tensor,
    channels: tl.tensor,
    width: tl.tensor,
    eps: tl.tensor,
    CHUNKS: tl.constexpr,
    WIDTH: tl.constexpr,
    CHANNELS: tl.constexpr,
) -> None:
    """Mean of one group, and what each of its channels is multiplied by, from the lists that make the group up."""
    sample, group = tl.program_id(0) // groups, tl.program_id(0) % groups
    part, column = tl.arange(0, CHUNKS), tl.arange(0, WIDTH)
    count = tl.minimum(tl.maximum(length - part * chunk, 0), chunk).to(tl.float32)[:, None]
    inside = (count > 0.0) & (column < width)[None, :]
    entry = ((sample * CHUNKS + part[:, None]) * groups + group) * width + column[None, :]
    means = tl.load(partial + entry * 2, mask=inside, other=0.0)
    deviations = tl.load(partial + entry * 2 + 1, mask=inside, other=0.0)
    count = tl.where(inside, count, 0.0)
    total = length.to(tl.float32) * width
    mean = tl.sum(count * means) / total
    spread = tl.sqrt(tl.sum(deviations + count * (means - mean) * (means - mean)) / total + eps)
    channel = tl.arange(0, CHANNELS)
    own = group * channels + channel
    factor = tl.load(weight + own, mask=channel < channels, other=0.0).to(tl.float32) / spread
    to = joined + (sample * groups * channels + own) * 2
    tl.store(to, tl.zeros([CHANNELS], tl.float32) + mean, mask=channel < channels)
    tl.store(to + 1, factor, mask=channel < channels)


@jit
def _apply(
    x: tl.tensor,
    joined: tl.tensor,
    bias: tl.tensor,
    out: tl.tensor,
    out_scale: tl.tensor,
    pixels: tl.tensor,
    channels: tl.tensor,
    LAST: tl.constexpr,
    LIMIT: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = at < channels * pixels
    channel = at % channels if LAST else at // pixels
    base = tl.program_id(1).to(tl.int64) * channels * pixels
    values = tl.load(x + base + at, mask=inside, other=0.0).to(tl.float32)
    pair = joined + (tl.program_id(1) * channels + channel) * 2
    mean = tl.load(pair, mask=inside, other=0.0)
    factor = tl.load(pair + 1, mask=inside, other=0.0)
    values = (values - mean) * factor + tl.load(bias + channel, mask=inside, other=0.0).to(tl.float32)
    values *= tl.sigmoid(values)
    if LIMIT > 0.0:
        inverse = 1.0 / tl.load(out_scale)
        limit = LIMIT / inverse
        made = codes(tl.minimum(tl.maximum(values, -limit), limit), inverse, out.dtype.element_ty)
    else:
        made = values.to(out.dtype.element_ty)
    tl.store(out + base + at, made, mask=inside)


def _launches(
    x: torch.Tensor,
    norm: GroupNorm,
    out: torch.Tensor,
    out_scale: torch.Tensor | None,
    kind: Kind | None,
    architecture: str,
) -> tuple[Launch, Launch, Launch]:
    configuration = configuration_for(CONFIGURATIONS, architecture)
    block, chunks, warps = configuration.blocks["BLOCK"], configuration.blocks["CHUNKS"], configuration.warps
    samples, channels = x.shape[:2]
    pixels, of_group, last = x[0, 0].numel(), channels // norm.groups, _channels_last(x)
    lists, width, length = (channels, of_group, pixels) if last else (norm.groups, 1, of_group * pixels)
    across = _power_of_two(channels) if last else 1
    tile = max(block, across)
    chunk = tile // across * ceiling(length, tile // across * chunks)
    partial = torch.empty(samples, chunks, lists, 2, dtype=torch.float32, device=x.device)
    joined = torch.empty(samples, channels, 2, dtype=torch.float32, device=x.device)
    chunked: dict[str, Argument] = {"partial": partial, "length": length, "chunk": chunk}
    statistics: dict[str, Argument] = {"x": x, "lists": lists, **chunked}
    join: dict[str, Argument] = {
        **chunked,
        "weight": norm.weight,
        "joined": joined,
        "groups": norm.groups,
        "channels": of_group,
        "width": width,
        "eps": norm.eps,
    }
    apply: dict[str, Argument] = {
        "x": x,
        "joined": joined,
        "bias": norm.bias,
        "out": out,
        "out_scale": out_scale,
        "pixels": pixels,
        "channels": channels,
        "LAST": last,
        "LIMIT": 0.0 if kind is None else LIMITS[kind],
    }
    of_tile = Configuration(warps, blocks={"CHUNKS": chunks, "BLOCK": tile, "WIDTH": across})
    widths = {"CHUNKS": chunks, "WIDTH": _power_of_two(width), "CHANNELS": _power_of_two(of_group)}
    programs = samples if last else samples * norm.groups
    of_block = Configuration(warps, blocks={"BLOCK": block})
    return (
        Launch(_statistics, (programs, ceiling(length, chunk)), statistics, of_tile),
        Launch(_join, (samples * norm.groups,), join, Configuration(warps=4, blocks=widths)),
        Launch(_apply, (ceiling(channels * pixels, block), samples), apply, of_block),
    )


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
