"""Writes what the quantization ladder has measured so far: a dated JSON and a Markdown table."""

from __future__ import annotations

import argparse
import datetime
import json
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from recipes.benchmarks import caching_tables
from recipes.benchmarks.caching.presets import SAMPLERS
from recipes.benchmarks.caching.results import encoded, write
from recipes.benchmarks.quantization.entries import METHODS, tasks
from recipes.benchmarks.quantization.ladder import BUILD, STEPS

HEAD = (
    "| scheme | method | size | latent PSNR, dB (95 %) | image PSNR, dB | Frechet (95 %) | attributes, % | "
    "change, points (95 %) | seeds |\n| --- | --- | --- | --- | --- | --- | --- | --- | --- |"
)


def rows_of(folder: Path) -> list[dict[str, Any]]:
    """Every kept result, in the order of the rungs."""
    order = {str(entry): at for at, (_, entry) in enumerate(tasks([0], together=False))}
    found = [json.loads(file.read_bytes()) for file in sorted(folder.rglob("*.json"))]
    return sorted(found, key=lambda row: (row["model"], order.get(_name(row), len(order)), _name(row), row["seed"]))


def document(rows: Iterable[Mapping[str, Any]]) -> str:
    """The tables, one for each model; where there are several seeds of calibration, the mean and the spread."""
    grouped: dict[str, dict[str, list[Mapping[str, Any]]]] = {name: defaultdict(list) for name in SAMPLERS}
    where, samples = set(), set()
    for row in rows:
        grouped[row["model"]][_name(row)].append(row)
        where.add(row["computed"])
        samples.add(row["samples"])
    lines = [
        "# Number formats and methods of quantization",
        "",
        f"The denoisers of the reference models, alone, {STEPS} steps, simulated: rounding is computed in float32 by "
        f"{', '.join(sorted(where))}, so there are no times here. Quality is that of "
        f"{', '.join(map(str, sorted(samples)))} held-out prompts against the float model from the same noise. "
        "The layers that read the timestep store their weights in int8 and the first and last layers stay in float, "
        "whatever the scheme. Methods: "
        + "; ".join(f"{name}: `{json.dumps(fields)}`" for name, fields in METHODS.items())
        + ".",
    ]
    for model, groups in grouped.items():
        if groups:
            lines += ["", f"## {model}", "", HEAD, *(_line(group) for group in groups.values())]
    return "\n".join(lines) + "\n"


def _name(row: Mapping[str, Any]) -> str:
    return f"{row['scheme']}, {row['method']}"


def _line(group: Sequence[Mapping[str, Any]]) -> str:
    row = group[0]
    if "refused" in row:
        return f"| {row['scheme']} | {row['method']} | {row['refused']} | | | | | | |"
    latents = [one["latent_psnr_db"]["value"] for one in group]
    spread = f"{min(latents):.1f} to {max(latents):.1f}" if len(group) > 1 else ""
    cells = [
        row["scheme"],
        row["method"],
        f"{row['bytes'] / row['float_bytes']:.3f}",
        _interval(row["latent_psnr_db"]),
        f"{row['image_psnr_db']['value']:.1f}",
        _interval(row["frechet"]) if "frechet" in row else "-",
        f"{100 * row['attributes']['value']:.2f}",
        _interval(row["change_points"], "+.2f"),
        f"{len(group)}" + (f": {spread} dB" if spread else ""),
    ]
    return f"| {' | '.join(cells)} |"


def _interval(estimate: Mapping[str, Any], form: str = ".2f") -> str:
    low_high = estimate.get("interval")
    value = f"{estimate['value']:{form}}"
    return value if low_high is None else f"{value} ({low_high[0]:{form}} to {low_high[1]:{form}})"


def main(words: Sequence[str] | None = None) -> None:
    """Write quantization-DATE.json and quantization.md."""
    parser = argparse.ArgumentParser(prog="python -m recipes.benchmarks.quantization.report", description=__doc__)
    parser.add_argument("--build", type=Path, default=BUILD, help="what the ladder has kept")
    parser.add_argument("--results", type=Path, default=caching_tables.RESULTS, help="the dated reports")
    told = parser.parse_args(words)
    rows = rows_of(told.build / "results")
    today = datetime.date.today().isoformat()
    write(told.results / f"quantization-{today}.json", encoded({"date": today, "entries": rows}))
    write(told.results / "quantization.md", document(rows).encode())
    print(f"{len(rows)} rungs")


if __name__ == "__main__":
    main()
