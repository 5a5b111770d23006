"""Measures an engine folder against the original: quality at four stages, speed, size, and where error enters."""

from __future__ import annotations

import tempfile
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from compress.engine.export_engine import export_engine
from compress.measure import baselines, localise, memory, quality, size, verdict
from compress.measure.beforehand import Beforehand
from compress.measure.clip_score import ClipScorer
from compress.measure.environment import BUILT, SIMULATED, environment, ran
from compress.measure.latency import Contestant, interleave
from compress.measure.localise_graph import compare_graph
from compress.measure.metrics import Estimate
from compress.measure.original import PipelineCall, open_pipeline
from compress.measure.quality import Judge, Quality, Stage, Workload
from compress.measure.scorer import Scorer
from compress.progress import Progress
from compress.prompts import read_prompts
from compress.report.html import Pictures
from compress.report.report import Baseline, Curve, Localisation, Plan, Report, Row, Verdict
from export.backends import available, holds_machine_code
from export.engine import Engine
from export.manifest import Manifest, read_manifest
from export.runtime import Runtime
from export.target import device_of

if TYPE_CHECKING:
    from compress.model.latent_diffusion import LatentDiffusion
    from compress.recipe.schema import Evaluate, Recipe
    from compress.store import Store
    from export.target import Target

PAIRED = 64
"""Pictures compared at the stages that only say where error enters; PyTorch emulates integers slowly."""
TRACED = 8
SHOWN = 6
ROUNDS = 15
FIRST_SEED = 1 << 32
"""Evaluation seeds begin so far above the recipe's seed, where the calibration seeds begin."""


@dataclass(frozen=True)
class Subject:
    """What is examined.

    Attributes:
        recipe: of the run.
        original: uncut and uncompressed, with its step plan.
        stages: pass name -> the model after it; the last is what was exported.
        folder: of the engine.
        targets: it was built for.
        shapes: it was built for.
    """

    recipe: Recipe
    original: LatentDiffusion
    stages: Mapping[str, LatentDiffusion]
    folder: Path
    targets: Sequence[Target]
    shapes: Mapping[str, tuple[int, int, int]]

    @property
    def compressed(self) -> LatentDiffusion:
        """The model after the last pass."""
        return list(self.stages.values())[-1] if self.stages else self.original


@dataclass(frozen=True)
class _Qualities:
    """Stage name -> what it made, and how good it is; `original` is one of the stages."""

    made: dict[str, Stage]
    judged: dict[str, Quality]


def examine(subject: Subject, store: Store, progress: Progress) -> tuple[Report, Pictures | None, Manifest]:
    """Measure everything the recipe asks for.

    Returns:
        The report, pictures for its page, and the engine's manifest with the measured latency and the evidence.

    Raises:
        PassError: a stage gives NaN or flat pictures, a pass changed nothing, or the engine is slower than the
            original.
        RecipeError: a gate bounds what is not measured.
    """
    manifest = read_manifest(subject.folder)
    evaluate = subject.recipe.evaluate
    if evaluate is None:
        return _unmeasured(subject, manifest), None, manifest
    ready = [row.name for row in subject.targets if available(row.backend)]
    workload = _workload(subject.recipe, evaluate)
    scorer, clip = _scorers(subject.recipe, evaluate)
    gates = _gates(subject.recipe)
    verdict.refuse_gates(gates, quality.planned_metrics(scorer is not None, clip is not None, evaluate.samples))
    judge = Judge(workload.prompts, scorer, clip)
    with ExitStack() as cleanup:
        open_plain = _plain_opener(subject, ready, evaluate, store, progress, cleanup)
        picked, contests = _race(subject, ready, evaluate, workload, open_plain, progress)
        qualities = _qualities(subject, ready, picked, workload, judge, store, progress)
        points = _baselines(subject, contests, qualities, open_plain, picked, workload, judge, progress)
    timed = min(contests, key=lambda one: one.timings[baselines.ORIGINAL].median / one.timings[picked].median)
    for one in contests:
        verdict.check_speed(one.rows, picked, evaluate.allow_slower)
    curves = _curves(subject, picked, workload, progress)
    sizes = [size.original_size(subject.original, subject.original.parts())]
    sizes += [size.engine_size(subject.folder, name) for name in ready]
    costs = _costs(subject, ready, timed, workload, progress)
    for name, built in zip(["original", *ready], sizes, strict=True):
        costs[name]["size_mib"] = Estimate(built.mib, None, 1)
    findings = verdict.Findings(
        original={**qualities.judged["original"].estimates, **costs["original"]},
        targets={name: {**costs[name], **qualities.judged[name].estimates} for name in ready},
        target=picked,
        compressed=qualities.judged["compressed"].estimates,
        exported=qualities.judged["exported"].estimates,
        per_pass={name: qualities.judged[name].estimates for name in subject.stages},
        changes={name: quality.changes(qualities.judged["original"], qualities.judged[name]) for name in ready},
    )
    table = verdict.rows(findings, gates)
    notes = _notes(subject, evaluate, timed.threads)
    report = _report(subject, manifest, table, verdict.verdict(table, notes), picked).model_copy(
        update={
            "latency": tuple(row for one in contests for row in one.rows),
            "sizes": tuple(sizes),
            "baselines": tuple(points),
            "curves": curves,
            "localisation": _localised(subject, qualities, picked, workload, progress),
            "evidence": _evidence(subject, manifest, ready),
            "edits": _edits(subject),
        }
    )
    return report, _pictures(workload, qualities, picked), _measured(manifest, timed, ready)


