"""Draws the sheet of the distillation benchmark: what students and teacher make of the same prompts and noise."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from recipes.benchmarks.caching.bench import GUIDANCE
from recipes.benchmarks.distillation.entries import Entry, full, students
from recipes.benchmarks.distillation.students import TEACHER_STEPS

LABEL, GAP = 250, 4
INK = "#222222"


def shown(model: str) -> list[Entry]:
    """The lines of a model: the teacher, then student and teacher in turn at equal calls."""
    own = full(model).sampler
    lines = [full(model)]
    for student in students():
        if student.steps != TEACHER_STEPS:
            lines += [student, Entry(student.steps, GUIDANCE, own), Entry(student.steps, 1.0, own)]
    return lines


def sheet(lines: Mapping[Entry, np.ndarray]) -> Image.Image:
    """One line an entry, on white.

    Args:
        lines: entry -> uint8 (n, height, width, 3); at least one.
    """
    count, height, width = next(iter(lines.values())).shape[:3]
    image = Image.new("RGB", (LABEL + count * (width + GAP), len(lines) * (height + GAP)), "white")
    pen, font = ImageDraw.Draw(image), ImageFont.load_default(13)
    for row, (entry, pictures) in enumerate(lines.items()):
        top = row * (height + GAP)
        pen.text((GAP, top + height // 2), short(entry), INK, font, anchor="lm")
        for at, picture in enumerate(pictures):
            image.paste(Image.fromarray(picture), (LABEL + at * (width + GAP), top))
    return image


def short(entry: Entry) -> str:
    """What stands before a line."""
    calls = f"{entry.steps} step{'s' if entry.steps > 1 else ''}"
    if entry.student:
        return f"student, {calls}"
    guided = f"guidance {entry.guidance:g}" if entry.guidance > 1.0 else "no guidance"
    return f"teacher, {calls}, {guided}"
