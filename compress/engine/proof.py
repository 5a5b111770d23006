"""What a written engine is held to: integer layers on integer kernels, and latents to compare with later."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from compress.engine.jobs import Job
from compress.errors import PassError
from compress.progress import Progress
from export.backends import available, backend, holds_machine_code
from export.engine import Engine
from export.errors import EngineError
from export.manifest import Golden, Manifest
from export.qdq import Lowered

GOLDEN_TOLERANCE = {False: 1e-3, True: 5e-2}
"""Relative error allowed when the golden latents are recomputed elsewhere, without and with integer arithmetic (where
one value that rounds the other way changes all that follow)."""

INTEGER_KERNELS = frozenset(
    {"QLinearConv", "MatMulIntegerToFloat", "QGemm", "QLinearMatMul", "Convolution", "FullyConnected", "MatMul"}
)
"""Kinds of operation, in the records of the runtimes, that a quantized layer becomes."""

ATTENTION_KERNELS = frozenset({"Subgraph"})
"""Likewise, that attention with 8-bit queries and keys becomes where it is fused; else its product is a `MatMul`."""


def prove_kernels(
    folder: Path,
    manifest: Manifest,
    jobs: Sequence[Job],
    lowered: Mapping[tuple[str, str], Lowered],
    progress: Progress,
) -> None:
    """Read from the runtimes' own records that every integer layer ran on an integer kernel.

    Raises:
        PassError: names the graph and how many did not.
    """
    for name, row in manifest.targets.items():
        planned = [job for job in jobs if (job.function, row.dialect) in lowered]
        if not planned or holds_machine_code(row.backend) or not available(row.backend):
            continue
        for done, job in enumerate(planned):
            progress(f"executed kernels of {name}", done, len(planned))
            nodes = lowered[job.function, row.dialect].nodes
            expected = sum(count for kind, count in nodes.items() if kind != "weight only")
            if not expected:
                continue
            arrays = {key: tensor.numpy() for key, tensor in job.check.items()}
            options = row.options.get(job.function, {})
            kernels = backend(row.backend).executed_kernels(folder / row.graphs[job.function], arrays, options)
            ran = Counter((kernel.operation, kernel.precision) for kernel in kernels.values())
            kinds = INTEGER_KERNELS | (ATTENTION_KERNELS if nodes["attention"] else set())
            integer = sum(n for (kind, precision), n in ran.items() if kind in kinds and precision == "int8")
            if integer < expected:
                raise PassError(
                    f"{name} runs {integer} of the {expected} integer layers of {job.function} on integer kernels; "
                    f"executed were {dict(ran.most_common(8))}"
                )


def record_golden(
    folder: Path, manifest: Manifest, prompts: Sequence[Any], integer: bool, progress: Progress
) -> Manifest:
    """Run the engine on every target that runs here, and keep the final latents."""
    golden = Golden(
        prompts=tuple(prompts),
        seeds=tuple(range(len(prompts))),
        height=manifest.shapes["height"][1],
        width=manifest.shapes["width"][1],
        tolerance=GOLDEN_TOLERANCE[integer],
        files={},
    )
    files = {}
    for done, (name, row) in enumerate(manifest.targets.items()):
        progress("golden latents", done, len(manifest.targets))
        if not available(row.backend):
            continue
        try:
            latents = Engine(folder, manifest, name, threads=1).golden_latents(golden)
        except EngineError as error:
            raise PassError(f"the engine does not run on {name}: {error}") from error
        if not np.isfinite(latents).all():
            raise PassError(f"the engine computes NaN or infinity on {name}")
        files[name] = f"golden/{name}.npy"
        (folder / "golden").mkdir(exist_ok=True)
        np.save(folder / files[name], latents, allow_pickle=False)
    return replace(manifest, golden=replace(golden, files=files))
