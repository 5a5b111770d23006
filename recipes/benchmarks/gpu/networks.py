"""An SDXL-type UNet and an MMDiT in plain torch with random weights; what they are computed with can be exchanged."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional

from kernels.group_norm_silu import GroupNorm

_FREQUENCIES = 256


class Operations(Protocol):
    """What a network is computed with."""

    def linear(self, x: Tensor, layer: nn.Linear) -> Tensor:
        """(..., inputs) to (..., outputs)."""

    def attention(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """(batch, heads, tokens, channels)."""

    def norm_silu(self, x: Tensor, norm: nn.GroupNorm) -> Tensor:
        """(samples, channels, height, width)."""

    def modulated(self, x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
        """(batch, tokens, channels), shift and scale (batch, channels)."""

    def gated(self, x: Tensor, gate: Tensor, y: Tensor) -> Tensor:
        """(batch, tokens, channels), gate (batch, channels)."""

    def geglu(self, x: Tensor, layer: nn.Linear) -> Tensor:
        """(..., 2 * channels) through GEGLU and a linear layer."""

    def gelu(self, x: Tensor, layer: nn.Linear) -> Tensor:
        """(..., channels) through GELU by tanh and a linear layer."""


@dataclass(frozen=True)
class Sizes:
    """Of a network; the defaults of `UNET` and `MMDIT` are those of SDXL and of Stable Diffusion 3 medium."""

    latent: tuple[int, int, int]
    width: int
    head: int
    text: tuple[int, int]
    depths: tuple[int, ...]


UNET = Sizes(latent=(4, 128, 128), width=320, head=64, text=(77, 2048), depths=(0, 2, 10))
MMDIT = Sizes(latent=(16, 128, 128), width=1536, head=64, text=(154, 4096), depths=(24,))
TINY_UNET = Sizes(latent=(4, 16, 16), width=32, head=16, text=(7, 24), depths=(0, 1, 1))
TINY_MMDIT = Sizes(latent=(4, 16, 16), width=32, head=16, text=(7, 24), depths=(2,))


def embedded(t: Tensor, width: int = _FREQUENCIES) -> Tensor:
    """Sines and cosines of timesteps (batch,): float32 (batch, width)."""
    rates = torch.exp(-torch.arange(width // 2, device=t.device) * (9.21 / (width // 2)))
    angles = t.float()[:, None] * rates
    return torch.cat([angles.cos(), angles.sin()], dim=-1)


def _heads(x: Tensor, head: int) -> Tensor:
    return x.unflatten(-1, (-1, head)).transpose(1, 2)


def _flat(x: Tensor) -> Tensor:
    return x.transpose(1, 2).flatten(2)


class TimeMlp(nn.Sequential):
    """Timesteps (batch,) to vectors (batch, width)."""

    def __init__(self, width: int) -> None:
        super().__init__(nn.Linear(_FREQUENCIES, width), nn.SiLU(), nn.Linear(width, width))

    def forward(self, t: Tensor) -> Tensor:
        """Embed."""
        return super().forward(embedded(t).to(self[0].weight.dtype))


class Resnet(nn.Module):
    """Two convolutions with group norms, a timestep between them, and a way around."""

    def __init__(self, inputs: int, outputs: int, time: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.GroupNorm(32, inputs), nn.GroupNorm(32, outputs)
        self.conv1 = nn.Conv2d(inputs, outputs, 3, padding=1)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, padding=1)
        self.time = nn.Linear(time, outputs)
        self.around = nn.Conv2d(inputs, outputs, 1) if inputs != outputs else nn.Identity()

    def forward(self, x: Tensor, time: Tensor, ops: Operations) -> Tensor:
        """(samples, inputs, height, width) to (samples, outputs, height, width)."""
        h = self.conv1(ops.norm_silu(x, self.norm1)) + self.time(functional.silu(time))[:, :, None, None]
        return self.around(x) + self.conv2(ops.norm_silu(h, self.norm2))


class Block(nn.Module):
    """Self-attention, cross-attention and a gated feed-forward layer."""

    def __init__(self, width: int, head: int, text: int) -> None:
        super().__init__()
        self.head = head
        self.norm0, self.norm1, self.norm2 = (nn.LayerNorm(width) for _ in range(3))
        self.qkv, self.out = nn.Linear(width, 3 * width, bias=False), nn.Linear(width, width)
        self.q, self.kv = nn.Linear(width, width, bias=False), nn.Linear(text, 2 * width, bias=False)
        self.out2 = nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 8 * width), nn.Linear(4 * width, width)

    def forward(self, tokens: Tensor, text: Tensor, ops: Operations) -> Tensor:
        """(samples, tokens, width) with text (samples, tokens, channels)."""
        q, k, v = (_heads(part, self.head) for part in ops.linear(self.norm0(tokens), self.qkv).chunk(3, -1))
        tokens = tokens + ops.linear(_flat(ops.attention(q, k, v)), self.out)
        q = _heads(ops.linear(self.norm1(tokens), self.q), self.head)
        k, v = (_heads(part, self.head) for part in ops.linear(text, self.kv).chunk(2, -1))
        tokens = tokens + ops.linear(_flat(ops.attention(q, k, v)), self.out2)
        return tokens + ops.geglu(ops.linear(self.norm2(tokens), self.up), self.down)


class Transformer(nn.Module):
    """Blocks over the pixels of a feature map."""

    def __init__(self, width: int, head: int, text: int, depth: int) -> None:
        super().__init__()
        self.enter, self.leave = nn.Linear(width, width), nn.Linear(width, width)
        self.norm = nn.GroupNorm(32, width)
        self.blocks = nn.ModuleList(Block(width, head, text) for _ in range(depth))

    def forward(self, x: Tensor, text: Tensor, ops: Operations) -> Tensor:
        """(samples, width, height, width) with text (samples, tokens, channels)."""
        height, width = x.shape[2:]
        tokens = ops.linear(self.norm(x).flatten(2).transpose(1, 2).contiguous(), self.enter)
        for block in self.blocks:
            tokens = block(tokens, text, ops)
        out = ops.linear(tokens, self.leave).transpose(1, 2).unflatten(2, (height, width))
        return x + out.contiguous(memory_format=torch.channels_last)


class Stage(nn.Module):
    """A resnet and, where it has depth, a transformer."""

    def __init__(self, inputs: int, outputs: int, sizes: Sizes, depth: int) -> None:
        super().__init__()
        self.resnet = Resnet(inputs, outputs, 4 * sizes.width)
        self.transformer = Transformer(outputs, sizes.head, sizes.text[1], depth) if depth else None

    def forward(self, x: Tensor, time: Tensor, text: Tensor, ops: Operations) -> Tensor:
        """Run."""
        x = self.resnet(x, time, ops)
        return x if self.transformer is None else self.transformer(x, text, ops)


class UNet(nn.Module):
    """SDXL's: widths 320, 640, 1280, two blocks down and three up at each, transformers at the lower two.

    All but the highest level can be left out: what it hands up is then taken from an earlier call (Ma et al. 2023,
    DeepCache, arXiv 2312.00858).
    """

    def __init__(self, sizes: Sizes) -> None:
        super().__init__()
        widths = [sizes.width * 2**level for level in range(len(sizes.depths))]
        self.time = TimeMlp(4 * sizes.width)
        self.enter = nn.Conv2d(sizes.latent[0], widths[0], 3, padding=1)
        self.down, self.shrink, self.up, self.grow = (nn.ModuleList() for _ in range(4))
        left, channels = [widths[0]], widths[0]
        for level, (width, depth) in enumerate(zip(widths, sizes.depths, strict=True)):
            for _ in range(2):
                self.down.append(Stage(channels, width, sizes, depth))
                channels = width
                left.append(channels)
            if level + 1 < len(widths):
                self.shrink.append(nn.Conv2d(channels, channels, 3, stride=2, padding=1))
                left.append(channels)
        self.middle = nn.ModuleList(
            [Stage(channels, channels, sizes, sizes.depths[-1]), Stage(channels, channels, sizes, 0)]
        )
        for level, (width, depth) in reversed(list(enumerate(zip(widths, sizes.depths, strict=True)))):
            for _ in range(3):
                self.up.append(Stage(channels + left.pop(), width, sizes, depth))
                channels = width
            if level:
                self.grow.append(nn.Conv2d(channels, channels, 3, padding=1))
        self.norm, self.leave = nn.GroupNorm(32, channels), nn.Conv2d(channels, sizes.latent[0], 3, padding=1)
        self.levels = len(widths)

    def forward(
        self, x: Tensor, t: Tensor, text: Tensor, ops: Operations, deep: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """The noise in latents (samples, channels, height, width), and what the lower levels gave.

        Args:
            x: the latents.
            t: (samples,).
            text: (samples, tokens, channels).
            ops: to compute with.
            deep: what the lower levels gave at an earlier call, in their place.
        """
        time = self.time(t)
        h = self.enter(x)
        left = [h]
        for at in range(2):
            h = self.down[at](h, time, text, ops)
            left.append(h)
        if deep is None:
            deep = self._lower(h, list(left), time, text, ops)
        h = deep
        for at in range(3):
            h = self.up[3 * (self.levels - 1) + at](torch.cat([h, left.pop()], 1), time, text, ops)
        return self.leave(ops.norm_silu(h, self.norm)), deep

    def _lower(self, h: Tensor, left: list[Tensor], time: Tensor, text: Tensor, ops: Operations) -> Tensor:
        highest = len(left)
        for level in range(1, self.levels):
            h = self.shrink[level - 1](h)
            left.append(h)
            for at in range(2):
                h = self.down[2 * level + at](h, time, text, ops)
                left.append(h)
        for stage in self.middle:
            h = stage(h, time, text, ops)
        for level in range(self.levels - 1):
            for at in range(3):
                h = self.up[3 * level + at](torch.cat([h, left.pop()], 1), time, text, ops)
            h = self.grow[level](functional.interpolate(h, scale_factor=2.0))
        if len(left) != highest:
            raise RuntimeError(f"{len(left) - highest} feature maps were left over")
        return h


class Joint(nn.Module):
    """A block of an MMDiT: text and picture attend to each other, each with weights of its own (arXiv 2403.03206)."""

    def __init__(self, width: int, head: int) -> None:
        super().__init__()
        self.head = head
        self.streams = nn.ModuleList(
            nn.ModuleDict(
                {
                    "modulation": nn.Linear(width, 6 * width),
                    "qkv": nn.Linear(width, 3 * width),
                    "out": nn.Linear(width, width),
                    "up": nn.Linear(width, 4 * width),
                    "down": nn.Linear(4 * width, width),
                }
            )
            for _ in range(2)
        )

    def forward(self, x: Tensor, text: Tensor, time: Tensor, ops: Operations) -> tuple[Tensor, Tensor]:
        """Tokens of the picture and of the text, (batch, tokens, width) each."""
        active, both = functional.silu(time), (text, x)
        numbers = [stream.modulation(active).chunk(6, -1) for stream in self.streams]  # type: ignore[operator, union-attr]
        parts: list[Sequence[Tensor]] = []
        for tokens, stream, (shift, scale, *_) in zip(both, self.streams, numbers, strict=True):
            qkv = ops.linear(ops.modulated(tokens, shift, scale), stream.qkv)  # type: ignore[arg-type]
            parts.append([_heads(part, self.head) for part in qkv.chunk(3, -1)])
        seen = _flat(ops.attention(*(torch.cat(pair, 2) for pair in zip(*parts, strict=True))))
        done = []
        for tokens, stream, given, new in zip(
            both, self.streams, numbers, seen.split([text.shape[1], x.shape[1]], 1), strict=True
        ):
            block: Any = stream
            _, _, gate, shift, scale, gate2 = given
            tokens = ops.gated(tokens, gate, ops.linear(new.contiguous(), block.out))
            hidden = ops.linear(ops.modulated(tokens, shift, scale), block.up)
            done.append(ops.gated(tokens, gate2, ops.gelu(hidden, block.down)))
        return done[1], done[0]


class MMDiT(nn.Module):
    """Stable Diffusion 3's: patches of 2 x 2 and text in joint blocks.

    The second half of the blocks can be left out: what it added is then taken from an earlier call.
    """

    def __init__(self, sizes: Sizes) -> None:
        super().__init__()
        channels, height, width = sizes.latent
        self.time = TimeMlp(sizes.width)
        self.patch = nn.Conv2d(channels, sizes.width, 2, stride=2)
        self.position = nn.Parameter(torch.randn(height * width // 4, sizes.width) / 10)
        self.text = nn.Linear(sizes.text[1], sizes.width)
        self.blocks = nn.ModuleList(Joint(sizes.width, sizes.head) for _ in range(sizes.depths[0]))
        self.modulation, self.leave = nn.Linear(sizes.width, 2 * sizes.width), nn.Linear(sizes.width, 4 * channels)

    def forward(
        self, x: Tensor, t: Tensor, text: Tensor, ops: Operations, deep: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Arguments and result of `UNet.forward`; `deep` is what the second half of the blocks added."""
        height, width = (side // 2 for side in x.shape[2:])
        time = self.time(t)
        h = self.patch(x).flatten(2).transpose(1, 2) + self.position
        words = ops.linear(text, self.text)
        half = len(self.blocks) // 2
        for block in self.blocks[:half]:
            h, words = block(h, words, time, ops)
        if deep is None:
            before = h
            for block in self.blocks[half:]:
                h, words = block(h, words, time, ops)
            deep = h - before
        else:
            h = h + deep
        shift, scale = self.modulation(functional.silu(time)).chunk(2, -1)
        out = ops.linear(ops.modulated(h, shift, scale), self.leave)
        out = out.unflatten(1, (height, width)).unflatten(-1, (-1, 2, 2))
        return out.permute(0, 3, 1, 4, 2, 5).flatten(4).flatten(2, 3), deep


class Eager:
    """Plain torch, which `torch.compile` fuses as it can."""

    def linear(self, x: Tensor, layer: nn.Linear) -> Tensor:
        """See `Operations`."""
        return layer(x)

    def attention(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """See `Operations`."""
        return functional.scaled_dot_product_attention(q, k, v)

    def norm_silu(self, x: Tensor, norm: nn.GroupNorm) -> Tensor:
        """See `Operations`."""
        return functional.silu(norm(x))

    def modulated(self, x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
        """See `Operations`."""
        return functional.layer_norm(x, x.shape[-1:], eps=1e-6) * (1 + scale[:, None]) + shift[:, None]

    def gated(self, x: Tensor, gate: Tensor, y: Tensor) -> Tensor:
        """See `Operations`."""
        return x + gate[:, None] * y

    def geglu(self, x: Tensor, layer: nn.Linear) -> Tensor:
        """See `Operations`."""
        value, gate = x.chunk(2, -1)
        return layer(value * functional.gelu(gate))

    def gelu(self, x: Tensor, layer: nn.Linear) -> Tensor:
        """See `Operations`."""
        return layer(functional.gelu(x, approximate="tanh"))


REPEATED = (Resnet, Block, Joint)
"""Modules that occur many times: compiled one by one, those of one shape share what is compiled."""


def parameters_of(norm: nn.GroupNorm) -> GroupNorm:
    """As the kernel takes them."""
    return GroupNorm(norm.weight, norm.bias, norm.num_groups, norm.eps)
