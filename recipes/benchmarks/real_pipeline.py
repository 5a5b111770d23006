"""Compresses a whole pipeline of Stable Diffusion 1.5's size with random weights: minutes, peak memory and bytes."""

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
from diffusers import AutoencoderKL, DPMSolverMultistepScheduler, StableDiffusionPipeline
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from compress.measure.environment import environment
from recipes.benchmarks.real_size import memory_gib, stable_diffusion_1_5

ROOT = Path(__file__).parent.parent.parent
SCHEMES = ("int8-w8a8", "int4-w4a8")
SIDE = 512
PROMPTS = "a red circle\na blue square on the left of a green ring\n"

RECIPE = """\
schema_version: 1
model: {folder}/model
seed: 0
sampler: {{scheduler: DPMSolverMultistepScheduler, steps: {steps}, guidance_scale: 7.5}}
passes:
  - quantize: {{scheme: {scheme}}}
targets: [openvino-cpu]
shapes: {{batch: [1, 1, 2], height: {side}, width: {side}}}
calibration: {{prompts: {folder}/prompts.txt, samples: 2}}
out: {folder}/{scheme}
"""


def tokenizer() -> CLIPTokenizer:
    """Of CLIP's size; words fall into letters, and all other entries stand for nothing."""
    letters = [chr(code) for code in range(33, 127)]
    pieces = [*letters, *(f"{letter}</w>" for letter in letters)]
    pieces += [f"<unused{at}>" for at in range(49406 - len(pieces))]
    vocabulary = {piece: at for at, piece in enumerate([*pieces, "<|startoftext|>", "<|endoftext|>"])}
    return CLIPTokenizer(vocab=vocabulary, merges=[], model_max_length=77)


def build(folder: Path) -> None:
    """Write the pipeline, its weights in 16 bits, as it was published."""
    torch.manual_seed(0)
    words = tokenizer()
    text = CLIPTextConfig(
        vocab_size=len(words),
        hidden_size=768,
        intermediate_size=3072,
        num_hidden_layers=12,
        num_attention_heads=12,
        bos_token_id=words.bos_token_id,
        eos_token_id=words.eos_token_id,
        pad_token_id=words.pad_token_id,
    )
    vae = AutoencoderKL(
        block_out_channels=(128, 256, 512, 512),
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        layers_per_block=2,
        latent_channels=4,
        sample_size=SIDE,
    )
    StableDiffusionPipeline(
        vae=vae.half(),
        text_encoder=CLIPTextModel(text).half(),
        tokenizer=words,
        unet=stable_diffusion_1_5().half(),
        scheduler=DPMSolverMultistepScheduler(),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    ).save_pretrained(folder / "model")
    (folder / "prompts.txt").write_text(PROMPTS)


def compress(folder: Path, scheme: str, steps: int) -> dict[str, Any]:
    """Follow the recipe in a process of its own, with an empty cache."""
    recipe = folder / f"{scheme}.yaml"
    recipe.write_text(RECIPE.format(folder=folder, scheme=scheme, steps=steps, side=SIDE))
    began, peak, log = time.perf_counter(), 0.0, folder / f"{scheme}.log"
    with log.open("w") as out:
        words = [sys.executable, "-m", "compress", str(recipe)]
        places = {**os.environ, "COMPRESS_CACHE": str(folder / "cache")}
        run = subprocess.Popen(words, cwd=ROOT, env=places, stdout=out, stderr=subprocess.STDOUT)
        while run.poll() is None:
            peak = max(peak, memory_gib(f"/proc/{run.pid}/status", "VmHWM"))
            time.sleep(0.2)
    if run.returncode:
        raise RuntimeError(f"{scheme} failed with exit code {run.returncode}: {log.read_text()[-2000:]}")
    size = sum(file.stat().st_size for file in (folder / scheme).rglob("*") if file.is_file())
    return {
        "scheme": scheme,
        "steps": steps,
        "minutes": round((time.perf_counter() - began) / 60.0, 2),
        "peak_rss_gib": round(peak, 2),
        "engine_bytes": size,
        "load_average": round(os.getloadavg()[0], 1),
    }


def main(words: Sequence[str] | None = None) -> None:
    """Measure and write JSON."""
    parser = argparse.ArgumentParser(prog="python -m recipes.benchmarks.real_pipeline", description=__doc__)
    parser.add_argument("--schemes", nargs="+", choices=SCHEMES, default=SCHEMES)
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--work", type=Path, help="a folder that is kept (20 GB); default a temporary one")
    parser.add_argument("--out", type=Path, help="the JSON file; default real_pipeline-DATE.json in results/")
    told = parser.parse_args(words)
    today = datetime.date.today().isoformat()
    out = told.out or Path(__file__).parent / "results" / f"real_pipeline-{today}.json"
    with tempfile.TemporaryDirectory() as made:
        folder = told.work or Path(made)
        if not (folder / "model").exists():
            build(folder)
        rows = [compress(folder, scheme, told.steps) for scheme in told.schemes]
    report = {"what": __doc__, "date": today, "environment": environment(), "rows": rows}
    out.write_text(json.dumps(report, indent=1) + "\n")
    print(json.dumps(rows, indent=1))


if __name__ == "__main__":
    main()
