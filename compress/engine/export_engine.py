"""Writes an engine folder: each function exported once in float, lowered per dialect, pooled, hashed, proved to run."""

from __future__ import annotations

import hashlib
import json
import tempfile
from collections import Counter
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

from compress.engine.build_tensorrt import EngineBuilder
from compress.engine.optimum_layout import write_optimum_layout
from compress.engine.packages import write_packages
from compress.errors import PassError, RefusedError
from compress.model.tokenizers import save_tokenizer
from compress.progress import Progress, silent
from compress.store import Store
from export import conditioning as text
from export.backends import available, backend, holds_machine_code
from export.engine import Engine
from export.errors import EngineError, ExportError
from export.fold import Folding
from export.manifest import STEP_PLAN, Golden, Manifest, TargetEntry
from export.qdq import DIALECTS, Lowered, LoweringError, lower, require_all
from export.quant_plan import QuantPlan
from export.target import Target, require_buildable
from export.to_onnx import OPSET, export_module, strip_metadata
from export.to_tensorrt import Profile
from export.to_web import write_page
from export.tokenizer import FILE as TOKENIZER_FILE
from export.weights import FILE as POOL_FILE
from export.weights import PoolWriter, write_graph, write_pool

if TYPE_CHECKING:
    import onnx

    from compress.model.latent_diffusion import LatentDiffusion

_GRAPH = "graph.onnx"
_SIDES = ("height", "width", "prompt_tokens")

Sizes = tuple[int, int, int]
"""Least, best and greatest."""

GOLDEN_TOLERANCE = {False: 1e-3, True: 5e-2}
"""Relative error allowed when the golden latents are recomputed elsewhere, without and with integer arithmetic (where
one value that rounds the other way changes all that follow)."""

INTEGER_KERNELS = frozenset(
    {"QLinearConv", "MatMulIntegerToFloat", "QGemm", "QLinearMatMul", "Convolution", "FullyConnected", "MatMul"}
)
"""Kinds of operation, in the records of the runtimes, that a quantized layer becomes."""

ATTENTION_KERNELS = frozenset({"Subgraph"})
"""Likewise, that attention with 8-bit queries and keys becomes where it is fused; else its product is a `MatMul`."""


@dataclass(frozen=True)
class Job:
    """One graph to write: a function of the runtime.

    Attributes:
        function: segment or part; what the runtime calls.
        part: whose quantization plan applies.
        folder, file: where it goes, without the ending.
        module: with `prefix` before the component's module names.
        example, check: inputs at two sizes.
        axes: what is dynamic.
    """

    function: str
    part: str
    folder: str
    file: str
    module: Any
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    example: Mapping[str, Tensor]
    check: Mapping[str, Tensor]
    axes: Mapping[str, Mapping[int, str]]


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
        for job, lowerings in _exported(model, segment, dialects, store, folding):
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
    _require_all_lowered(model, jobs, lowered, set() if folding is None else folding.tabulated)
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
    _prove_kernels(folder, manifest, jobs, lowered, progress)
    if golden_prompts:
        manifest = _record_golden(folder, manifest, golden_prompts, bool(lowered), progress)
        manifest = manifest.sealed(folder, run)
        manifest.write(folder)
    return manifest


def checked_shapes(model: LatentDiffusion, shapes: Mapping[str, Sizes]) -> dict[str, Sizes]:
    """All four sizes, in pixels and tokens.

    Raises:
        RefusedError: a side is no multiple of what the model can take, or prompts are padded to another length.
    """
    step = model.latent["downscale"] * model.latent["multiple"]
    for name in ("height", "width"):
        wrong = [size for size in shapes[name] if size % step]
        if wrong:
            raise RefusedError(f"shapes.{name}: {wrong[0]} is no multiple of {step} pixels, which this model needs")
        free = {axis for axes in model.family.dynamic_axes().values() for axis in axes.values()}
        if shapes[name][0] != shapes[name][2] and name not in free:
            raise RefusedError(
                f"shapes.{name}: a {model.family.name} denoiser has one size; give one value, not a range"
            )
    level = 1.0 if model.step_plan is None else min(row.level for row in model.step_plan.steps)
    for name in ("height", "width"):
        if level < 1.0 and shapes[name][1] * level < shapes[name][0]:
            low, best, high = round(shapes[name][1] * level), *shapes[name][1:]
            raise RefusedError(
                f"shapes.{name}: the plan begins at {low} pixels, which lie outside: write [{low}, {best}, {high}]"
            )
    encoders = model.conditioning.get("encoders") or [{"max_length": 1}]
    length = int(encoders[0]["max_length"])
    low, best, high = shapes.get("prompt_tokens") or (length, length, length)
    if not low <= length <= high:
        raise RefusedError(f"shapes.prompt_tokens: prompts of this model are padded to {length} tokens; allow for that")
    return {**{name: shapes[name] for name in ("batch", "height", "width")}, "prompt_tokens": (low, best, high)}


def jobs_of(model: LatentDiffusion, shapes: Mapping[str, Sizes]) -> Iterator[Job]:
    """Every graph of the engine, the denoiser's segments first."""
    return _jobs(model, shapes, _example_sizes(model, shapes), _extra_tokens(model))


