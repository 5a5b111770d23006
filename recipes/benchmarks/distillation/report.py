"""What the distillation benchmark has found, as a dated JSON and a Markdown document."""

from __future__ import annotations

import datetime
import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from compress.measure.environment import environment
from recipes.benchmarks import tables
from recipes.benchmarks.caching.presets import SAMPLERS
from recipes.benchmarks.caching.results import Row, encoded, write
from recipes.benchmarks.distillation.entries import FULL_STEPS, SWEPT, Entry, full, quantized, students, sweep, teachers
from recipes.benchmarks.distillation.students import CHAIN, TEACHER_STEPS

HEADS = (
    "calls",
    "evaluations",
    "attributes right, % (95 %)",
    "change, points (95 %)",
    "Frechet to renders (95 %)",
    "times the teacher's",
    "Frechet to the teacher (95 %)",
    "latent PSNR, dB (95 %)",
    "diversity (95 %)",
    "of the teacher's",
    "ms, prompt to picture",
    "times faster than diffusers",
)
_NOTHING = "-"


def merged(older: Mapping[str, Any] | None, rows: Iterable[Row]) -> list[Row]:
    """The rows of an older report, those measured anew replaced; fewer samples do not replace more."""
    found = {(row["model"], row["entry"]): row for row in (older or {}).get("entries", [])}
    for row in rows:
        name = row["model"], row["entry"]
        if row["samples"] >= found.get(name, row)["samples"]:
            found[name] = row
    return [found[name] for name in sorted(found)]


def newest(folder: Path) -> Row | None:
    """The latest of the dated reports, if there is one."""
    dated = sorted(folder.glob("distillation-????-??-??.json"))
    return json.loads(dated[-1].read_bytes()) if dated else None


def aggregate(folder: Path, rows: Sequence[Row]) -> Row:
    """Merge results with the newest report, and write distillation-DATE.json and distillation.md."""
    today = datetime.date.today().isoformat()
    report = {"date": today, "environment": environment(), "entries": merged(newest(folder), rows)}
    write(folder / f"distillation-{today}.json", encoded(report))
    write(folder / "distillation.md", document(report).encode())
    return report


def document(report: Mapping[str, Any]) -> str:
    """All tables."""
    lines = [
        "# Students of few steps",
        "",
        "Students of the reference models, beside their teacher. Each is taught by the one before, the first by the "
        f"model with {TEACHER_STEPS} guided steps: {_chain()}. Pictures are those of held-out prompts, made by engines "
        "from the same noise in every row, in float32 but where a format is named. A call of a guided sampler is two "
        f"evaluations of the denoiser. The first row is the teacher with {FULL_STEPS} guided steps; change, Frechet "
        "distance to the teacher, and latent PSNR compare with its pictures. Frechet distance to renders compares the "
        "recogniser's features with those of a drawn scene of every prompt. Frechet distances are to be compared at "
        "equal samples only. Diversity is the mean distance between the recogniser's features of four pictures of one "
        "prompt; faults of pictures add to it. Times are of one picture; the diffusers pipeline makes "
        f"{FULL_STEPS} guided steps in float32.",
    ]
    for model in SAMPLERS:
        rows = {row["entry"]: row for row in report["entries"] if row["model"] == model}
        if not rows:
            continue
        lines += ["", f"## {model}", "", _about(rows.values()), "", f"![samples](distillation-{model}.png)", ""]
        lines += [_table("pictures by", rows, [full(model), *students(), *teachers(model), *quantized(model)], model)]
        for steps in SWEPT:
            swept = [entry for entry in sweep(model) if entry.steps == steps and str(entry) in rows]
            if swept:
                lines += ["", f"Guidance scales, the teacher's own sampler, {steps} steps:", ""]
                lines += [_table("scale", rows, swept, model, scale=True)]
    return "\n".join(lines) + "\n"


def _chain() -> str:
    return "; ".join(f"{name}: `{json.dumps(fields)}`" for name, fields in CHAIN.items())


def _about(rows: Iterable[Row]) -> str:
    """Samples, processors, dates, and what training took."""
    found = list(rows)
    samples = ", ".join(map(str, sorted({row["samples"] for row in found})))
    ran = sorted({f"{row['processor']}, {row['target']}, {row['date']}" for row in found})
    last = max((row for row in found if "lessons" in row), key=lambda row: len(row["lessons"]), default=None)
    said = f"{samples} samples; `ran` ({'; '.join(ran)})."
    if last is None:
        return said
    each = ", ".join(f"{one['trained']}: {one['updates']} updates, {one['seconds']:.0f} s" for one in last["lessons"])
    return f"{said} Training, by the clock and whatever else the machine did, without the teacher's runs: {each}."


def _table(title: str, rows: Mapping[str, Row], wanted: Sequence[Entry], model: str, *, scale: bool = False) -> str:
    whole = rows.get(str(full(model)), {})
    lines = []
    for entry in wanted:
        row = rows.get(str(entry))
        if row is not None:
            name = f"{entry.guidance:g}" if scale else str(entry)
            lines.append([name, *(_cells(row, whole) if "refused" not in row else [_NOTHING] * len(HEADS))])
    return tables.table([title, *HEADS], lines)


def _cells(row: Row, whole: Row) -> list[str]:
    return [
        str(row["steps"]),
        str(row["evaluations"]),
        _value(row, "attributes", ".2f", 100.0),
        _value(row, "change_points", "+.2f"),
        _value(row, "frechet_renders", ".2f"),
        _ratio(row, whole, "frechet_renders"),
        _value(row, "frechet_teacher", ".2f"),
        _value(row, "latent_psnr_db", ".1f"),
        _value(row, "diversity", ".2f"),
        _ratio(row, whole, "diversity"),
        f"{row['time']['ms']:.1f}" if "time" in row else _NOTHING,
        f"{row['time']['ratio']:.1f}" if "time" in row else _NOTHING,
    ]


def _value(row: Row, name: str, form: str, factor: float = 1.0) -> str:
    """A number with its interval; `-` where it was not measured."""
    if name not in row:
        return _NOTHING
    value, interval = row[name]["value"], row[name]["interval"]
    text = f"{factor * value:{form}}"
    if interval is None:
        return text
    low, high = (f"{factor * bound:{form}}" for bound in interval)
    return f"{text} ({low} to {high})"


def _ratio(row: Row, whole: Row, name: str) -> str:
    if name not in row or name not in whole or not whole[name]["value"]:
        return _NOTHING
    return f"{row[name]['value'] / whole[name]['value']:.2f}"
