"""Draws the picture of README.md: what the original and the engine make of the same prompts and seeds."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from compress.compiler import sample
from compress.model.latent_diffusion import load
from compress.prompts import read_prompts
from compress.recipe.schema import Recipe
from export.engine import Engine

ROOT = Path(__file__).parent.parent.parent
RECIPES = ("quickstart", "mmdit")
COUNT, GAP, ZOOM = 10, 6, 2


def rows(recipe: Recipe) -> tuple[np.ndarray, np.ndarray]:
    """Pictures uint8 (n, height, width, 3) of the original and of the recipe's engine, from the same noise."""
    file = recipe.prompts_file()
    if file is None:
        raise ValueError(f"{recipe.out}: the recipe names no held-out prompts")
    texts = [prompt.text for prompt in read_prompts(file, COUNT)]
    seeds = list(range(COUNT))
    original = load(recipe.locate(recipe.model))
    sample(original, recipe)
    height, width = recipe.shapes.height.best, recipe.shapes.width.best
    wanted = original.runtime(simulate=False).generate(texts, seeds, height, width)
    return wanted, Engine.open(recipe.locate(recipe.out)).generate(texts, seeds, height, width)


def sheet(strips: Sequence[tuple[np.ndarray, np.ndarray]]) -> Image.Image:
    """Two rows a model, original above engine, on white."""
    count, height, width = strips[0][0].shape[:3]
    lines = [line for strip in strips for line in strip]
    canvas = np.full((len(lines) * (height + GAP) + GAP * len(strips), count * (width + GAP), 3), 255, np.uint8)
    for i, line in enumerate(lines):
        top = i * (height + GAP) + GAP * (i // 2)
        for j, picture in enumerate(line):
            canvas[top : top + height, j * (width + GAP) : j * (width + GAP) + width] = picture
    image = Image.fromarray(canvas)
    return image.resize((image.width * ZOOM, image.height * ZOOM), Image.Resampling.NEAREST)


def main(words: Sequence[str] | None = None) -> None:
    """Write pictures.png into results/."""
    argparse.ArgumentParser(description=__doc__).parse_args(words)
    strips = [rows(Recipe.load(ROOT / "recipes" / f"{name}.yaml")) for name in RECIPES]
    out = Path(__file__).parent / "results" / "pictures.png"
    out.parent.mkdir(exist_ok=True)
    sheet(strips).save(out, optimize=True)


if __name__ == "__main__":
    main()
