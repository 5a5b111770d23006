"""Measures the quality of the caching benchmark's entries by PyTorch on a GPU; engines and times come after."""

from __future__ import annotations

import argparse
import time
import traceback
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from typing_extensions import override

from compress.model.latent_diffusion import LatentDiffusion
from export.runtime import Runtime
from recipes.benchmarks import caching_tables, workers
from recipes.benchmarks.caching.__main__ import BUILD
from recipes.benchmarks.caching.bench import Bench
from recipes.benchmarks.caching.measure import measure
from recipes.benchmarks.caching.presets import SAMPLERS, Run, runs, steps_of
from recipes.benchmarks.caching.results import Kept, Row, verdict

BATCH = {"cuda": 512, "cpu": 16}
"""Samples at a time: a processor is fastest with what its caches hold."""
Task = tuple[Run, str]


class TorchBench(Bench):
    """Runs plans over the networks in PyTorch, in float32, where the models are."""

    @override
    def opened(self, model: LatentDiffusion, name: str) -> tuple[Runtime, Row]:
        device = next(model.denoiser.parameters()).device
        where = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
        return model.runtime(simulate=False), {"computed": f"PyTorch {torch.__version__}, float32, {where}"}


def opened(root: Path, models: Sequence[str], samples: int, device: str) -> TorchBench:
    """Load everything onto a device; products stay in float32 there."""
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    torch.set_num_threads(1)
    bench = TorchBench.of(Kept(root), caching_tables.TARGET, models, samples)
    for model in bench.models.values():
        model.to(torch.device(device))
    context = replace(bench.context, batch=len(bench.context.prompts), store=None)
    return replace(bench, context=context, batch=BATCH[device])


def work(told: Any, tasks: Sequence[Task], following: Any, ends: float) -> None:
    """Take task after task until none is left, or the time is over."""
    bench = opened(told.build, told.models, told.samples, told.device)
    print(f"loaded, {ends - time.time():.0f} s left", flush=True)
    for at, (run, entry) in workers.taken(tasks, following, ends):
        full = bench.kept.row(run, "full")
        while entry != "full" and full is None and time.time() < ends:
            time.sleep(0.1)
            full = bench.kept.row(run, "full")
        inputs = bench.inputs(run, entry, None if entry == "full" or full is None else full["plan"])
        if verdict(bench.kept.row(run, entry), inputs, "") == "complete":
            continue
        began = time.time()
        try:
            row = measure(bench, run, entry, inputs)
        except Exception:
            print(f"{run} {entry}: {traceback.format_exc()}", flush=True)
            continue
        bench.kept.put(run, row)
        psnr = row.get("latent_psnr_db")
        said = row.get("refused") or (f"{100 * row['attributes']['value']:.2f} %")
        said += "" if psnr is None else f", {psnr['value']:.2f} dB"
        print(f"{at + 1}/{len(tasks)} {run} {entry}: {said}, {time.time() - began:.1f} s", flush=True)


def ordered(wanted: Sequence[Run], only: Sequence[str] | None = None) -> list[Task]:
    """Full runs first, since all else is compared with them; then run after run, what takes longest first."""
    tasks: list[Task] = [(run, "full") for run in wanted]
    for run in wanted:
        entries = [entry for entry in run.entries(only=only) if entry != "full"]
        tasks += [(run, entry) for entry in sorted(entries, key=lambda entry: steps_of(entry) is not None)]
    return tasks


def main(words: Sequence[str] | None = None) -> None:
    """Measure, in many processes, until all is done or the time is over."""
    parser = argparse.ArgumentParser(prog="python -m recipes.benchmarks.caching.pytorch", description=__doc__)
    parser.add_argument("--models", nargs="+", choices=list(SAMPLERS), default=list(SAMPLERS))
    parser.add_argument("--samplers", nargs="+", default=["all"], help="default, all, or names of schedulers")
    parser.add_argument("--steps", nargs="+", type=int, default=[50, 20, 10])
    parser.add_argument("--samples", type=int, default=1024)
    parser.add_argument("--only", nargs="+", default=None, help="names of entries; full is always measured")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--workers", type=int, default=12, help="processes")
    parser.add_argument("--seconds", type=float, default=float("inf"), help="time for all")
    parser.add_argument("--build", type=Path, default=BUILD, help="what is kept on the way")
    told = parser.parse_args(words)
    tasks = ordered(list(runs(told.models, told.samplers, sorted(set(told.steps))[::-1])), told.only)
    workers.run(work, told, tasks)


if __name__ == "__main__":
    main()
