"""Times students and their teacher in 8 bits against the diffusers pipeline with all steps and guidance, in turn."""

from __future__ import annotations

import argparse
import datetime
from collections.abc import Callable, Sequence
from pathlib import Path

from compress.measure.environment import ran
from compress.measure.latency import Contestant, interleave, torch_threads
from compress.measure.original import PipelineCall, open_pipeline
from export.engine import Engine
from export.step_plan import StepPlan
from recipes.benchmarks import caching_tables
from recipes.benchmarks.caching.bench import FIRST_SEED, REFERENCE, SIDE, Bench, planned
from recipes.benchmarks.caching.presets import SAMPLERS
from recipes.benchmarks.caching.results import Kept, Row, encoded, write
from recipes.benchmarks.distillation.entries import Entry, entries, full, quantized, students
from recipes.benchmarks.distillation.measure import Study
from recipes.benchmarks.distillation.report import aggregate
from recipes.benchmarks.distillation.students import BUILD

ROUNDS = 15


def timed(study: Study, model: str, wanted: Sequence[Entry], threads: int, rounds: int) -> dict[Entry, Row]:
    """Time one picture, from prompt to pixels, by every engine and by the diffusers pipeline in float32.

    Args:
        study: holds engines and the teacher.
        model: a reference model.
        wanted: measured entries.
        threads: of every contestant.
        rounds: timed runs of each.

    Returns:
        Entry -> `ms` and `original_ms`, median and quartiles, and their `ratio`.
    """
    prompt = study.bench.prompts[0].text
    original = study.prepared(model, full(model))
    call = PipelineCall.of(planned(original), original.conditioning, SIDE, SIDE)
    pipeline = open_pipeline(REFERENCE / model, call)
    contestants = [Contestant("diffusers", lambda: pipeline.generate(prompt))]
    for entry in wanted:
        folder, plan = study.engine(model, entry)
        contestants.append(Contestant(str(entry), _picture(folder, plan, study.bench.target, threads, prompt)))
    with torch_threads(threads):
        found = interleave(contestants, rounds)
    whole = found["diffusers"]
    said = {"threads": threads, "rounds": rounds, "timed": datetime.date.today().isoformat(), "evidence": ran()}
    return {
        entry: {
            **said,
            "ms": found[str(entry)].median,
            "ms_quartiles": list(found[str(entry)].quartiles),
            "original_ms": whole.median,
            "original_ms_quartiles": list(whole.quartiles),
            "ratio": whole.median / found[str(entry)].median,
        }
        for entry in wanted
    }


def _picture(folder: Path, plan: StepPlan, target: str, threads: int, prompt: str) -> Callable[[], object]:
    runtime = Engine.open(folder, target, threads).runtime.altered(plan=plan)
    return lambda: runtime.generate([prompt], [FIRST_SEED], SIDE, SIDE)


def main(words: Sequence[str] | None = None) -> None:
    """Time the measured students and the teacher in 8 bits, and write the report anew; the machine must be quiet."""
    parser = argparse.ArgumentParser(prog="python -m recipes.benchmarks.distillation.speed", description=__doc__)
    parser.add_argument("--models", nargs="+", choices=list(SAMPLERS), default=list(SAMPLERS))
    parser.add_argument("--samples", type=int, default=512, help="as the entries were measured with")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    parser.add_argument("--target", default=caching_tables.TARGET, choices=[caching_tables.TARGET, "onnxruntime-cpu"])
    parser.add_argument("--build", type=Path, default=BUILD, help="what is kept on the way")
    parser.add_argument("--results", type=Path, default=caching_tables.RESULTS, help="the dated reports")
    told = parser.parse_args(words)
    study = Study(Bench.of(Kept(told.build), told.target, told.models, told.samples, told.threads), told.build)
    for model in told.models:
        rows = {entry: row for entry in entries(model) if (row := study.row(model, entry)) and "refused" not in row}
        wanted = [entry for entry in (*students(), *quantized(model)) if entry in rows]
        for entry, row in timed(study, model, wanted, told.threads, told.rounds).items():
            write(study.file("results", model, entry, ".json"), encoded(rows[entry] | {"time": row}))
            print(f"{model} {entry}: {row['ms']:.1f} ms, {row['original_ms']:.0f} ms, {row['ratio']:.1f}x", flush=True)
        aggregate(told.results, [row for entry in entries(model) if (row := study.row(model, entry))])


if __name__ == "__main__":
    main()
