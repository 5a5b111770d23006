"""Opens engines for browsers in headless Chromium, compares with Python's ONNX Runtime, and times both in turns."""

from __future__ import annotations

import argparse
import datetime
import json
import statistics
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from compress.measure.environment import environment
from export.engine import Engine, relative_error
from recipes.benchmarks import browser

MIB = 2**20
PROMPTS = (
    "a large red circle at the left on a plain teal background",
    "a small white square left of a large blue cross on a dotted brown background",
    "a large green triangle at the left on a dotted purple background",
)
READY = 'document.getElementById("status")?.textContent === "Ready"'
OPEN = """
const { Engine } = await import("./web/engine.js");
globalThis.engine = await Engine.open({ device: "cpu" });
"""
GENERATE = """
const picture = await globalThis.engine.generate(data.prompt, { seed: data.seed });
return { ...picture, pixels: Array.from(picture.pixels), latent: Array.from(picture.latent) };
"""


def measured(folder: Path, rounds: int, shots: Path | None) -> dict[str, Any]:
    """Load an engine as somebody who was never there, and draw the same pictures in turns.

    Args:
        folder: of an engine for `web` and `onnxruntime-cpu`.
        rounds: how often each prompt is drawn.
        shots: a folder for screenshots.

    Returns:
        Bytes of the first load, milliseconds per step, and how far the pictures differ.
    """
    python = Engine.open(folder, "onnxruntime-cpu", threads=1)
    calls = python.plan.network_calls
    steps: dict[str, list[float]] = {"browser": [], "python": []}
    errors, pixels = [], []
    with browser.opened() as chromium, browser.served(folder) as address:
        page = chromium.page()
        page.size(1100, 900)
        page.open(address)
        page.wait(READY)
        loaded, loading = page.received, page.run('return document.getElementById("about").innerText')
        page.run(OPEN)
        for at in range(rounds):
            for prompt in PROMPTS:
                asked = json.dumps({"prompt": prompt, "seed": at})
                found = page.run(f"const data = {asked}; {GENERATE}")
                began = time.perf_counter()
                latents = python.sample([prompt], [at])
                steps["python"].append((time.perf_counter() - began) * 1e3 / calls)
                steps["browser"].append(found["timing"]["loop"] / calls)
                errors.append(relative_error(np.array(found["latent"], np.float32).reshape(latents.shape), latents))
                drawn = np.array(found["pixels"], np.uint8).reshape(found["height"], found["width"], 4)[..., :3]
                pixels.append(np.abs(drawn.astype(int) - python.decode(latents)[0]))
        page.run('document.getElementById("generate").click()')
        page.wait('document.getElementById("status").textContent.startsWith("Done")')
        if shots is not None:
            page.picture(shots / f"{folder.name}.png")
            page.size(360, 740, mobile=True)
            page.picture(shots / f"{folder.name}-phone.png")
        foreign = [url for url in page.requests if not url.startswith((address, "data:", "blob:"))]
        complaints = list(page.complaints)
    return {
        "network_calls": calls,
        "first_load_mib": loaded / MIB,
        "step_ms": {name: statistics.median(times) for name, times in steps.items()},
        "latent_relative_error": max(errors),
        "pixel_difference": {"mean": float(np.mean(pixels)), "most": int(np.max(pixels))},
        "pictures": len(errors),
        "foreign_requests": foreign,
        "complaints": complaints,
        "page": loading,
    }


def main(words: Sequence[str] | None = None) -> None:
    """Measure, print, write JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("engines", nargs="+", type=Path, help="built by recipes/web.yaml")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--shots", type=Path, help="a folder for screenshots")
    today = datetime.date.today().isoformat()
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / f"web-{today}.json")
    options = parser.parse_args(words)
    if options.shots is not None:
        options.shots.mkdir(parents=True, exist_ok=True)
    found = {folder.name: measured(folder, options.rounds, options.shots) for folder in options.engines}
    options.out.write_text(json.dumps({"environment": environment(), "engines": found}, indent=1) + "\n")
    print(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
