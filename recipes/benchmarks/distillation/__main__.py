"""Measures the students of the reference models beside their teacher, and writes tables and sheets of pictures."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from recipes.benchmarks import caching_tables
from recipes.benchmarks.caching.bench import Bench
from recipes.benchmarks.caching.presets import SAMPLERS
from recipes.benchmarks.caching.results import Kept
from recipes.benchmarks.distillation.entries import Entry, entries
from recipes.benchmarks.distillation.measure import Study, do
from recipes.benchmarks.distillation.report import aggregate
from recipes.benchmarks.distillation.sheet import sheet, shown
from recipes.benchmarks.distillation.students import BUILD


def main(words: Sequence[str] | None = None) -> None:
    """Measure what is not measured yet, then write distillation-DATE.json, distillation.md and a sheet a model."""
    parser = argparse.ArgumentParser(prog="python -m recipes.benchmarks.distillation", description=__doc__)
    parser.add_argument("--models", nargs="+", choices=list(SAMPLERS), default=list(SAMPLERS))
    parser.add_argument("--samples", type=int, default=512, help="held-out prompts, at least 32")
    parser.add_argument("--steps", nargs="+", type=int, default=None, help="of the teacher's rows; all are the default")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--target", default=caching_tables.TARGET, choices=[caching_tables.TARGET, "onnxruntime-cpu"])
    parser.add_argument("--build", type=Path, default=BUILD, help="what is kept on the way")
    parser.add_argument("--results", type=Path, default=caching_tables.RESULTS, help="the dated reports")
    told = parser.parse_args(words)
    bench = Bench.of(Kept(told.build), told.target, told.models, told.samples, told.threads)
    study = Study(bench, told.build)
    absent = []
    for model in told.models:
        absent += do(study, model, _wanted(model, told.steps))
    found = [row for model in told.models for entry in entries(model) if (row := study.row(model, entry))]
    report = aggregate(told.results, found)
    for model in told.models:
        drawn = [entry for entry in shown(model) if "refused" not in (study.row(model, entry) or {"refused": ""})]
        lines = {entry: study.array(model, entry, "pictures") for entry in drawn}
        sheet(lines).save(told.results / f"distillation-{model}.png", optimize=True)
    print(f"{len(report['entries'])} rows")
    if absent:
        raise SystemExit(f"not measured: {', '.join(absent)}")


def _wanted(model: str, steps: Sequence[int] | None) -> list[Entry]:
    """The full run and the students always; of the teacher, what was asked for."""
    first, *rest = entries(model)
    return [first, *(entry for entry in rest if entry.student or steps is None or entry.steps in steps)]


if __name__ == "__main__":
    main()
