"""The report as one HTML file that needs nothing else: pictures inside, no script, no address outside."""

from __future__ import annotations

import base64
import io
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from compress.report import plots
from compress.report.report import (
    LABELS,
    Baseline,
    Latency,
    Report,
    Row,
    Size,
    shown,
    shown_gate,
    shown_interval,
    signed,
)

DIFFERENCE_GAIN = 4
"""Differences between pictures are drawn this many times stronger."""

MAX_SIDE = 320
"""Larger pictures are made this small before they go into the report."""

_LOSSLESS_SIDE = 128
_HEAT = np.array([(8, 6, 20), (70, 16, 96), (150, 40, 100), (222, 84, 64), (250, 166, 42), (252, 250, 180)], float)
_CSS = {"original": "original", "engine": "engine", "plain runtime": "plain", "fewer steps": "fewer"}


@dataclass(frozen=True)
class Pictures:
    """Pictures of every stage from the same prompts and seeds.

    Attributes:
        prompts: of the rows.
        seeds: of the rows.
        stages: column title -> uint8 (n, height, width, 3); the first is the one the others are compared with.
    """

    prompts: Sequence[str]
    seeds: Sequence[int]
    stages: Mapping[str, np.ndarray]


def render(report: Report, pictures: Pictures | None = None) -> str:
    """Write the report as a self-contained HTML page, light or dark as the reader's system is."""
    from jinja2 import Environment, StrictUndefined

    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    environment.filters |= {"shown": lambda value, metric: shown(metric, value), "upper_first": _upper_first}
    template = environment.from_string((Path(__file__).parent / "report.html.jinja").read_text(encoding="utf-8"))
    headline, _, gates = report.verdict.headline.rpartition(": ")
    return template.render(
        report=report,
        headline=headline,
        gates=gates,
        tiles=_tiles(report),
        table=_table(report),
        pictures=_pictures(pictures),
        gain=DIFFERENCE_GAIN,
        latency=_latency(report.latency),
        sizes=_sizes(report.sizes),
        tradeoffs=_tradeoffs(report),
        baselines=_baselines(report),
        curves=_curves(report),
        strip=_strip(report),
        labels=LABELS,
        recipe=json.dumps(report.recipe, indent=2, ensure_ascii=False),
    )


def _upper_first(text: str) -> str:
    return text[:1].upper() + text[1:]


def _tiles(report: Report) -> list[dict[str, str]]:
    """Choose the few numbers to read first."""
    tiles = []
    psnr = "image_psnr_db" if report.row("image_psnr_db") else "latent_psnr_db"
    for metric in ("latency_ms", "size_mib", "attribute_accuracy", psnr, "peak_rss_mib"):
        row = report.row(metric)
        if row is None or row.engine is None:
            continue
        label, engine = LABELS[metric], row.engine
        journey = f"{shown(row.metric, row.original)} → {shown(row.metric, engine)} {row.unit}" if row.original else ""
        interval = shown_interval(row.metric, row.interval.get(report.target))
        if row.metric == "latency_ms" and row.original:
            big = f"{row.original / engine:.2g}×" if row.original >= engine else f"1/{engine / row.original:.2g}"
            tiles.append({"label": "speed", "big": big, "small": journey})
        elif row.metric == "size_mib" and row.original:
            tiles.append({"label": label, "big": f"{100 * engine / row.original:.0f} %", "small": journey})
        elif row.metric == "attribute_accuracy":
            tiles.append({"label": label, "big": shown(row.metric, engine), "small": journey})
        elif row.metric == "peak_rss_mib" and row.original:
            tiles.append({"label": label, "big": f"{100 * engine / row.original:.0f} %", "small": journey})
        elif row.metric == psnr:
            tiles.append({"label": label, "big": f"{shown(row.metric, engine)} dB", "small": f"95 %: {interval}"})
    return tiles[:4]


def _table(report: Report) -> dict[str, Any]:
    """Lay rows and columns out; the columns that no metric fills are left away."""
    passes = list(dict.fromkeys(name for row in report.rows for name in row.per_pass))
    targets = list(dict.fromkeys([report.target, *(name for row in report.rows for name in row.targets)]))
    columns: list[tuple[str, str]] = [("original", "original")]
    columns += [(name, f"after {name}") for name in passes]
    columns += [("compressed", "compressed"), ("exported", "exported"), *((name, name) for name in targets)]
    values = {row.metric: _columns(row) for row in report.rows}
    if passes and all(found.get("compressed") in (None, found.get(passes[-1])) for found in values.values()):
        columns.remove(("compressed", "compressed"))  # what the last pass left is the compressed model
    used = [column for column in columns if any(column[0] in found for found in values.values())]
    table = []
    for row in report.rows:
        cells = []
        for key, _ in used:
            samples = f"n = {row.samples[key]}" if key in row.samples else ""
            interval = shown_interval(row.metric, row.interval.get(key))
            cells.append({"value": shown(row.metric, values[row.metric].get(key)), "interval": interval, "n": samples})
        change = ""
        if row.change is not None and row.change_interval is not None:
            scale, unit = (100, " points") if row.metric == "attribute_accuracy" else (1, f" {row.unit}".rstrip())
            low, high = (signed(scale * bound, 2) for bound in row.change_interval)
            change = f"change {signed(scale * row.change, 2)}{unit}, 95 %: {low} to {high}"
        gates = [{"text": shown_gate(row.metric, gate), "ok": gate.ok, "target": gate.target} for gate in row.gate]
        table.append({"row": row, "label": LABELS[row.metric], "cells": cells, "gates": gates, "change": change})
    heads = [{"title": title, "evidence": report.evidence.get(key, "").partition(" (")[0]} for key, title in used]
    return {"heads": heads, "rows": table}


