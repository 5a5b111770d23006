"""Writes an engine folder: each function exported once in float, lowered per dialect, pooled, hashed, proved to run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from compress.engine.build_tensorrt import EngineBuilder
from compress.engine.graphs import exported, require_all_lowered
from compress.engine.jobs import Job, Sizes, checked_shapes, jobs_of, profiles
from compress.engine.optimum_layout import write_optimum_layout
from compress.engine.packages import write_packages
from compress.engine.proof import prove_kernels, record_golden
from compress.errors import PassError, RefusedError
from compress.model.tokenizers import save_tokenizer
from compress.progress import Progress, silent
from compress.store import Store
from export.fold import Folding
from export.manifest import STEP_PLAN, Manifest, TargetEntry
from export.qdq import DIALECTS, Lowered
from export.quant_plan import QuantPlan
from export.target import Target, require_buildable
from export.to_web import write_page
from export.tokenizer import FILE as TOKENIZER_FILE
from export.weights import FILE as POOL_FILE
from export.weights import write_pool

if TYPE_CHECKING:
    import onnx

    from compress.model.latent_diffusion import LatentDiffusion


def export_engine(
    model: LatentDiffusion,
    targets: Sequence[Target],
    shapes: Mapping[str, Sizes],
    folder: Path,
    *,
    files: Mapping[str, str] | None = None,
    provenance: Mapping[str, Any] | None = None,
    golden_prompts: Sequence[Any] = (),
    fold: bool = False,
    store: Store | None = None,
    progress: Progress = silent,
) -> Manifest:
    """Write an engine into an empty folder. Equal models give equal engines: the same files, the same `engine_hash`.

    A size with one value is fixed in the graphs, which makes them faster to build and to run; a range is dynamic. The
    batch is always dynamic.

    Args:
        model: with a step plan; its quantization plans are lowered.
        targets: whose runtimes and dialects the engine serves.
        shapes: `batch`, `height`, `width` (pixels) and perhaps `prompt_tokens` -> least, best, greatest.
        folder: empty or absent; publish it with `compress.engine.swap.swap_in`.
        files: further texts to put in, by path (the recipe).
        provenance: for the manifest.
        golden_prompts: whose latents, with seeds 0, 1, ..., are kept to verify the engine later.
        fold: what depends on no latent is taken out of the loop where the targets allow, see `export.fold`; the engine
            then runs this plan, and no other.
        store: keeps the float graphs by content, so that a killed or edited run need not export them again.
        progress: receives what is done.

    Raises:
        RefusedError: a size does not fit the model, or a target does not know a number format of it.
        EngineError: a target is compiled where it runs, and this machine cannot run it.
        PassError: a graph does not compute what its module does, or its integer layers do not run as integers.
    """
    if model.step_plan is None:
        raise PassError("the model has no step plan yet, so it cannot be exported")
    for row in targets:
        require_buildable(row)
    shapes = checked_shapes(model, shapes)
    plan = model.step_plan
    folder.mkdir(parents=True, exist_ok=True)
    jobs = list(jobs_of(model, shapes))
    hindrance = unfoldable(targets) if fold else "not asked for"
    folding = Folding(plan) if hindrance is None else None
    dialects = sorted(
        {row.dialect for row in targets if not row.machine_code}, key=lambda name: (name != "onnxruntime", name)
    )
    read = [dialect for dialect in dialects if not DIALECTS[dialect].half]
    graphs: dict[str, dict[str, str]] = {dialect: {} for dialect in read}
    sizes = profiles(model, shapes) if len(read) < len(dialects) else {}
    builders = {row.name: EngineBuilder(row, sizes, folder) for row in targets if row.library}
    lowered: dict[tuple[str, str], Lowered] = {}
    pools: dict[str, dict[str, onnx.ModelProto]] = {}
    whole, jobs = jobs, [] if dialects else jobs
    for done, segment in enumerate(whole if dialects else ()):
        progress("export", done, len(whole))
        for job, lowerings in exported(model, segment, dialects, store, folding):
            jobs.append(job)
            for dialect, (graph, how) in lowerings.items():
                if how is not None and job.part in model.quant_plans:
                    lowered[job.function, dialect] = how
                if dialect not in read:
                    widened = set() if how is None else how.widened
                    for builder in builders.values():
                        progress(f"build for {builder.target.name}", done, len(whole))
                        builder.build(job.function, graph, widened, f"{job.folder}/{job.file}")
                    continue
                name = job.file if dialect == read[0] else f"{job.file}.{dialect}"
                pools.setdefault(job.folder, {})[name] = graph
                graphs[dialect][job.function] = f"{job.folder}/{name}.onnx"
            for dialect in read:
                graphs[dialect].setdefault(job.function, graphs[read[0]][job.function])
    progress("export", len(whole), len(whole))
    if folding is not None:
        plan = folding.plan()
        plan.validate()
    require_all_lowered(model, jobs, lowered, set() if folding is None else folding.tabulated)
    for name, models in pools.items():
        write_pool(models, folder / name)
    paths = {}
    for row in targets:
        if row.machine_code:
            paths[row.name] = write_packages(model, row, jobs, folder, progress=progress)
        else:
            paths[row.name] = builders[row.name].graphs if row.name in builders else graphs[row.dialect]
    run = {path for one in (*paths.values(), *graphs.values()) for path in one.values()}
    run |= {f"{name}/{POOL_FILE}" for name in pools if (folder / name / POOL_FILE).exists()}
    (folder / STEP_PLAN).write_text(plan.to_json() + "\n", encoding="utf-8")
    run.add(STEP_PLAN)
    for name, tokenizer in model.tokenizers.items():
        save_tokenizer(tokenizer, folder / name)
        run.add(f"{name}/{TOKENIZER_FILE}")
    if read and len(plan.paths) == 1 and len(plan.segments) == 1:
        write_optimum_layout(model, folder)
    for path, content in (files or {}).items():
        (folder / path).write_text(content, encoding="utf-8")
    built: dict[str, Mapping[str, Any]] = {name: builder.record() for name, builder in builders.items()}
    built |= {row.name: write_page(row.page, folder) for row in targets if row.page is not None}
    manifest = Manifest(
        family=model.family.name,
        latent=model.latent,
        conditioning=model.conditioning,
        tokenizers={name: name for name in model.tokenizers},
        shapes=shapes,
        targets={
            row.name: _target_entry(model, row, paths[row.name], built.get(row.name, {}), jobs) for row in targets
        },
        provenance={
            "model": model.hash(),
            "folded": f"nothing: {hindrance}" if folding is None else folding.summary(),
            **(provenance or {}),
        },
    ).sealed(folder, run)
    manifest.write(folder)
    prove_kernels(folder, manifest, jobs, lowered, progress)
    if golden_prompts:
        manifest = record_golden(folder, manifest, golden_prompts, bool(lowered), progress)
        manifest = manifest.sealed(folder, run)
        manifest.write(folder)
    return manifest


def unfoldable(targets: Sequence[Target]) -> str | None:
    """Why nothing can be taken out of the loop for these targets; None where it can.

    All targets of an engine run one plan, and only runtimes that read graphs run what is before its first row.
    """
    built = [row.name for row in targets if row.machine_code or row.library or row.page is not None]
    return f"{built[0]} runs the segments of the denoiser as they are" if built else None


def _target_entry(
    model: LatentDiffusion,
    row: Target,
    paths: Mapping[str, str],
    built: Mapping[str, Any],
    jobs: Sequence[Job],
) -> TargetEntry:
    half = DIALECTS[row.dialect].half
    formats: dict[str, dict[str, str]] = {}
    options: dict[str, dict[str, Any]] = {job.function: {"device": row.device} for job in jobs if row.machine_code}
    for job in jobs:
        plan = model.quant_plans.get(job.part)
        if plan is None:
            continue
        schemes = {layer.scheme for layer in plan.layers.values()} | {"float16" if half else plan.storage}
        if DIALECTS[row.dialect].attention:
            schemes |= {attention.scheme for attention in plan.attentions.values()}
        if plan.inference_precision == "bfloat16":
            schemes.add("bf16")
            options.setdefault(job.function, {})["inference_precision"] = "bfloat16"
        for scheme in sorted(schemes):
            reason = row.refusal(scheme)
            if reason is not None:
                raise RefusedError(f"{job.part}: {reason}")
            formats.setdefault(job.part, {})[scheme] = _execution(plan, scheme, row)
    return TargetEntry(row.backend, row.dialect, dict(sorted(paths.items())), options, formats=formats, build=built)


def _execution(plan: QuantPlan, scheme: str, row: Target) -> str:
    """How a scheme runs on a target; where operators compute some of its layers in float, it is emulated."""
    layers = [layer for layer in plan.layers.values() if layer.scheme == scheme and layer.input is not None]
    whole = all(DIALECTS[row.dialect].form(layer) for layer in layers) if row.operators else True
    return row.formats[scheme] if whole else "simulated"