def _evidence(subject: Subject, manifest: Manifest, ready: Sequence[str]) -> dict[str, str]:
    """How each column of the report is known."""
    torch_stages = {**subject.stages, "compressed": subject.compressed}
    return {
        "original": ran(),
        **{name: SIMULATED if model.quant_plans else ran() for name, model in torch_stages.items()},
        "exported": ran(),
        **{name: ran() if name in ready else BUILT for name in manifest.targets},
    }


def _edits(subject: Subject) -> dict[str, dict[str, int]]:
    """Pass -> action -> how many modules it was done to."""
    found, model = {}, subject.original
    for step in subject.recipe.passes:
        found[step.label] = dict(Counter(edit.action for edit in step.plan(model, subject.targets)))
        model = subject.stages[step.label]
    return found


def _workload(recipe: Recipe, evaluate: Evaluate) -> Workload:
    file = recipe.prompts_file()
    assert file is not None  # Recipe checked it
    prompts = read_prompts(file, evaluate.samples)
    height, width = recipe.shapes.height.best, recipe.shapes.width.best
    return Workload.of(prompts, recipe.seed + FIRST_SEED, height, width, evaluate.batch)


def _scorers(recipe: Recipe, evaluate: Evaluate) -> tuple[Scorer | None, ClipScorer | None]:
    scorer = None if evaluate.scorer is None else Scorer(recipe.locate(evaluate.scorer), max(evaluate.threads))
    clip = None if evaluate.clip_model is None else ClipScorer(recipe.locate(evaluate.clip_model))
    return scorer, clip


def _gates(recipe: Recipe) -> dict[str, dict[str, float]]:
    found: dict[str, dict[str, float]] = recipe.to_dict().get("gates", {})
    return found


def _plain_opener(
    subject: Subject,
    ready: Sequence[str],
    evaluate: Evaluate,
    store: Store,
    progress: Progress,
    cleanup: ExitStack,
) -> baselines.Opener | None:
    """Write the uncompressed float engine to a temporary folder, and return what opens it."""
    if not evaluate.against:
        return None
    folder = Path(cleanup.enter_context(tempfile.TemporaryDirectory(prefix="plain-engine-")))
    rows = [row for row in subject.targets if row.name in ready]
    export_engine(subject.original, rows, subject.shapes, folder, store=store, progress=progress)
    return lambda name, threads: Engine.open(folder, name, threads, trusted=True).runtime


def _race(
    subject: Subject,
    ready: Sequence[str],
    evaluate: Evaluate,
    workload: Workload,
    open_plain: baselines.Opener | None,
    progress: Progress,
) -> tuple[str, list[baselines.Contest]]:
    """Time everything at every thread count; the fastest target of a first heat is the one that is picked."""
    plan = subject.original.step_plan
    assert plan is not None
    task = baselines.Task(workload.texts[0], workload.height, workload.width)
    call = PipelineCall.of(plan, subject.original.conditioning, workload.height, workload.width)
    pipeline = open_pipeline(subject.recipe.locate(subject.recipe.model), call, device_of(ready))
    open_engine = partial(_opened, subject.folder)
    heat = interleave(
        [Contestant(name, partial(task.on, open_engine(name, evaluate.threads[0]))) for name in ready],
        rounds=5,
        progress=progress,
        what="which target is fastest",
    )
    order = sorted(ready, key=lambda name: heat[name].median)
    plain = order if open_plain is not None and "plain_runtime" in evaluate.against else []
    fewer = partial(baselines.plan_with_steps, subject.original) if "fewer_steps" in evaluate.against else None
    steps = int(plan.key.get("steps", plan.network_calls))
    contests = [
        baselines.contest(
            task, threads, pipeline, steps, order, open_engine, plain, open_plain, fewer, ROUNDS, progress=progress
        )
        for threads in evaluate.threads
    ]
    return order[0], contests


