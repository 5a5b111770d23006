"""The fused denoising step against the same arithmetic in eager torch and Inductor: launches and time."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor

from kernels.denoise_step import DenoisingState, begin, denoise_step
from kernels.step_table import StepTable, step_table
from recipes.benchmarks.gpu.bench import Bar, Bench, Row, judged
from recipes.benchmarks.gpu.clock import launches
from recipes.benchmarks.gpu.shapes import LATENTS, TINY_LATENTS

FEWER = 8
GUIDANCE = 5.0
_MANY = 1 << 12  # rows, more than are timed: after the last one the kernel does nothing


def multistep(rows: int) -> StepTable:
    """A second-order multistep sampler with guidance, as DPM-Solver++(2M) is; its numbers are made up."""
    lagged = np.tile([-0.5, 0.15], (rows, 1))
    lagged[0, 1] = 0.0
    return step_table(
        x=np.full((rows, 1), 0.9),
        m=lagged,
        noise=np.zeros(rows),
        timestep=np.linspace(999.0, 1.0, rows),
        input_scale=np.ones(rows),
        guidance_scale=np.full(rows, GUIDANCE),
    )


def eager_step(
    latent: Tensor, output: Tensor, before: Tensor, numbers: tuple[float, float, float]
) -> tuple[Tensor, ...]:
    """One update as a scheduler in torch makes it: latent float32, what the network takes next, guided output."""
    uncond, cond = output.chunk(2)
    guided = uncond.float() + GUIDANCE * (cond.float() - uncond.float())
    x, m, older = numbers
    latent = x * latent + m * guided + older * before
    return latent, torch.cat([latent, latent]).to(output.dtype), guided


def run(bench: Bench) -> Iterator[Row]:
    """One contest per latent, as CUDA graphs, where no launch is left to be saved, and launch by launch."""
    for model, shape in TINY_LATENTS if bench.tiny else LATENTS:
        table = multistep(_MANY)
        latent = bench.randn(*shape, dtype=torch.float32)
        output = bench.randn(2 * shape[0], *shape[1:], seed=1)
        before = bench.randn(*shape, dtype=torch.float32, seed=2)
        state = begin(table, latent, dtype=torch.bfloat16)

        def ours(state: DenoisingState = state, output: Tensor = output) -> None:
            denoise_step(state, output)

        def eager(latent: Tensor = latent, output: Tensor = output, before: Tensor = before) -> tuple[Tensor, ...]:
            return eager_step(latent, output, before, (0.9, -0.5, 0.15))

        plain = {"ours": bench.clock.milliseconds(ours), "eager": bench.clock.milliseconds(eager)}
        contestants = {"ours": ours, "eager": eager}
        if bench.compile:
            tuned = bench.compiled(eager_step)
            contestants["inductor"] = lambda tuned=tuned, a=latent, b=output, c=before: tuned(
                a, b, c, (0.9, -0.5, 0.15)
            )
        counts = {name: launches(call, bench.device) for name, call in contestants.items()}
        said = " x ".join(map(str, shape))
        moved = latent.numel() * (4.0 + 4 + 4 + 4 + 2 * 2 + 2 * 2)
        row = bench.contest("denoise_step", model, said, contestants, moved=moved)
        launched = {"ms": plain, "floor_ms": row["floor_ms"], "bound": row.get("bound")}
        row |= judged(launched, Bar(5.0, "eager")) if bench.device.type == "cuda" else {}
        row |= {"ms_with_launches": plain, "ratio_with_launches": plain["eager"] / plain["ours"], "launches": counts}
        yield row | {"launches_passed": counts["eager"] >= FEWER * counts["ours"]}
