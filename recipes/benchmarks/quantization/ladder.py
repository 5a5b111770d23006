"""Measures the quality of number formats and methods on the reference models, in PyTorch (simulated)."""

from __future__ import annotations

import argparse
import json
import time
import traceback
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from compress.errors import PassError, RefusedError
from compress.model.latent_diffusion import LatentDiffusion
from compress.passes.quantize import Quantize
from export.quant_plan import QuantPlan
from recipes.benchmarks import workers
from recipes.benchmarks.caching.bench import ROOT, sampled
from recipes.benchmarks.caching.measure import judged
from recipes.benchmarks.caching.presets import SAMPLERS, Run
from recipes.benchmarks.caching.pytorch import TorchBench, opened
from recipes.benchmarks.caching.results import Row, encoded, write
from recipes.benchmarks.quantization.entries import Entry, tasks

BUILD = ROOT / "build" / "quantization"
STEPS = 20


class Ladder:
    """The models of a bench, each with its sampler, and what calibration saw of them with some seed."""

    def __init__(self, bench: TorchBench) -> None:
        self.bench = bench
        self._models = {
            name: sampled(model, Run(name, next(iter(SAMPLERS[name])), STEPS), STEPS)
            for name, model in bench.models.items()
        }
        self._seen: dict[str, tuple[int, Any]] = {}
        self._full: dict[str, dict[str, np.ndarray]] = {}

    def model(self, name: str) -> LatentDiffusion:
        """The float model with its sampler."""
        return self._models[name]

    def full(self, name: str) -> dict[str, np.ndarray]:
        """Latents, pictures, features and hits of the float model."""
        if name not in self._full:
            runtime = self._models[name].runtime(simulate=False)
            latents = self.bench.latents(runtime)
            self._full[name] = judged(self.bench, latents, self.bench.pictures(runtime, latents)).arrays
        return self._full[name]

    def measure(self, name: str, seed: int, entry: Entry) -> Row:
        """Quality of one rung, against the float model of the same noise."""
        model = self._models[name].clone()
        context = replace(self.bench.context, seed=seed * 1000)
        step = Quantize(**entry.fields)
        edits = step.plan(model, [])
        if not step.float_share and (name not in self._seen or self._seen[name][0] != seed):
            watching = Quantize(scheme="none", parts={"denoiser": "int8-w8a8"}, float_share=0.0)
            self._seen[name] = seed, watching.observe(model, watching.plan(model, []), context)
        began = time.perf_counter()
        if step.float_share:
            step.apply(model, edits, context)
        else:
            step.quantize(model, edits, self._seen[name][1], context, {})
        took = time.perf_counter() - began
        step.check(model, edits)
        model.quant_plans["denoiser"] = without_outputs(model.quant_plans["denoiser"])
        runtime = model.runtime()
        latents = self.bench.latents(runtime)
        full = self.full(name)
        own = [edit for edit in edits if edit.module.startswith("denoiser")]
        branches = [layer.low_rank for layer in model.quant_plans["denoiser"].layers.values()]
        size = sum(edit.bytes_after for edit in own) + sum(b.up.nbytes + b.down.nbytes for b in branches if b)
        row: Row = {"model": name, "seed": seed, "scheme": entry.scheme, "method": entry.method}
        row |= {
            "samples": len(latents),
            "seconds": took,
            "bytes": size,
            "float_bytes": sum(e.bytes_before for e in own),
        }
        if not np.isfinite(latents).all():
            return row | {"refused": "its latents are not finite"}
        return row | judged(self.bench, latents, self.bench.pictures(runtime, latents), full.__getitem__).row


def without_outputs(plan: QuantPlan) -> QuantPlan:
    """The plan with convolutions whose outputs stay in float: rounding them is ONNX Runtime's need, not a format's."""
    return replace(plan, layers={name: replace(layer, output=None) for name, layer in plan.layers.items()})


def work(told: Any, tasks: Sequence[tuple[str, int, Entry]], following: Any, ends: float) -> None:
    """Take task after task until none is left, or the time is over."""
    ladder = Ladder(opened(told.build, told.models, told.samples, told.device))
    print(f"loaded, {ends - time.time():.0f} s left", flush=True)
    for at, (name, seed, entry) in workers.taken(tasks, following, ends):
        file = told.build / "results" / name / str(seed) / f"{entry}.json"
        if file.exists() and json.loads(file.read_bytes())["samples"] >= told.samples:
            continue
        began = time.time()
        try:
            row = ladder.measure(name, seed, entry)
        except (RefusedError, PassError) as error:
            row = {"model": name, "seed": seed, "scheme": entry.scheme, "method": entry.method, "refused": str(error)}
            row |= {"samples": told.samples}
        except Exception:
            print(f"{name} {seed} {entry}: {traceback.format_exc()}", flush=True)
            continue
        where = torch.cuda.get_device_name() if told.device == "cuda" else told.device
        write(file, encoded(row | {"computed": f"PyTorch {torch.__version__}, float32, {where}"}))
        said = row.get("refused") or (
            f"{100 * row['attributes']['value']:.2f} %, {row['latent_psnr_db']['value']:.2f} dB latent, "
            f"{row['image_psnr_db']['value']:.2f} dB image, {row['bytes'] / row['float_bytes']:.3f} of the size, "
            f"{row['seconds']:.1f} s to quantize"
        )
        print(f"{at + 1}/{len(tasks)} {name} {seed} {entry}: {said}, {time.time() - began:.1f} s", flush=True)


def main(words: Sequence[str] | None = None) -> None:
    """Measure, in many processes, until all is done or the time is over."""
    parser = argparse.ArgumentParser(prog="python -m recipes.benchmarks.quantization.ladder", description=__doc__)
    parser.add_argument("--models", nargs="+", choices=list(SAMPLERS), default=list(SAMPLERS))
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2], help="of calibration")
    parser.add_argument("--samples", type=int, default=512)
    parser.add_argument("--only", nargs="+", default=None, help="schemes")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--workers", type=int, default=1, help="processes")
    parser.add_argument("--seconds", type=float, default=float("inf"), help="time for all")
    parser.add_argument("--build", type=Path, default=BUILD, help="what is kept on the way")
    told = parser.parse_args(words)
    wanted = [
        (name, seed, entry)
        for seed, entry in tasks(told.seeds, told.workers > 4 and told.seconds == float("inf"))
        for name in told.models
        if told.only is None or entry.scheme in told.only
    ]
    workers.run(work, told, wanted)


if __name__ == "__main__":
    main()
