"""The graph of a function: exported once in float, kept by content, divided where it folds, lowered per dialect."""

from __future__ import annotations

import hashlib
import json
import tempfile
from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from compress.engine.jobs import Job
from compress.errors import PassError
from compress.store import Store
from export.errors import ExportError
from export.fold import Folding
from export.qdq import DIALECTS, Lowered, LoweringError, lower, require_all
from export.quant_plan import QuantPlan
from export.to_onnx import OPSET, export_module, strip_metadata
from export.weights import PoolWriter, write_graph

if TYPE_CHECKING:
    import onnx

    from compress.model.latent_diffusion import LatentDiffusion

_GRAPH = "graph.onnx"


def exported(
    model: LatentDiffusion, job: Job, dialects: Sequence[str], store: Store | None, folding: Folding | None
) -> list[tuple[Job, dict[str, tuple[onnx.ModelProto, Lowered | None]]]]:
    """The functions that become of a job, each with dialect -> its graph, and how it was lowered.

    Of the dialects that runtimes read, the first one alone where none differs from it; those in float16 always differ.

    The weights go to the disk as the graph is exported, and those that are quantized come back one at a time.
    """
    import onnx
    from onnx.external_data_helper import load_external_data_for_model

    plan = model.quant_plans.get(job.part)
    read = [dialect for dialect in dialects if not DIALECTS[dialect].half]
    differing = read if plan is not None and _computes(plan, read) else read[:1]
    differing += [dialect for dialect in dialects if DIALECTS[dialect].half]

    def lower_one(source: onnx.ModelProto, dialect: str, folder: Path) -> tuple[onnx.ModelProto, Lowered | None]:
        graph, how = onnx.ModelProto(), None
        graph.CopyFrom(source)
        if plan is None and not DIALECTS[dialect].half:
            load_external_data_for_model(graph, str(folder))
        else:
            how = _lower(graph, plan or QuantPlan({}), job, dialect, folder)
        strip_metadata(graph)
        return graph, how

    def lower_all(folder: Path) -> list[tuple[Job, dict[str, tuple[onnx.ModelProto, Lowered | None]]]]:
        source = onnx.load(folder / _GRAPH, load_external_data=False)
        pieces = [(job, source)]
        if folding is not None and job.part == "denoiser":
            pieces = _divided(job, source, folder, folding)
        return [
            (piece, {dialect: lower_one(graph, dialect, folder) for dialect in differing}) for piece, graph in pieces
        ]

    if store is None:
        with tempfile.TemporaryDirectory() as folder:
            _write_float_graph(job, Path(folder))
            return lower_all(Path(folder))
    inputs = {
        "what": "float graph",
        "module": type(job.module).__name__,
        "component": _content(job.module.component),
        "function": job.function,
        "inputs": {name: [list(tensor.shape), list(job.check[name].shape)] for name, tensor in job.example.items()},
        "outputs": list(job.outputs),
        "axes": {name: {str(d): axis for d, axis in axes.items()} for name, axes in job.axes.items()},
        "opset": OPSET,
    }
    return store.fetch(inputs, lambda folder: _write_float_graph(job, folder), lower_all)


def _divided(job: Job, source: onnx.ModelProto, folder: Path, folding: Folding) -> list[tuple[Job, onnx.ModelProto]]:
    sizes = [{key: tensor.numpy() for key, tensor in inputs.items()} for inputs in (job.example, job.check)]
    try:
        pieces = folding.divide(job.function, source, folder, sizes)
    except ExportError as error:
        raise PassError(str(error)) from error
    found = []
    for piece in pieces:
        check = {key: torch.from_numpy(array) for key, array in piece.check.items()}
        divided = replace(
            job,
            function=piece.name,
            file=job.file + piece.name.removeprefix(job.function),
            inputs=piece.segment.inputs,
            outputs=piece.segment.outputs,
            example=check,
            check=check,
        )
        found.append((divided, piece.graph))
    return found


def _write_float_graph(job: Job, folder: Path) -> None:
    try:
        with PoolWriter(folder) as pool:
            graph = export_module(
                job.module, job.example, job.axes, job.outputs, job.check, name=job.function, pool=pool
            )
            write_graph(graph, folder / _GRAPH)
    except ExportError as error:
        raise PassError(str(error)) from error


def _content(component: nn.Module) -> str:
    """SHA-256 of a network: its configuration and its weights."""
    config: Any = getattr(component, "config", {})
    plain = dict(config.to_dict() if hasattr(config, "to_dict") else config)
    plain.pop("_name_or_path", None)
    digest = hashlib.sha256(json.dumps(plain, sort_keys=True, default=str).encode())
    for name, tensor in sorted(component.state_dict().items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.detach().contiguous().cpu().numpy().tobytes())
    return digest.hexdigest()


def _lower(graph: onnx.ModelProto, plan: QuantPlan, job: Job, dialect: str, folder: Path) -> Lowered:
    try:
        return lower(graph, plan, dialect, prefix=f"{job.module.prefix}.", partial=True, folder=folder)
    except LoweringError as error:
        raise PassError(f"{job.function}: {error}") from error


def _computes(plan: QuantPlan, dialects: Sequence[str]) -> bool:
    """Whether a dialect computes a layer in integers, so that each needs graphs of its own."""
    return any(DIALECTS[dialect].computes(layer) for dialect in dialects for layer in plan.layers.values())


def require_all_lowered(
    model: LatentDiffusion,
    jobs: Sequence[Job],
    lowered: Mapping[tuple[str, str], Lowered],
    tabulated: Collection[str],
) -> None:
    """Every layer of every plan must be in some graph, in each dialect that has graphs of its own, or in a table."""
    for part, whole in model.quant_plans.items():
        prefix = next(job.module.prefix for job in jobs if job.part == part)
        left = {name: layer for name, layer in whole.layers.items() if f"{prefix}.{name}" not in tabulated}
        plan = replace(whole, layers=left)
        functions = {job.function for job in jobs if job.part == part}
        for dialect in {key[1] for key in lowered if key[0] in functions}:
            try:
                require_all(plan, [lowered[name, dialect] for name in functions], dialect)
            except LoweringError as error:
                raise PassError(f"{part}: {error}") from error
