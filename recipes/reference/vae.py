"""The autoencoder (f=4, 4 channels): its architecture, its training on scenes, and exact latent whitening."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
from diffusers import AutoencoderKL

from recipes.reference.scenes import SIDE, draw_scenes
from recipes.reference.trainer import Budget, train

VAE_BUDGET = Budget(steps=3000, rate=2e-3, warmup=100, decay=2000, average=0.995, weight_decay=0.0, save_seconds=30.0)
_CROP, _BATCH = 32, 16
_WHOLE_SHARE, _WHOLE_BATCH = 0.12, 4  # the last steps see whole pictures


def build_vae() -> AutoencoderKL:
    """Untrained AutoencoderKL: (n, 3, h, w) in [-1, 1] to latents (n, 4, h/4, w/4), fully convolutional."""
    return AutoencoderKL(
        in_channels=3,
        out_channels=3,
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        block_out_channels=(16, 32, 64),
        layers_per_block=1,
        latent_channels=4,
        norm_num_groups=8,
        sample_size=SIDE,
        scaling_factor=1.0,
        shift_factor=0.0,
        force_upcast=False,
        mid_block_add_attention=False,
    )


def reconstruction_loss(restored: torch.Tensor, pictures: torch.Tensor) -> torch.Tensor:
    """L1 + MSE + 0.5 L1 of horizontal and vertical differences; pictures (n, 3, h, w) in [-1, 1]."""
    error = restored - pictures
    edges = error.diff(dim=2).abs().mean() + error.diff(dim=3).abs().mean()
    return error.abs().mean() + error.square().mean() + 0.5 * edges


def _pictures_at(step: int, steps: int, device: torch.device) -> torch.Tensor:
    """The training pictures of one step in [-1, 1]: random crops at first, whole scenes near the end."""
    if step >= steps * (1.0 - _WHOLE_SHARE):
        return draw_scenes("train", (1 << 32) + step * _WHOLE_BATCH, _WHOLE_BATCH, device).images * 2.0 - 1.0
    scenes = draw_scenes("train", (1 << 31) + step * _BATCH, _BATCH, device).images
    generator = torch.Generator().manual_seed(step)
    corners = torch.randint(0, SIDE - _CROP + 1, (_BATCH, 2), generator=generator).tolist()
    crops = [scene[:, y : y + _CROP, x : x + _CROP] for scene, (y, x) in zip(scenes, corners, strict=True)]
    return torch.stack(crops) * 2.0 - 1.0


def train_vae(
    path: Path, device: torch.device, budget: Budget = VAE_BUDGET, report: Callable[[str], None] = print
) -> AutoencoderKL:
    """Train the autoencoder, whiten its latents and return it in evaluation mode on `device`."""
    torch.manual_seed(1)
    vae = build_vae().to(device, memory_format=torch.channels_last)

    def loss_at(step: int) -> torch.Tensor:
        pictures = _pictures_at(step, budget.steps, device)
        moments = vae.encode(pictures.contiguous(memory_format=torch.channels_last)).latent_dist
        noise = torch.randn(moments.mean.shape, generator=torch.Generator().manual_seed(step)).to(device)
        restored = vae.decode(moments.mean + moments.std * noise).sample
        spread = 0.5 * (moments.mean.square() + moments.var - 1.0 - moments.logvar).mean()
        return reconstruction_loss(restored, pictures) + 1e-5 * spread

    def watch(step: int, seconds: float) -> None:
        report(f"vae: held-out PSNR {reconstruction_psnr(vae, 64, device):.2f} dB at step {step} ({seconds:.0f} s)")
        vae.train()

    average = train("vae", vae, loss_at, budget, path, report, watch)
    vae.load_state_dict(average)
    vae.eval().requires_grad_(False)
    whiten(vae, device)
    return vae


@torch.no_grad()
def whiten(vae: AutoencoderKL, device: torch.device, count: int = 2048) -> None:
    """Fold per-channel whitening into quant_conv and post_quant_conv, so that posterior means have mean 0, std 1.

    Exact up to rounding: mean' = (mean - m) / s, logvar' = logvar - 2 ln s, and post_quant_conv undoes both.
    """
    means = [
        vae.encode(draw_scenes("train", start, 128, device).images * 2.0 - 1.0).latent_dist.mean
        for start in range(0, count, 128)
    ]
    latents = torch.cat(means)
    centre, scale = latents.mean((0, 2, 3)), latents.std((0, 2, 3))
    channels = len(centre)
    enter, leave = vae.quant_conv, vae.post_quant_conv
    enter.weight[:channels] /= scale[:, None, None, None]
    enter.bias[:channels] = (enter.bias[:channels] - centre) / scale
    enter.bias[channels:] -= 2.0 * scale.log()
    leave.bias += (leave.weight[:, :, 0, 0] * centre[None]).sum(1)
    leave.weight *= scale[None, :, None, None]


@torch.no_grad()
def reconstruction_psnr(vae: AutoencoderKL, count: int, device: torch.device) -> float:
    """Mean PSNR in dB (peak 1) of the round trip of `count` held-out scenes."""
    vae.eval()
    pictures = draw_scenes("heldout", 1 << 30, count, device).images
    restored = torch.cat(
        [vae.decode(vae.encode(part * 2.0 - 1.0).latent_dist.mean).sample for part in pictures.split(32)]
    )
    error = ((restored * 0.5 + 0.5).clamp(0.0, 1.0) - pictures).square().mean((1, 2, 3))
    return float(error.clamp_min(1e-12).log10().mul(-10.0).mean())