def _jobs(
    model: LatentDiffusion, shapes: Mapping[str, Sizes], sizes: Sequence[Mapping[str, int]], extra_tokens: int
) -> Iterator[Job]:
    """Every graph of the engine, the denoiser's segments first.

    Args:
        model: to be exported.
        shapes: of the engine.
        sizes: in latent pixels, of `example` and of `check`.
        extra_tokens: see `_extra_tokens`.
    """
    dynamic = {"batch"} | {name for name, (low, _, high) in shapes.items() if low != high}
    parts = model.parts()
    del parts["denoiser"]
    yield from _segment_jobs(model, dynamic, sizes, extra_tokens)
    lengths = {encoder["part"]: int(encoder["max_length"]) for encoder in model.conditioning.get("encoders", ())}
    first = next(iter(lengths.values()), 0)
    for name, part in parts.items():
        extra = lengths.get(name, first) - first
        example, check = (
            _part_inputs(part, {**size, "prompt_tokens": size["prompt_tokens"] + extra}) for size in sizes
        )
        axes = _axes(example, check, part.axes, dynamic)
        yield Job(name, name, name, "model", part, part.inputs, part.outputs, example, check, axes)


def _example_sizes(model: LatentDiffusion, shapes: Mapping[str, Sizes]) -> list[dict[str, int]]:
    """Two sizes to trace and check at, which differ on every dynamic axis."""
    return [
        _size(model, 2, {name: _pick(shapes[name], False) for name in _SIDES}),
        _size(model, 1, {name: _pick(shapes[name], True) for name in _SIDES}),
    ]


def _size(model: LatentDiffusion, batch: int, sides: Mapping[str, int]) -> dict[str, int]:
    """Sides in latent pixels."""
    step = model.latent["downscale"]
    return {"batch": batch, **sides, "height": sides["height"] // step, "width": sides["width"] // step}


def profiles(model: LatentDiffusion, shapes: Mapping[str, Sizes]) -> dict[str, Profile]:
    """Function -> input -> its least, best and greatest shape; found without computing anything.

    Both guidance halves run as one batch, and so do the rows of a span.

    Args:
        model: with a step plan.
        shapes: as `checked_shapes` gives them.
    """
    from torch._subclasses.fake_tensor import FakeTensorMode

    assert model.step_plan is not None
    halves = 2 if any(step.guidance != "none" for step in model.step_plan.steps) else 1
    span = max(step.span for step in model.step_plan.steps)
    _, best, most = shapes["batch"]
    sizes = [
        _size(model, batch, {name: shapes[name][at] for name in _SIDES})
        for at, batch in enumerate((1, best * halves, most * halves * span))
    ]
    extra = _extra_tokens(model)
    with FakeTensorMode(allow_non_fake_inputs=True):
        least, usual = (list(_jobs(model, shapes, [size, sizes[2]], extra)) for size in sizes[:2])
    return {
        low.function: {
            name: (tuple(tensor.shape), tuple(middle.example[name].shape), tuple(low.check[name].shape))
            for name, tensor in low.example.items()
        }
        for low, middle in zip(least, usual, strict=True)
    }


def _segment_jobs(
    model: LatentDiffusion, dynamic: set[str], sizes: Sequence[Mapping[str, int]], extra: int
) -> Iterator[Job]:
    segments = model.segments()
    tensors = [
        model.family.example_inputs(model.denoiser, **{**size, "prompt_tokens": size["prompt_tokens"] + extra})
        for size in sizes
    ]
    for segment in segments:
        example, check = ({name: known[name] for name in segment.inputs} for known in tensors)
        axes = _axes(example, check, model.family.dynamic_axes(), dynamic)
        file = "model" if len(segments) == 1 else segment.name
        yield Job(
            segment.name,
            "denoiser",
            model.family.part,
            file,
            segment.module,
            segment.inputs,
            segment.outputs,
            example,
            check,
            axes,
        )
        for known in tensors:
            with torch.no_grad():
                known.update(zip(segment.outputs, segment.module(**{k: known[k] for k in segment.inputs}), strict=True))


def _extra_tokens(model: LatentDiffusion) -> int:
    """How many more text tokens the denoiser sees than the first encoder reads (a second, or zeros in its place)."""
    encoders = model.conditioning.get("encoders")
    if not encoders:
        return 0
    from compress.model.tokenizers import portable

    tokenizers = {name: portable(tokenizer) for name, tokenizer in model.tokenizers.items()}
    tensors = text.encode(model.conditioning, tokenizers, model.functions(simulate=False), text.unconditional(1))
    return int(tensors["encoder_hidden_states"].shape[1]) - int(encoders[0]["max_length"])


def _part_inputs(part: Any, size: Mapping[str, int]) -> dict[str, Tensor]:
    inputs: dict[str, Tensor] = part.example_inputs(**size)
    return {name: inputs[name] for name in part.inputs}


def _pick(sizes: Sizes, other: bool) -> int:
    """The best size, or another one where there is any."""
    low, best, high = sizes
    return best if not other else low if low != best else high


def _axes(
    example: Mapping[str, Tensor],
    check: Mapping[str, Tensor],
    known: Mapping[str, Mapping[int, str]],
    dynamic: set[str],
) -> dict[str, dict[int, str]]:
    """Input -> its dynamic dimensions. What the family does not name differs between the two sizes."""
    axes = {}
    for name, tensor in example.items():
        differing = [d for d, size in enumerate(tensor.shape) if size != check[name].shape[d]]
        if name in known:
            axes[name] = {d: axis for d, axis in known[name].items() if axis in dynamic and d in differing}
        else:
            axes[name] = {d: "batch" if d == 0 else f"{name}_{d}" for d in differing}
    return axes


def unfoldable(targets: Sequence[Target]) -> str | None:
    """Why nothing can be taken out of the loop for these targets; None where it can.

    All targets of an engine run one plan, and only runtimes that read graphs run what is before its first row.
    """
    built = [row.name for row in targets if row.machine_code or row.library or row.page is not None]
    return f"{built[0]} runs the segments of the denoiser as they are" if built else None


def _exported(
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


def _require_all_lowered(
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


def _prove_kernels(
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


def _record_golden(
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
