"""Group normalisation followed by SiLU, in the network's type or rounded to 8 bits for the convolution that reads it.

GroupNorm (Wu and He 2018, arXiv 1803.08494) takes mean and variance over the channels of a group and all pixels. One
kernel finds them for chunks of a group, so that few groups still fill a GPU, and a second one joins the chunks (Chan et
al. 1983, "Algorithms for computing the sample variance") and applies them; no sum of squares is ever subtracted.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from kernels.capability import INTERPRETER
from kernels.dispatch import Mode, choose
from kernels.language import ceiling, jit, tl
from kernels.launch import Argument, Configuration, Launch, configuration_for
from kernels.machine_code import Case
from kernels.quantize import DTYPES, LIMITS, NEEDS, Kind, codes, codes_reference

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
        x: (samples, channels, height, width).
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
    unfit = None if x.is_contiguous() else "the input does not lie in memory channel after channel"
    choice = choose("group_norm_silu", x.device, x.dtype, x.shape, needs=NEEDS[kind], unfit=unfit, mode=mode)
    return choice.architecture if choice.implementation == "triton" else None


@jit
def _statistics(
    x: tl.tensor,
    partial: tl.tensor,
    length: tl.tensor,
    chunk: tl.tensor,
    CHUNKS: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    """Mean and sum of squared deviations of one chunk of one group."""
    group = tl.program_id(0).to(tl.int64)
    start = tl.program_id(1) * chunk
    stop = tl.minimum(start + chunk, length)
    seen = 0.0
    mean = 0.0
    deviation = 0.0
    for first in range(start, stop, BLOCK):
        at = first + tl.arange(0, BLOCK)
        inside = at < stop
        values = tl.load(x + group * length + at, mask=inside, other=0.0).to(tl.float32)
        count = tl.minimum(stop - first, BLOCK).to(tl.float32)
        here = tl.sum(values, 0) / count
        centred = tl.where(inside, values - here, 0.0)
        share = count / (seen + count)
        deviation += tl.sum(centred * centred, 0) + (here - mean) * (here - mean) * seen * share
        mean += (here - mean) * share
        seen += count
    entry = partial + (group * CHUNKS + tl.program_id(1)) * 2
    tl.store(entry, mean)
    tl.store(entry + 1, deviation)


@jit
def _normalise(
    x: tl.tensor,
    weight: tl.tensor,
    bias: tl.tensor,
    partial: tl.tensor,
    out: tl.tensor,
    out_scale: tl.tensor,
    length: tl.tensor,
    chunk: tl.tensor,
    pixels: tl.tensor,
    groups: tl.tensor,
    channels: tl.tensor,
    eps: tl.tensor,
    LIMIT: tl.constexpr,
    CHUNKS: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    """One block of one group."""
    group = tl.program_id(0).to(tl.int64)
    part = tl.arange(0, CHUNKS)
    count = tl.minimum(tl.maximum(length - part * chunk, 0), chunk).to(tl.float32)
    entry = partial + (group * CHUNKS + part) * 2
    means = tl.load(entry, mask=count > 0.0, other=0.0)
    deviations = tl.load(entry + 1, mask=count > 0.0, other=0.0)
    mean = tl.sum(count * means, 0) / length
    deviation = tl.sum(deviations + count * (means - mean) * (means - mean), 0)
    spread = tl.sqrt(deviation / length + eps)

    at = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = at < length
    channel = (group % groups) * channels + at // pixels
    values = tl.load(x + group * length + at, mask=inside, other=0.0).to(tl.float32)
    factor = tl.load(weight + channel, mask=inside, other=0.0).to(tl.float32)
    values = (values - mean) / spread * factor + tl.load(bias + channel, mask=inside, other=0.0).to(tl.float32)
    values *= tl.sigmoid(values)
    if LIMIT > 0.0:
        made = codes(values, tl.load(out_scale), LIMIT, out.dtype.element_ty)
    else:
        made = values.to(out.dtype.element_ty)
    tl.store(out + group * length + at, made, mask=inside)


def _launches(
    x: torch.Tensor,
    norm: GroupNorm,
    out: torch.Tensor,
    out_scale: torch.Tensor | None,
    kind: Kind | None,
    architecture: str,
) -> tuple[Launch, Launch]:
    configuration = configuration_for(CONFIGURATIONS, architecture)
    block, chunks = configuration.blocks["BLOCK"], configuration.blocks["CHUNKS"]
    samples, channels = x.shape[:2]
    pixels, per_group = x[0, 0].numel(), channels // norm.groups
    length = per_group * pixels
    chunk = block * ceiling(length, block * chunks)
    groups = samples * norm.groups
    partial = torch.empty(groups, chunks, 2, dtype=torch.float32, device=x.device)
    shared: dict[str, Argument] = {"x": x, "partial": partial, "length": length, "chunk": chunk}
    arguments: dict[str, Argument] = {
        **shared,
        "weight": norm.weight,
        "bias": norm.bias,
        "out": out,
        "out_scale": out_scale,
        "pixels": pixels,
        "groups": norm.groups,
        "channels": per_group,
        "eps": norm.eps,
        "LIMIT": 0.0 if kind is None else LIMITS[kind],
    }
    return (
        Launch(_statistics, (groups, ceiling(length, chunk)), shared, configuration),
        Launch(_normalise, (groups, ceiling(length, block)), arguments, configuration),
    )


def _case(architecture: str, kind: Kind | None = None) -> tuple[Launch, Launch]:
    x = torch.empty(2, 320, 128, 128, dtype=torch.float16, device="meta")
    weight, bias = torch.empty(2, 320, dtype=torch.float16, device="meta")
    out = torch.empty_like(x, dtype=x.dtype if kind is None else DTYPES[kind])
    scale = None if kind is None else torch.empty(1, device="meta")
    return _launches(x, GroupNorm(weight, bias, 32), out, scale, kind, architecture)


CASES = {
    "group-norm-statistics-fp16": Case(lambda architecture: _case(architecture)[0]),
    "group-norm-silu-fp16": Case(lambda architecture: _case(architecture)[1]),
    "group-norm-silu-fp16-int8": Case(lambda architecture: _case(architecture, "int8")[1]),
    "group-norm-silu-fp16-fp8": Case(lambda architecture: _case(architecture, "fp8")[1], needs=("fp8",)),
}
