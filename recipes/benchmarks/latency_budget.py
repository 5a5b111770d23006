"""What `prune: {latency_ratio: R}` predicts and what is then measured, target by target."""

from __future__ import annotations

import argparse
import dataclasses
import datetime
import json
from pathlib import Path

from compress import compiler
from compress.measure.environment import environment, ran
from compress.passes.prune import Prune
from compress.recipe.schema import Recipe
from recipes.benchmarks.recovery import told


def main() -> None:
    """Prune to a budget of time on each CPU target of a recipe; importance by magnitude, nothing is trained."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("recipe", type=Path, help="its model, sampler, shapes and targets are taken")
    parser.add_argument("--ratio", type=float, default=0.7)
    parser.add_argument("--work", type=Path, required=True, help="keeps what is done")
    parser.add_argument("--out", type=Path, required=True)
    given = parser.parse_args()
    made = compiler.opened(Recipe.load(given.recipe), progress=told(), work_dir=given.work)
    step = Prune(latency_ratio=given.ratio, importance="magnitude")
    rows = []
    for row in made.targets:
        model, context = made.original.clone(), dataclasses.replace(made.context, targets=[row])
        edits = step.plan(model, [row])
        step.apply(model, edits, context)
        step.check(model, edits)
        rows.append(model.provenance[-1])
        print(json.dumps(rows[-1]), flush=True)
    found = {
        "date": datetime.date.today().isoformat(),
        "evidence": ran(),
        "environment": environment(),
        "model": made.original.index["_class_name"],
        "latency_ratio": given.ratio,
        "rows": rows,
    }
    given.out.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
