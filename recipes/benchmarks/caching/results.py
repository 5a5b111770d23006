"""What the caching benchmark keeps: one file an entry, and dated reports that go on where older ones ended."""

from __future__ import annotations

import datetime
import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from compress.measure.environment import environment
from recipes.benchmarks import caching_tables
from recipes.benchmarks.caching.presets import PRESETS, SAMPLERS, Run, budget_of, steps_of

Row = dict[str, Any]


@dataclass(frozen=True)
class Kept:
    """A folder of results, plans and arrays: <kind>/<model>/<sampler>/<steps>/<entry><suffix>."""

    root: Path

    def file(self, run: Run, kind: str, entry: str, suffix: str) -> Path:
        """Where something of an entry is kept."""
        return self.root / kind / run.model / run.sampler / str(run.steps) / f"{entry}{suffix}"

    def row(self, run: Run, entry: str) -> Row | None:
        """The result of an entry, if it is there."""
        file = self.file(run, "results", entry, ".json")
        return json.loads(file.read_bytes()) if file.exists() else None

    def rows(self, run: Run) -> list[Row]:
        """All results of a run."""
        folder = self.file(run, "results", "x", "").parent
        return [json.loads(file.read_bytes()) for file in sorted(folder.glob("*.json"))]

    def put(self, run: Run, row: Mapping[str, Any]) -> None:
        """Keep a result."""
        write(self.file(run, "results", row["entry"], ".json"), encoded(row))

    def array(self, run: Run, kind: str, entry: str = "full") -> np.ndarray:
        """An array of an entry."""
        return np.load(self.file(run, kind, entry, ".npy"), allow_pickle=False)

    def put_array(self, run: Run, kind: str, entry: str, array: np.ndarray) -> None:
        """Keep an array, which appears whole or not at all."""
        file = self.file(run, kind, entry, ".npy")
        file.parent.mkdir(parents=True, exist_ok=True)
        making = file.with_name(f".{os.getpid()}.{file.name}")
        np.save(making, array)
        making.replace(file)

    def restore(self, run: Run, target: str, report: Mapping[str, Any] | None) -> None:
        """Take the results of an older report for which there is no file, so that a later day need not start over."""
        for row in (report or {}).get("entries", []):
            if identity(row) != (run.model, run.sampler, run.steps, row["entry"], target) or "inputs" not in row:
                continue
            if not self.file(run, "results", row["entry"], ".json").exists():
                self.put(run, row)


def encoded(row: Mapping[str, Any]) -> bytes:
    """Plain data as a JSON file."""
    return (json.dumps(row, indent=1) + "\n").encode()


def write(file: Path, data: bytes) -> None:
    """Write a file that appears whole or not at all."""
    file.parent.mkdir(parents=True, exist_ok=True)
    making = file.with_name(f".{file.name}.{os.getpid()}")
    making.write_bytes(data)
    making.replace(file)


def key(value: Any) -> str:
    """SHA-256 of plain data, shortened."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:16]


Verdict = Literal["keep", "compare", "complete", "measure"]


def verdict(row: Mapping[str, Any] | None, inputs: str, sources: str) -> Verdict:
    """Whether a result still stands.

    Args:
        row: the result, if there is one.
        inputs: the key of all that was asked; another one means to measure.
        sources: the hash of the code; with another one the result stands if the plan is still the same; a searched
            plan, which never is, stands by the code of the search, among the inputs. A result of PyTorch stands
            once an engine completes it.
    """
    if row is None or row.get("inputs") != inputs:
        return "measure"
    if "computed" in row and "engine" not in row and "refused" not in row:
        return "complete"
    if row.get("sources") == sources or budget_of(row["entry"]) is not None:
        return "keep"
    return "measure" if "refused" in row else "compare"


def identity(row: Mapping[str, Any]) -> tuple[str, str, int, str, str]:
    """What a row is about."""
    return row["model"], row["sampler"], row["steps"], row["entry"], row.get("target", caching_tables.TARGET)


def merged(older: Mapping[str, Any] | None, rows: Sequence[Mapping[str, Any]]) -> list[Row]:
    """The entries of an older report, those measured anew replaced, in the order of the tables.

    A result of fewer samples does not replace one of more.
    """
    found = {identity(row): dict(row) for row in (older or {}).get("entries", [])}
    for row in rows:
        if row["samples"] >= found.get(identity(row), row)["samples"]:
            found[identity(row)] = dict(row)
    return sorted(found.values(), key=place)


def place(row: Mapping[str, Any]) -> tuple[Any, ...]:
    """Where a row stands: models, samplers and entries in the order of the presets, most steps first."""
    model, sampler, steps, entry, target = identity(row)
    presets = list(PRESETS[model])
    fewer, budget = steps_of(entry), budget_of(entry)
    if entry == "full":
        kind = (0, 0.0)
    elif fewer is not None:
        kind = (1, -float(fewer))
    elif budget is not None:
        kind = (4, -budget)
    else:
        kind = (2, float(presets.index(entry))) if entry in presets else (3, 0.0)
    return target, list(SAMPLERS).index(model), list(SAMPLERS[model]).index(sampler), -steps, *kind, entry


def newest(folder: Path) -> Row | None:
    """The latest of the dated reports, if there is one."""
    dated = sorted(folder.glob("caching-????-??-??.json"))
    return json.loads(dated[-1].read_bytes()) if dated else None


def aggregate(folder: Path, roots: Sequence[Path]) -> Row:
    """Merge every result with the newest report, and write caching-DATE.json, caching.md and caching.png.

    Args:
        folder: of the dated reports.
        roots: each holds `results/`.
    """
    from recipes.benchmarks.caching import chart

    files = [file for root in roots for file in sorted((root / "results").rglob("[!.]*.json"))]
    today = datetime.date.today().isoformat()
    older = newest(folder) or {}
    report = {
        **older,
        "date": today,
        "environment": environment(),
        "target": caching_tables.TARGET,
        "entries": merged(older, [json.loads(file.read_bytes()) for file in files]),
    }
    found = [json.loads(file.read_bytes()) for root in roots for file in sorted((root / "interaction").glob("*.json"))]
    both = {(row["model"], row["sampler"], row["steps"]): row for row in [*older.get("interaction", []), *found]}
    report["interaction"] = [both[name] for name in sorted(both)]
    spans = [json.loads(file.read_bytes()) for root in roots for file in sorted((root / "spans").glob("*.json"))]
    report["spans"] = spans or older.get("spans", [])
    write(folder / f"caching-{today}.json", encoded(report))
    write(folder / "caching.md", caching_tables.document(report).encode())
    chart.draw(report, folder / "caching.png")
    return report