def _opened(folder: Path, name: str, threads: int) -> Runtime:
    return Engine.open(folder, name, threads, trusted=True).runtime


def _qualities(
    subject: Subject,
    ready: Sequence[str],
    picked: str,
    workload: Workload,
    judge: Judge,
    store: Store,
    progress: Progress,
) -> _Qualities:
    """Make and judge the pictures of every stage; what was made before is taken from the store."""
    threads = max(subject.recipe.evaluate.threads) if subject.recipe.evaluate is not None else 1
    few = workload.first(PAIRED)
    digest = read_manifest(subject.folder).engine_hash
    made: dict[str, Stage] = {}

    def make(name: str, what: str, runtime: Callable[[], Runtime], load: Workload) -> Stage:
        inputs = {
            "what": "stage",
            "of": what,
            "prompts": load.texts,
            "seeds": list(load.seeds),
            "size": [load.height, load.width, load.batch],
        }
        return store.fetch(
            inputs,
            lambda folder: quality.generate(runtime(), load, name, progress).save(folder / "stage.npz"),
            lambda folder: Stage.load(folder / "stage.npz"),
        )

    original = subject.original
    made["original"] = make("original", original.state_hash(), lambda: original.runtime(False), workload)
    before, previous = made["original"], original
    dialect = _dialect(subject, picked)
    for name, model in subject.stages.items():
        what = f"{model.state_hash()} rounded as for {dialect}"
        made[name] = make(f"after {name}", what, partial(model.runtime, True, dialect), few)
        if not model.computes_like(previous):
            quality.check_changed(before, made[name], f"the pass {name}")
        before, previous = made[name], model
    made["compressed"] = before.first(len(few.prompts))
    reference = partial(_reference_runtime, subject, picked, threads)
    made["exported"] = make("exported", f"{digest} exported {picked}", reference, few)
    for name in ready:
        made[name] = make(name, f"{digest} {name}", partial(_opened, subject.folder, name, threads), workload)
    base = judge.quality(made["original"])
    judged = {"original": base}
    for name, stage in made.items():
        if name != "original":
            judged[name] = judge.quality(stage, made["original"], base)
    return _Qualities(made, judged)


def _dialect(subject: Subject, picked: str) -> str:
    """Of the picked target: PyTorch rounds what it rounds."""
    return next(row.dialect for row in subject.targets if row.name == picked)


def _reference_runtime(subject: Subject, target: str, threads: int = 1) -> Runtime:
    """The graphs of a target as they were lowered, run by ONNX Runtime node by node, whatever runtime it has.

    Machine code is compiled from what PyTorch computes, so PyTorch computes it.
    """
    folder = subject.folder
    manifest = read_manifest(folder)
    row = manifest.targets[target]
    if holds_machine_code(row.backend):
        return subject.compressed.runtime(True, row.dialect)
    options = {name: {"optimization": "none"} for name in row.graphs}
    row = replace(row, backend="onnxruntime", options=options)
    return Engine(folder, replace(manifest, targets={target: row}), target, threads).runtime


def _baselines(
    subject: Subject,
    contests: Sequence[baselines.Contest],
    qualities: _Qualities,
    open_plain: baselines.Opener | None,
    picked: str,
    workload: Workload,
    judge: Judge,
    progress: Progress,
) -> list[Baseline]:
    """Every contestant's quality beside its latency."""
    fewer: dict[int, Quality] = {}
    steps = {f"{one.threads} {name}": count for one in contests for name, count in one.equal_steps.items()}
    if steps and open_plain is not None:
        plan_with = partial(baselines.plan_with_steps, subject.original)
        threads = max(one.threads for one in contests)
        fewer = baselines.fewer_steps_quality(
            steps,
            open_plain(picked, threads),
            plan_with,
            workload,
            judge,
            qualities.made["original"],
            qualities.judged["original"],
            progress,
        )
    return [point for one in contests for point in baselines.baselines(one, qualities.judged, fewer)]


