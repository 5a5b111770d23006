"""Shapes of the layers of known diffusion models, as data."""

from __future__ import annotations

from typing import NamedTuple


class Pixels(NamedTuple):
    """A feature map of a UNet, (samples, channels, height, width)."""

    model: str
    samples: int
    channels: int
    side: int


class Tokens(NamedTuple):
    """Tokens of a transformer, (batch, tokens, channels), in heads of `head` channels."""

    model: str
    batch: int
    tokens: int
    channels: int
    head: int


class Latent(NamedTuple):
    """What a sampler updates, (samples, channels, ...)."""

    model: str
    shape: tuple[int, ...]


MAPS = (
    Pixels("SD1.5 512", 2, 320, 64),
    Pixels("SDXL 1024", 2, 320, 128),
    Pixels("SDXL 1024", 2, 1280, 32),
    Pixels("SDXL VAE 1024", 1, 128, 1024),
)
SEQUENCES = (
    Tokens("SD1.5 512", 2, 4096, 320, 40),
    Tokens("SDXL 1024", 2, 4096, 640, 64),
    Tokens("SDXL 1024", 2, 1024, 1280, 64),
    Tokens("SD3 1024", 2, 4096 + 154, 1536, 64),
    Tokens("Flux 1024", 1, 4096 + 512, 3072, 128),
    Tokens("video 49 x 480 x 720", 1, 17550, 3072, 128),
)
LATENTS = (
    Latent("SD1.5 512", (1, 4, 64, 64)),
    Latent("SDXL 1024", (1, 4, 128, 128)),
    Latent("SD3 1024", (1, 16, 128, 128)),
    Latent("video 49 x 480 x 720", (1, 16, 13, 60, 90)),
)
TEXT = 77
"""Tokens of a CLIP prompt, which cross-attention reads."""

TINY_MAPS = (Pixels("tiny", 2, 32, 8),)
TINY_SEQUENCES = (Tokens("tiny", 2, 64, 64, 32),)
TINY_LATENTS = (Latent("tiny", (1, 4, 8, 8)),)
