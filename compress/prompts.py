"""Reads prompt files: plain text, one prompt a line, or JSON lines with the attributes a scorer should find."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from compress.errors import RefusedError


@dataclass(frozen=True)
class Prompt:
    """One prompt, and the attributes a picture of it has: scorer head -> class name."""

    text: str
    attributes: Mapping[str, str] = field(default_factory=dict)


def read_prompts(path: Path, count: int) -> list[Prompt]:
    """Read the first `count` prompts of a .txt or .jsonl file.

    Args:
        path: text: one prompt a line, empty lines skipped; JSON lines: `{"prompt": str, "attributes": {head: class}}`.
        count: how many are wanted.

    Raises:
        RefusedError: the file cannot be read, a line is wrong, or there are fewer prompts.
    """
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise RefusedError(f"the prompts {path} cannot be read: {error}") from error
    parse = _row if path.suffix == ".jsonl" else _line
    prompts = [parse(path, number, line) for number, line in enumerate(lines, start=1) if line.strip()]
    if len(prompts) < count:
        raise RefusedError(f"{path} holds {len(prompts)} prompts, but {count} samples were asked for: add prompts")
    return prompts[:count]


def check_disjoint(calibration: list[Prompt], evaluation: list[Prompt]) -> None:
    """Refuse an evaluation on what the passes were calibrated with.

    Raises:
        RefusedError: a prompt is in both lists.
    """
    both = sorted({prompt.text for prompt in calibration} & {prompt.text for prompt in evaluation})
    if both:
        raise RefusedError(
            f"{len(both)} of the calibration prompts are evaluated too ({both[0]!r}), so quality would be measured on "
            "what was calibrated: use disjoint prompt files"
        )


def _line(path: Path, number: int, line: str) -> Prompt:
    return Prompt(line.strip())


def _row(path: Path, number: int, line: str) -> Prompt:
    try:
        row: Any = json.loads(line)
    except ValueError as error:
        raise RefusedError(f"{path}:{number}: is not JSON: {error}") from error
    if not isinstance(row, dict) or not isinstance(row.get("prompt"), str):
        raise RefusedError(f'{path}:{number}: is not {{"prompt": text, "attributes": {{head: class}}}}')
    attributes = row.get("attributes", {})
    named = isinstance(attributes, dict) and all(isinstance(name, str) for pair in attributes.items() for name in pair)
    if not named:
        raise RefusedError(f"{path}:{number}: attributes must map scorer heads to class names")
    return Prompt(row["prompt"], attributes)