def _columns(row: Row) -> dict[str, float]:
    named = {"original": row.original, "compressed": row.compressed, "exported": row.exported}
    return {key: value for key, value in named.items() if value is not None} | row.per_pass | row.targets


def _pictures(pictures: Pictures | None) -> dict[str, Any] | None:
    if pictures is None or not pictures.stages:
        return None
    names = list(pictures.stages)
    reference = pictures.stages[names[0]]
    rows = []
    for i, (prompt, seed) in enumerate(zip(pictures.prompts, pictures.seeds, strict=True)):
        cells = [{"uri": data_uri(pictures.stages[name][i]), "title": name} for name in names]
        for name in names[1:]:
            cells.append(
                {"uri": data_uri(difference_map(reference[i], pictures.stages[name][i])), "title": f"Δ {name}"}
            )
        rows.append({"prompt": str(prompt), "seed": seed, "cells": cells})
    height, width = reference.shape[1:3]
    heads = [*names, *(f"Δ {name}" for name in names[1:])]
    small = max(height, width) <= _LOSSLESS_SIDE
    return {"heads": heads, "rows": rows, "stages": len(names), "small": small, "size": f"{width} × {height}"}


def difference_map(reference: np.ndarray, image: np.ndarray) -> np.ndarray:
    """Draw |image - reference| of one uint8 (h, w, 3) picture, averaged over colours and amplified, as heat."""
    error = np.abs(reference.astype(float) - image.astype(float)).mean(axis=2) * (DIFFERENCE_GAIN / 255)
    places = np.linspace(0.0, 1.0, len(_HEAT))
    channels = [np.interp(np.clip(error, 0.0, 1.0), places, _HEAT[:, channel]) for channel in range(3)]
    return np.stack(channels, axis=2).round().astype(np.uint8)


def data_uri(image: np.ndarray) -> str:
    """Encode a uint8 (h, w, 3) picture: PNG where it is small, else at most `MAX_SIDE` wide as JPEG."""
    from PIL import Image

    picture, buffer = Image.fromarray(np.ascontiguousarray(image)), io.BytesIO()
    if max(picture.size) <= _LOSSLESS_SIDE:
        picture.save(buffer, "PNG", optimize=True)
        kind = "png"
    else:
        picture.thumbnail((MAX_SIDE, MAX_SIDE), Image.Resampling.LANCZOS)
        picture.save(buffer, "JPEG", quality=92)
        kind = "jpeg"
    return f"data:image/{kind};base64,{base64.b64encode(buffer.getvalue()).decode()}"


def _latency(rows: Sequence[Latency]) -> list[dict[str, Any]]:
    """One bar chart per thread count, slowest first."""
    charts = []
    for threads in sorted({row.threads for row in rows}):
        mine = sorted((row for row in rows if row.threads == threads), key=lambda row: -row.median)
        longest = max(row.quartiles[1] for row in mine)
        original = next((row.median for row in mine if row.role == "original"), None)
        charts.append(
            {
                "threads": threads,
                "bars": [
                    {
                        "name": row.name,
                        "detail": f"{row.steps} steps" if f"{row.steps} steps" not in row.name else "",
                        "css": _CSS[row.role],
                        "width": 100 * row.median / longest,
                        "low": 100 * row.quartiles[0] / longest,
                        "high": 100 * row.quartiles[1] / longest,
                        "value": f"{shown('latency_ms', row.median)} ms",
                        "ratio": f"{original / row.median:.2g}×" if original and row.role != "original" else "",
                        "hint": f"{row.name}: median {row.median:.1f} ms, half of {row.runs} runs between "
                        f"{row.quartiles[0]:.1f} and {row.quartiles[1]:.1f} ms; {row.evidence}",
                    }
                    for row in mine
                ],
            }
        )
    return charts