def _costs(
    subject: Subject, ready: Sequence[str], timed: baselines.Contest, workload: Workload, progress: Progress
) -> dict[str, dict[str, Estimate]]:
    """Latency and peak memory of the original and every target."""
    plan = subject.original.step_plan
    assert plan is not None
    call = PipelineCall.of(plan, subject.original.conditioning, workload.height, workload.width)
    prompt, height, width = workload.texts[0], workload.height, workload.width
    progress("peak memory", 0, 1 + len(ready))
    model = subject.recipe.locate(subject.recipe.model)
    peaks = {"original": memory.pipeline_peak_mib(model, call.to_json(), prompt, timed.threads)}
    for done, name in enumerate(ready, start=1):
        progress("peak memory", done, 1 + len(ready))
        peaks[name] = memory.engine_peak_mib(subject.folder, name, prompt, height, width, timed.threads)
    progress("peak memory", 1 + len(ready), 1 + len(ready))
    names = {"original": baselines.ORIGINAL, **{name: name for name in ready}}
    return {
        key: {"latency_ms": timed.timings[name].estimate(), "peak_rss_mib": Estimate(peaks[key], None, 1)}
        for key, name in names.items()
    }


def _at_the_same_points(subject: Subject) -> LatentDiffusion:
    """The original; where a pass chose other sampler points, the original at those, every call full.

    Guidance that a pass put into the weights is given by both halves.
    """
    before, after = subject.original.step_plan, subject.compressed.step_plan
    if before is None or after is None or [step.t for step in before.steps] == [step.t for step in after.steps]:
        return subject.original
    steps = tuple(
        replace(step, path=before.full_path, read={}, write=(), span=1, gated=False, initial=0.0)
        for step in after.steps
    )
    scale = None if after.contract is None else after.contract.guidance_scale
    if scale is not None:
        steps = tuple(replace(step, guidance="cfg", guidance_scale=scale) for step in steps)
    plan = replace(before, steps=steps, starts={}, init_noise_sigma=after.init_noise_sigma)
    return replace(subject.original, step_plan=plan)


def _curves(subject: Subject, picked: str, workload: Workload, progress: Progress) -> tuple[Curve, ...]:
    """Per-step error of the compressed, exported and built model against the original at the same sampler points."""
    few = workload.first(TRACED)
    reference = quality.trace(_at_the_same_points(subject).runtime(simulate=False), few)
    stages: dict[str, Callable[[], Runtime]] = {
        "compressed": partial(subject.compressed.runtime, True, _dialect(subject, picked)),
        "exported": partial(_reference_runtime, subject, picked),
        picked: partial(_opened, subject.folder, picked, 1),
    }
    curves = []
    for done, (name, opened) in enumerate(stages.items()):
        progress("error step by step", done, len(stages))
        runtime = opened()
        free, forced = quality.trace(runtime, few), quality.trace(runtime, few, reference)
        curves.append(quality.step_errors(name, reference, free, forced))
    progress("error step by step", len(stages), len(stages))
    return tuple(curves)


def _localised(
    subject: Subject, qualities: _Qualities, picked: str, workload: Workload, progress: Progress
) -> Localisation:
    """Name the stage and the layer where error enters."""
    few = workload.first(2)
    count = min(PAIRED, len(workload.prompts))
    names = ["original", "compressed", "exported", picked]
    found = localise.handovers({name: qualities.made[name].latents[:count] for name in names})
    progress("where error enters", 0, 2)
    original = subject.original.runtime(simulate=False)
    recorder = localise.Recorder(original.functions)
    original.altered(functions=recorder.functions).generate(few.texts, list(few.seeds), few.height, few.width)
    dialect = _dialect(subject, picked)
    layers = localise.compare_parts(subject.original, subject.compressed, recorder.inputs, dialect)
    progress("where error enters", 1, 2)
    compressed = subject.compressed.runtime(True, dialect)
    exported = _reference_runtime(subject, picked)
    unfolded = Beforehand(exported.plan, exported.functions)
    graphs = {}
    for before, after, title in (
        (compressed, unfolded.functions(), "exported"),
        (exported, _opened(subject.folder, picked, 1).functions, picked),
    ):
        shadow = localise.Shadow(before.functions, after)
        before.altered(functions=shadow.functions).generate(few.texts, list(few.seeds), few.height, few.width)
        graphs[title] = shadow.outputs
    progress("where error enters", 2, 2)
    stage = localise.worst_stage(found)
    if layers is not None and stage == "compressed":
        bad = layers.first_below()
        return Localisation(
            handovers=found,
            stage=stage,
            layer=layers.worst().name,
            first_below=None if bad is None else bad.name,
            largest_drop=layers.largest_drop().name,
            threshold_db=localise.THRESHOLD_DB,
            layers=layers.ranked(10),
            graphs=graphs,
        )
    blamed = graphs.get(stage or "", ())
    worst = blamed[0].name if blamed else None
    ranked = () if layers is None else layers.ranked(10)
    if stage == "exported" and blamed:
        function = blamed[0].name.partition(":")[0]
        worst = _lowered_layer(subject, picked, compressed, unfolded, function, few) or worst
    return Localisation(handovers=found, stage=stage, layer=worst, layers=ranked, graphs=graphs)


