"""Predicted against measured: minutes and peak memory of quantization, of reference models and random larger ones."""

from __future__ import annotations

import argparse
import datetime
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from diffusers import (
    AutoencoderKL,
    DiffusionPipeline,
    DPMSolverMultistepScheduler,
    FlowMatchEulerDiscreteScheduler,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
    StableDiffusionPipeline,
    UNet2DConditionModel,
)
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

from compress import compiler
from compress.estimate import estimate
from compress.measure.environment import environment
from compress.recipe.schema import Recipe
from recipes.benchmarks.real_pipeline import tokenizer
from recipes.benchmarks.real_size import memory_gib

ROOT = Path(__file__).parent.parent.parent
SCHEMES = {
    "int8-w8a8": "{scheme: int8-w8a8}",
    "int4-w4a8-g64 gptq": "{scheme: int4-w4a8-g64, rounding: gptq}",
    "fp8-w8a8": "{scheme: fp8-w8a8}",
}
SIDES = {"unet": 64, "mmdit": 64, "unet-60m": 128, "mmdit-75m": 128}
TEXT_WIDTH = 256

RECIPE = """\
schema_version: 1
model: {model}
sampler: {{steps: 5, guidance_scale: 3.0}}
passes:
  - quantize: {scheme}
targets: [onnxruntime-cpu]
shapes: {{height: {side}, width: {side}}}
calibration: {{prompts: {prompts}, samples: 4}}
out: {out}
"""


def text(kind: type) -> Any:
    """Two layers, with CLIP's vocabulary."""
    config = CLIPTextConfig(
        vocab_size=49408,
        hidden_size=TEXT_WIDTH,
        intermediate_size=4 * TEXT_WIDTH,
        num_hidden_layers=2,
        num_attention_heads=4,
        projection_dim=TEXT_WIDTH,
    )
    return kind(config)


def vae() -> AutoencoderKL:
    """Pictures eight times as wide as their latents."""
    return AutoencoderKL(
        block_out_channels=(32, 64, 64, 64),
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        layers_per_block=1,
        latent_channels=4,
        shift_factor=0.0,
    )


def unet() -> DiffusionPipeline:
    """Three levels of 128 to 512 channels."""
    return StableDiffusionPipeline(
        vae=vae(),
        text_encoder=text(CLIPTextModel),
        tokenizer=tokenizer(),
        unet=UNet2DConditionModel(
            sample_size=16,
            block_out_channels=(128, 256, 512),
            down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
            up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
            cross_attention_dim=TEXT_WIDTH,
            attention_head_dim=8,
        ),
        scheduler=DPMSolverMultistepScheduler(),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


def mmdit() -> DiffusionPipeline:
    """Eight joint blocks, 512 wide."""
    return StableDiffusion3Pipeline(
        transformer=SD3Transformer2DModel(
            sample_size=16,
            in_channels=4,
            out_channels=4,
            num_layers=8,
            attention_head_dim=64,
            num_attention_heads=8,
            joint_attention_dim=2 * TEXT_WIDTH,
            caption_projection_dim=512,
            pooled_projection_dim=2 * TEXT_WIDTH,
            pos_embed_max_size=16,
        ),
        scheduler=FlowMatchEulerDiscreteScheduler(),
        vae=vae(),
        text_encoder=text(CLIPTextModelWithProjection),
        tokenizer=tokenizer(),
        text_encoder_2=text(CLIPTextModelWithProjection),
        tokenizer_2=tokenizer(),
        text_encoder_3=None,
        tokenizer_3=None,
    )


def follow(recipe: Path, folder: Path, probing: bool) -> None:
    """Quantize in this process; print minutes and peak memory, predicted beforehand or taken, as one JSON line."""
    told = Recipe.load(recipe)
    made = compiler.opened(told, work_dir=folder / "cache")
    if probing:
        print(json.dumps(estimate(told, made.original, made.edits, made.context, engine=False).to_dict()))
        return
    began = time.perf_counter()
    compiler.apply(made.original, told.passes, made.targets, made.context, made.store)
    minutes = (time.perf_counter() - began) / 60.0
    print(json.dumps({"minutes": minutes, "memory_mib": 1024.0 * memory_gib("/proc/self/status", "VmHWM")}))


def process(recipe: Path, folder: Path, what: str) -> dict[str, Any]:
    """What `follow` prints in a process of its own, so that the peak is of that work alone."""
    words = [sys.executable, "-m", "recipes.benchmarks.estimates", what, str(recipe), str(folder)]
    done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(done.stderr[-2000:])
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def measure(name: str, scheme: str, folder: Path) -> dict[str, Any]:
    """One row: predicted, then measured with an empty cache."""
    model = ROOT / "recipes" / "reference" / name
    if name not in ("unet", "mmdit"):
        model = folder / name
        if not model.exists():
            torch.manual_seed(0)
            (unet if name.startswith("unet") else mmdit)().save_pretrained(model)
    own = folder / f"{name}-{list(SCHEMES).index(scheme)}"
    own.mkdir()
    recipe = own / "recipe.yaml"
    prompts = ROOT / "recipes" / "reference" / "prompts" / "calibration.jsonl"
    out = own / "engine"
    recipe.write_text(RECIPE.format(model=model, scheme=SCHEMES[scheme], side=SIDES[name], prompts=prompts, out=out))
    load = os.getloadavg()[0]
    predicted, taken = (process(recipe, own, what) for what in ("predict", "take"))
    return {
        "model": name,
        "scheme": scheme,
        "predicted": predicted,
        "measured": taken,
        "load_average": [round(load, 1), round(os.getloadavg()[0], 1)],
    }


def table(rows: Sequence[dict[str, Any]]) -> str:
    """Markdown."""
    lines = [
        "| model | scheme | minutes: predicted | measured | ratio | peak MiB: predicted | measured | ratio |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        cells = [row["model"], row["scheme"]]
        for key, digits in (("minutes", 2), ("memory_mib", 0)):
            before, after = row["predicted"][key], row["measured"][key]
            cells += [f"{before:.{digits}f}", f"{after:.{digits}f}", f"{before / after:.2f}"]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def main(words: Sequence[str] | None = None) -> None:
    """Measure, and write JSON and a table."""
    given = list(sys.argv[1:] if words is None else words)
    if given[:1] in (["predict"], ["take"]):
        follow(Path(given[1]), Path(given[2]), given[0] == "predict")
        return
    parser = argparse.ArgumentParser(prog="python -m recipes.benchmarks.estimates", description=__doc__)
    parser.add_argument("--models", nargs="+", choices=SIDES, default=list(SIDES))
    parser.add_argument("--schemes", nargs="+", choices=SCHEMES, default=list(SCHEMES)[:2])
    parser.add_argument("--out", type=Path, help="the JSON file; default estimates-DATE.json in results/")
    told = parser.parse_args(given)
    today = datetime.date.today().isoformat()
    out = told.out or Path(__file__).parent / "results" / f"estimates-{today}.json"
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        for name in told.models:
            for scheme in told.schemes:
                rows.append(measure(name, scheme, Path(folder)))
                print(table(rows[-1:]).splitlines()[-1], flush=True)
    report = {"what": __doc__, "date": today, "environment": environment(), "rows": rows}
    out.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    out.with_suffix(".md").write_text(table(rows) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