def _sizes(sizes: Sequence[Size]) -> list[dict[str, Any]]:
    largest = max((size.mib for size in sizes), default=1.0)
    original = next((size.mib for size in sizes if size.role == "original"), None)
    return [
        {
            "name": size.name,
            "detail": ", ".join(f"{part} {mib:.3g}" for part, mib in size.parts.items()),
            "css": _CSS[size.role],
            "value": f"{size.mib:.2f} MiB",
            "ratio": f"{100 * size.mib / original:.0f} %" if original and size.role != "original" else "",
            "parts": [
                {"width": 100 * mib / largest, "hint": f"{size.name}, {part}: {mib:.2f} MiB", "shade": min(i, 4)}
                for i, (part, mib) in enumerate(size.parts.items())
                if mib > 0
            ],
        }
        for size in sizes
    ]


def _tradeoffs(report: Report) -> list[dict[str, str]]:
    """Draw quality over latency on the fewest threads, once per quality metric that at least two contestants have."""
    result: list[dict[str, str]] = []
    threads = min((baseline.threads for baseline in report.baselines), default=1)
    contestants = [baseline for baseline in report.baselines if baseline.threads == threads]
    for metric in ("attribute_accuracy", "image_psnr_db", "latent_psnr_db"):
        points = [
            plots.Point(
                baseline.name,
                baseline.latency_ms,
                baseline.quality[metric],
                _CSS[baseline.role],
                hollow=baseline.role == "fewer steps",
                interval=baseline.interval.get(metric),
            )
            for baseline in contestants
            if metric in baseline.quality
        ]
        if len(points) >= 2 and len(result) < 2:
            label = LABELS[metric]
            unit = "" if metric == "attribute_accuracy" else " (dB)"
            x_label = f"ms a picture, {threads} thread{'s' if threads > 1 else ''}"
            times = [baseline.latency_ms for baseline in contestants]
            percent = metric == "attribute_accuracy"
            svg = plots.scatter(points, x_label, label + unit, times, percent, f"{label} over latency")
            result.append({"title": f"{_upper_first(label)} against time", "svg": svg})
    return result


def _baselines(report: Report) -> dict[str, Any]:
    metrics = [m for m in LABELS if any(m in baseline.quality for baseline in report.baselines)]

    def cells(baseline: Baseline) -> list[dict[str, str]]:
        return [
            {
                "value": shown(metric, baseline.quality.get(metric)),
                "interval": shown_interval(metric, baseline.interval.get(metric)),
            }
            for metric in metrics
        ]

    rows = [{"it": baseline, "css": _CSS[baseline.role], "cells": cells(baseline)} for baseline in report.baselines]
    return {"heads": [LABELS[metric] for metric in metrics], "rows": rows}


def _curves(report: Report) -> list[dict[str, str]]:
    """Draw the errors by network call: free runs, and one step at a time."""
    css = {"compressed": "compressed", "exported": "exported"}

    def draw(values: Mapping[str, Sequence[float]], y_label: str, title: str) -> dict[str, str] | None:
        drawn = [
            plots.Line(stage, range(1, len(y) + 1), [max(v, 1e-7) for v in y], css.get(stage, "engine"), stage in css)
            for stage, y in values.items()
            if len(y) > 1
        ]
        return {"title": title, "svg": plots.lines(drawn, "network call", y_label, "log", title)} if drawn else None

    free = draw(
        {curve.stage: curve.relative_l2 for curve in report.curves},
        "relative error of the latents",
        "Error after each call, every run left to itself",
    )
    forced = draw(
        {curve.stage: curve.one_step for curve in report.curves},
        "relative error of the network output",
        "Error of one call, given the original's latents",
    )
    return [plot for plot in (free, forced) if plot is not None]


def _strip(report: Report) -> dict[str, Any]:
    """Lay the step plan out as cells; a path is drawn as high as it has segments."""
    longest = max(len(segments) for segments in report.plan.paths.values())
    cells = []
    for k, row in enumerate(report.plan.rows):
        reads = "".join(
            f"; reads {slot} x ({', '.join(f'{alpha:g}' for alpha in alphas)})" for slot, alphas in row.reads.items()
        )
        writes = f"; writes {', '.join(row.writes)}" if row.writes else ""
        guidance = "guided" if row.guidance != "none" else "no guidance"
        share = len(report.plan.paths[row.path]) / longest
        cells.append(
            {
                "number": k + 1,
                "height": round(100 * share),
                "full": share == 1.0,
                "hint": f"call {k + 1}, t = {row.t:g}: {row.path} path, {guidance}{reads}{writes}",
                "forecast": any(len(alphas) > 1 for alphas in row.reads.values()),
                "unguided": row.guidance == "none",
            }
        )
    counts = {name: sum(row.path == name for row in report.plan.rows) for name in report.plan.paths}
    return {"cells": cells, "counts": {name: count for name, count in counts.items() if count}}
