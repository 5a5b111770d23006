"""The committed prompt files: calibration and held-out captions with their attributes, as JSON lines."""

from __future__ import annotations

import json
from pathlib import Path

from recipes.reference.scenes import attribute_ids, caption, named_attributes

#: Split -> number of rows of prompts/<split>.jsonl.
PROMPT_FILES = {"calibration": 256, "heldout": 1024}


def prompt_rows(split: str, count: int) -> list[dict[str, object]]:
    """The first `count` distinct captions of a split: {"prompt": str, "attributes": {head: class name}}."""
    rows: dict[str, dict[str, object]] = {}
    for ids in attribute_ids(split, 0, 8 * count):
        prompt = caption(ids)
        if prompt not in rows:
            rows[prompt] = {"prompt": prompt, "attributes": named_attributes(ids)}
        if len(rows) == count:
            return list(rows.values())
    raise ValueError(f"split {split!r} has fewer than {count} distinct captions among its first {8 * count} scenes")


def write_prompts(folder: Path) -> None:
    """Write calibration.jsonl and heldout.jsonl into `folder`; the same bytes every time."""
    folder.mkdir(parents=True, exist_ok=True)
    for split, count in PROMPT_FILES.items():
        lines = [json.dumps(row) for row in prompt_rows(split, count)]
        (folder / f"{split}.jsonl").write_text("\n".join(lines) + "\n")


def read_prompts(path: Path, count: int | None = None) -> list[tuple[str, dict[str, str]]]:
    """The first `count` (default all) prompts of a file with their attributes."""
    lines = path.read_text().splitlines()[:count]
    return [(row["prompt"], row["attributes"]) for row in map(json.loads, lines)]
