"""Attribute accuracy of a shipped folder: generate from held-out prompts, read the pictures with the recogniser."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from recipes.reference.folders import open_pipeline
from recipes.reference.prompts import read_prompts


@dataclass(frozen=True)
class Score:
    """Attribute accuracy over `count` prompts with a 95 % interval (bootstrap over prompts), all in [0, 1]."""

    count: int
    accuracy: float
    low: float
    high: float
    all_correct: float
    by_head: dict[str, float]

    def line(self) -> str:
        """One line for people."""
        heads = "  ".join(f"{head} {100 * value:.1f}" for head, value in self.by_head.items())
        return (
            f"attribute accuracy {100 * self.accuracy:.2f} % [{100 * self.low:.2f}, {100 * self.high:.2f}] "
            f"(n={self.count}), all correct {100 * self.all_correct:.1f} %   {heads}"
        )


def read_hits(scorer: Path, pictures: np.ndarray, wanted: list[dict[str, str]]) -> np.ndarray:
    """Hits (n, heads): 1 read as wanted, 0 otherwise, -1 where a head is not wanted; pictures (n, 3, 64, 64)."""
    import onnxruntime

    card = json.loads((scorer / "scorer.json").read_text())
    session = onnxruntime.InferenceSession(str(scorer / "model.onnx"), providers=["CPUExecutionProvider"])
    hits = np.full((len(wanted), len(card["heads"])), -1, np.int64)
    for start in range(0, len(pictures), 64):
        part = np.ascontiguousarray(pictures[start : start + 64], np.float32)
        outputs = session.run(list(card["heads"]), {card["input"]: part})
        for column, (head, classes) in enumerate(card["heads"].items()):
            for offset, best in enumerate(outputs[column].argmax(1)):
                name = wanted[start + offset].get(head)
                if name is not None:
                    hits[start + offset, column] = int(classes[best] == name)
    return hits


def summarise(hits: np.ndarray, heads: list[str]) -> Score:
    """Accuracy, interval and parts of a hits table (n, heads)."""
    right, applied = (hits == 1).sum(1), (hits >= 0).sum(1)
    draws = np.random.default_rng(0).integers(len(hits), size=(2000, len(hits)))
    spread = right[draws].sum(1) / applied[draws].sum(1)
    low, high = np.quantile(spread, [0.025, 0.975])
    by_head = {head: float((hits[:, i] == 1).sum() / max(1, (hits[:, i] >= 0).sum())) for i, head in enumerate(heads)}
    accuracy = float(right.sum() / applied.sum())
    return Score(len(hits), accuracy, float(low), float(high), float((right == applied).mean()), by_head)


def generate(
    folder: Path,
    prompts: list[str],
    steps: int,
    guidance: float,
    device: torch.device | str = "cpu",
    report: Callable[[str], None] | None = None,
    batch: int = 32,
) -> np.ndarray:
    """Pictures float32 (n, 3, 64, 64) in [0, 1]; picture i starts from the noise of seed i."""
    pipeline, extra = open_pipeline(folder)
    pipeline.to(device)
    pipeline.set_progress_bar_config(disable=True)
    pictures = []
    for start in range(0, len(prompts), batch):
        part = prompts[start : start + batch]
        seeds = [torch.Generator().manual_seed(start + i) for i in range(len(part))]
        out = pipeline(
            part, num_inference_steps=steps, guidance_scale=guidance, generator=seeds, output_type="np", **extra
        )
        pictures.append(out.images.transpose(0, 3, 1, 2))
        if report is not None:
            report(f"{folder.name}: {start + len(part)}/{len(prompts)} pictures")
    return np.concatenate(pictures).astype(np.float32)


def score_folder(
    folder: Path,
    scorer: Path,
    prompts: Path,
    count: int = 512,
    steps: int = 50,
    guidance: float = 3.0,
    device: torch.device | str = "cpu",
    report: Callable[[str], None] | None = None,
) -> Score:
    """Score the model in `folder` on the first `count` prompts of a prompt file."""
    rows = read_prompts(prompts, count)
    pictures = generate(folder, [prompt for prompt, _ in rows], steps, guidance, device, report)
    heads = list(json.loads((scorer / "scorer.json").read_text())["heads"])
    return summarise(read_hits(scorer, pictures, [wanted for _, wanted in rows]), heads)