def _lowered_layer(
    subject: Subject, picked: str, compressed: Runtime, unfolded: Beforehand, function: str, few: Workload
) -> str | None:
    """Name the layer at which the lowered graph of a function departs from PyTorch; None where none is quantized."""
    if holds_machine_code(read_manifest(subject.folder).targets[picked].backend):
        return None
    recorder = localise.Recorder(compressed.functions, unfolded.fill)
    compressed.altered(functions=recorder.functions).generate(few.texts, list(few.seeds), few.height, few.width)
    module = subject.compressed.modules(True, _dialect(subject, picked))[function]
    graph = subject.folder / read_manifest(subject.folder).targets[picked].graphs[function]
    found = compare_graph(module, graph, recorder.inputs[function], f"{function}.")
    return None if found is None else found.largest_drop().name


def _notes(subject: Subject, evaluate: Evaluate, threads: int) -> list[str]:
    notes = [
        f"Quality comes from {evaluate.samples} held-out prompts and seeds, disjoint from the calibration; the stages "
        f"in PyTorch and the exported graphs from the first {min(PAIRED, evaluate.samples)} of them.",
        f"Latency is one picture from prompt to pixels, batch 1, taken in turns; the table shows {threads} "
        f"thread{'s' if threads > 1 else ''}, the least favourable of the measured thread counts.",
    ]
    if subject.compressed.quant_plans:
        notes.append("After quantize, PyTorch computes the rounding in float (simulated); no speed is taken there.")
    return notes


def _report(subject: Subject, manifest: Manifest, table: Sequence[Row], judged: Verdict, picked: str) -> Report:
    plan = subject.compressed.step_plan
    assert plan is not None
    return Report(
        name=Path(subject.recipe.out).name,
        created=datetime.now(UTC).isoformat(timespec="seconds"),
        verdict=judged,
        recipe=subject.recipe.to_dict(),
        environment=environment(),
        evidence=dict.fromkeys(manifest.targets, BUILT),
        plan=Plan.of(plan),
        folded=str(manifest.provenance["folded"]),
        rows=tuple(table),
        target=picked,
    )


def _unmeasured(subject: Subject, manifest: Manifest) -> Report:
    """Without the key `evaluate` only the size is known."""
    names = list(manifest.targets)
    sizes = [size.original_size(subject.original, subject.original.parts())]
    sizes += [size.engine_size(subject.folder, name) for name in names]
    mib = [{"size_mib": Estimate(one.mib, None, 1)} for one in sizes]
    findings = verdict.Findings(mib[0], dict(zip(names, mib[1:], strict=True)), names[0])
    table = verdict.rows(findings, {})
    note = "Nothing but the size was measured: the recipe has no key evaluate."
    report = _report(subject, manifest, table, verdict.verdict(table, [note]), names[0])
    return report.model_copy(update={"sizes": tuple(sizes)})


def _measured(manifest: Manifest, timed: baselines.Contest, ready: Sequence[str]) -> Manifest:
    targets = dict(manifest.targets)
    for name in ready:
        numbers = {"latency_ms": round(timed.timings[name].median, 3), "threads": timed.threads}
        targets[name] = replace(targets[name], measured=numbers, evidence=ran())
    return replace(manifest, targets=targets)


def _pictures(workload: Workload, qualities: _Qualities, picked: str) -> Pictures:
    stages = {name: qualities.made[name].images[:SHOWN] for name in ("original", "compressed", "exported", picked)}
    count = min(map(len, stages.values()))
    return Pictures(
        workload.texts[:count], list(workload.seeds)[:count], {name: made[:count] for name, made in stages.items()}
    )
