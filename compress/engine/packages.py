"""Writes the functions of an engine as machine code for the GPU of this machine, one AOTInductor package each."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from compress.errors import PassError, RefusedError
from compress.progress import Progress, silent
from export.errors import ExportError
from export.target import Target
from export.to_aotinductor import Program, build_package, trace_module

if TYPE_CHECKING:
    from compress.engine.jobs import Job
    from compress.model.latent_diffusion import LatentDiffusion

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def trace_functions(model: LatentDiffusion, row: Target, jobs: Sequence[Job]) -> dict[str, Program]:
    """Trace every function for the device of a target, and compare each with its module; nothing is compiled.

    Quantized layers compute with rounded numbers in float; a fused denoiser keeps our operators.

    Raises:
        PassError: a function cannot be traced, or its program computes something else.
    """
    modules = model.modules(True, row.dialect, fused=row.operators)
    return {job.function: _traced(model, row, job, modules[job.function]) for job in jobs}


def write_packages(
    model: LatentDiffusion,
    row: Target,
    jobs: Sequence[Job],
    folder: Path,
    options: Mapping[str, Any] | None = None,
    progress: Progress = silent,
) -> dict[str, str]:
    """Trace and compile every function; function -> path in the folder.

    Args:
        model: its networks.
        row: the target.
        jobs: the functions.
        folder: of the engine.
        options: further settings of Inductor.
        progress: receives what is done.

    Raises:
        RefusedError: the target is a GPU, and this PyTorch has no CUDA.
        PassError: a function cannot be traced or compiled, or its program computes something else.
    """
    if row.device == "cuda" and not torch.cuda.is_available():
        raise RefusedError(
            f"this PyTorch ({torch.__version__}) has no CUDA, which {row.name} needs: install one that has"
        )
    modules = model.modules(True, row.dialect, fused=row.operators)
    paths = {}
    for done, job in enumerate(jobs):
        progress(f"compile for {row.name}", done, len(jobs))
        program = _traced(model, row, job, modules[job.function])
        paths[job.function] = f"{job.folder}/{job.file}.{row.name}.pt2"
        try:
            build_package(program, folder / paths[job.function], options)
        except ExportError as error:
            raise PassError(str(error)) from error
    return paths


def _traced(model: LatentDiffusion, row: Target, job: Job, module: Any) -> Program:
    plan = model.quant_plans.get(job.part)
    dtype = _DTYPES["float32" if plan is None else plan.inference_precision]
    try:
        return trace_module(
            module, job.example, job.axes, job.outputs, job.check, name=job.function, device=row.device, dtype=dtype
        )
    except ExportError as error:
        raise PassError(str(error)) from error
