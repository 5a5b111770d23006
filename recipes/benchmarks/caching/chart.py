"""Draws quality over speed: every preset as a point beside the line of fewer steps, a panel for each model."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from PIL import Image, ImageDraw, ImageFont

from recipes.benchmarks import caching_tables
from recipes.benchmarks.caching.presets import steps_of

WIDTH, HEIGHT, LEFT, TOP, BOTTOM, LEGEND = 1000, 620, 70, 50, 60, 300
INK, PALE, LINE, DOT, SEARCHED = "#222222", "#dddddd", "#777777", "#1f5fa8", "#c04a1a"
TICKS = (1.0, 1.25, 1.5, 2.0, 2.5, 3.0, 4.0, 5.0, 6.0, 8.0, 10.0, 12.0, 15.0, 20.0)


def draw(report: Mapping[str, Any], file: Path) -> bool:
    """Write a picture of the models' own samplers at most steps measured; False where there is nothing to draw."""
    panels = [(title, points) for title, rows in caching_tables.shown(report) if (points := _points(rows))]
    if not panels:
        return False
    sheet = Image.new("RGB", (WIDTH, HEIGHT * len(panels)), "white")
    for at, (title, points) in enumerate(panels):
        sheet.paste(panel(title, points), (0, at * HEIGHT))
    file.parent.mkdir(parents=True, exist_ok=True)
    sheet.save(file, optimize=True)
    return True


def _points(rows: Sequence[Mapping[str, Any]]) -> list[tuple[str, float, float]]:
    """(entry, ratio, dB) of what was measured."""
    return [(row["entry"], row["ratio"], row["latent_psnr_db"]["value"]) for row in rows if _drawable(row)]


def _drawable(row: Mapping[str, Any]) -> bool:
    return "ratio" in row and "latent_psnr_db" in row


def panel(title: str, points: Sequence[tuple[str, float, float]]) -> Image.Image:
    """One model: times faster to the right (logarithmic), decibels upwards."""
    image = Image.new("RGB", (WIDTH, HEIGHT), "white")
    pen, font, small = ImageDraw.Draw(image), ImageFont.load_default(15), ImageFont.load_default(13)
    right = WIDTH - LEGEND
    fastest = max(1.3, *(ratio for _, ratio, _ in points))
    low = 5 * math.floor(min(db for *_, db in points) / 5)
    high = max(low + 5, 5 * math.ceil(max(db for *_, db in points) / 5))

    def at(ratio: float, db: float) -> tuple[float, float]:
        x = LEFT + (right - LEFT) * math.log(max(ratio, 0.9) / 0.9) / math.log(1.05 * fastest / 0.9)
        return x, HEIGHT - BOTTOM - (HEIGHT - BOTTOM - TOP) * (db - low) / (high - low)

    pen.text((LEFT, 14), title, INK, font)
    for mark in range(low, high + 1, 5):
        pen.line([at(0.9, mark), at(1.05 * fastest, mark)], PALE)
        pen.text((LEFT - 8, at(1, mark)[1]), f"{mark}", INK, small, anchor="rm")
    for tick in (tick for tick in TICKS if tick <= fastest):
        pen.line([at(tick, low), at(tick, high)], PALE)
        pen.text((at(tick, low)[0], HEIGHT - BOTTOM + 8), f"{tick:g}x", INK, small, anchor="mt")
    pen.text(
        ((LEFT + right) / 2, HEIGHT - 26), "denoising loop, times faster than the full run", INK, small, anchor="mt"
    )
    pen.text((8, TOP - 14), "latent PSNR, dB", INK, small, anchor="lm")
    fewer = sorted((ratio, db, entry) for entry, ratio, db in points if steps_of(entry) is not None)
    pen.line([at(ratio, db) for ratio, db, _ in fewer], LINE, 2)
    for ratio, db, entry in fewer:
        x, y = at(ratio, db)
        pen.ellipse([x - 3, y - 3, x + 3, y + 3], LINE)
        pen.text((x, y + 6), f"{steps_of(entry)}", LINE, small, anchor="mt")
    pen.text((right + 16, TOP), "grey: fewer steps (their number)", LINE, small, anchor="lm")
    others = [(ratio, db, entry) for entry, ratio, db in points if steps_of(entry) is None]
    for number, (ratio, db, entry) in enumerate(sorted(others), start=1):
        x, y = at(ratio, db)
        colour = SEARCHED if entry.startswith("optimised") else DOT
        pen.ellipse([x - 4, y - 4, x + 4, y + 4], colour)
        pen.text((x + 6, y - 6), f"{number}", colour, small, anchor="lb")
        pen.text((right + 16, TOP + 24 * number), f"{number}  {entry}, {ratio:.1f}x, {db:.1f} dB", colour, small, "lm")
    return image
