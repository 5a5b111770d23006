"""The recogniser: a small CNN that reads a scene's attributes back from a picture, exported as a scorer folder."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path

import torch
from diffusers import AutoencoderKL
from torch import nn
from torch.nn import functional

from recipes.reference.scenes import HEADS, SIDE, Scenes, draw_scenes
from recipes.reference.trainer import Budget, train

RECOGNISER_BUDGET = Budget(
    steps=800, rate=2e-3, warmup=100, decay=370, average=0.995, weight_decay=0.02, save_seconds=30.0
)
FEATURES = 128
_BATCH = 48


class Recogniser(nn.Module):
    """Pictures (n, 3, 64, 64) in [0, 1] to features (n, 128) and one logits tensor (n, classes) for each head."""

    def __init__(self) -> None:
        super().__init__()

        def stage(inputs: int, outputs: int, stride: int) -> nn.Sequential:
            return nn.Sequential(
                nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False), nn.BatchNorm2d(outputs), nn.ReLU()
            )

        self.body = nn.Sequential(
            nn.Conv2d(3, 24, 4, 2, 1),
            nn.ReLU(),
            stage(24, 48, 2),
            stage(48, 64, 1),
            stage(64, 96, 2),
            stage(96, 96, 1),
            stage(96, 128, 2),
        )
        self.neck = nn.Sequential(nn.Flatten(), nn.Linear(128 * 16, FEATURES), nn.ReLU())
        self.heads = nn.ModuleDict({head: nn.Linear(FEATURES, len(names)) for head, names in HEADS.items()})

    def forward(self, image: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Features first, then the logits in the order of `HEADS`."""
        features = self.neck(self.body(image * 2.0 - 1.0))
        return (features, *(head(features) for head in self.heads.values()))


def _disturb(pictures: torch.Tensor, vae: AutoencoderKL, step: int) -> torch.Tensor:
    """What generated pictures suffer, a quarter of the batch each: nothing, noise, blur, a noisy VAE round trip."""
    generator = torch.Generator().manual_seed(7919 * (step + 1))

    def noise(shape: torch.Size) -> torch.Tensor:
        return torch.randn(shape, generator=generator).to(pictures.device)

    clean, noisy, blurred, decoded = pictures.chunk(4)
    strength = 0.08 * torch.rand((len(noisy), 1, 1, 1), generator=generator).to(pictures.device)
    noisy = noisy + strength * noise(noisy.shape)
    small = functional.interpolate(blurred, scale_factor=0.5, mode="area")
    blurred = functional.interpolate(small, size=blurred.shape[-2:], mode="bilinear", align_corners=False)
    with torch.no_grad():
        latents = vae.encode(decoded * 2.0 - 1.0).latent_dist.mean
        decoded = vae.decode(latents + 0.15 * noise(latents.shape)).sample * 0.5 + 0.5
    return torch.cat([clean, noisy, blurred, decoded]).clamp(0.0, 1.0)


def attribute_hits(outputs: tuple[torch.Tensor, ...], attributes: dict[str, torch.Tensor]) -> torch.Tensor:
    """Per scene and head (n, 9): 1 read correctly, 0 wrongly, -1 where the head does not apply."""
    columns = []
    for logits, (_, target) in zip(outputs[1:], attributes.items(), strict=True):
        hit = (logits.argmax(1) == target).long()
        columns.append(torch.where(target < 0, -torch.ones_like(hit), hit))
    return torch.stack(columns, dim=1)


def train_recogniser(
    path: Path,
    vae: AutoencoderKL,
    device: torch.device,
    budget: Budget = RECOGNISER_BUDGET,
    report: Callable[[str], None] = print,
) -> Recogniser:
    """Train the recogniser on disturbed scenes of every caption; returns it in evaluation mode on `device`."""
    torch.manual_seed(3)
    model = Recogniser().to(device)

    def loss_at(step: int) -> torch.Tensor:
        scenes = draw_scenes("check", (1 << 33) + step * _BATCH, _BATCH, device)
        outputs = model(_disturb(scenes.images, vae, step))
        losses = [
            functional.cross_entropy(logits, target, ignore_index=-1, label_smoothing=0.02)
            for logits, target in zip(outputs[1:], scenes.attributes.values(), strict=True)
        ]
        return torch.stack(losses).mean()

    model.load_state_dict(train("recogniser", model, loss_at, budget, path, report))
    model.eval().requires_grad_(False)
    with torch.no_grad():
        scenes = draw_scenes("heldout", 1 << 30, 1024, device)
        report(f"recogniser: {100 * _accuracy(model, scenes, scenes.images):.2f} % on 1024 held-out scenes")
        restored = torch.cat(
            [vae.decode(vae.encode(p * 2 - 1).latent_dist.mean).sample for p in scenes.images.split(64)]
        )
        restored = (restored * 0.5 + 0.5).clamp(0.0, 1.0)
        report(f"recogniser: {100 * _accuracy(model, scenes, restored):.2f} % after the VAE round trip")
    return model


def _accuracy(model: Recogniser, scenes: Scenes, pictures: torch.Tensor) -> float:
    hits = attribute_hits(model(pictures), scenes.attributes)
    return float((hits == 1).sum() / (hits >= 0).sum())


def write_scorer(model: Recogniser, folder: Path) -> None:
    """Write the scorer folder: model.onnx (input `image`, outputs `features` and one per head) and scorer.json."""
    folder.mkdir(parents=True, exist_ok=True)
    temporary = folder / ".model.onnx"
    names = ["features", *HEADS]
    torch.onnx.export(
        model.cpu().eval(),
        (torch.zeros(2, 3, SIDE, SIDE),),
        str(temporary),
        input_names=["image"],
        output_names=names,
        dynamic_axes={name: {0: "batch"} for name in ["image", *names]},
        opset_version=17,
        dynamo=False,
    )
    digest = hashlib.sha256(temporary.read_bytes()).hexdigest()
    temporary.replace(folder / "model.onnx")
    card = {
        "schema_version": 1,
        "image_size": [SIDE, SIDE],
        "input": "image",
        "features": "features",
        "heads": {head: list(classes) for head, classes in HEADS.items()},
        "sha256": digest,
    }
    (folder / "scorer.json").write_text(json.dumps(card, indent=2) + "\n")
