"""Counts what one network call of the reference models launches, plain and fused, for kernels/README.md."""

from __future__ import annotations

import argparse
from collections import Counter
from collections.abc import Sequence
from functools import partial
from pathlib import Path

from compress.fusion.compare import run, small_inputs
from compress.fusion.fused import fused
from compress.fusion.launches import launches
from compress.model.latent_diffusion import load
from compress.passes.base import PassContext
from compress.passes.fuse import Fuse

REFERENCE = Path(__file__).parent.parent / "reference"
MODELS = ("unet", "mmdit")


def counted(name: str) -> tuple[Counter[str], Counter[str]]:
    """Operator -> launches of one call of a reference model: plain, and fused."""
    model, step = load(REFERENCE / name), Fuse()
    step.apply(model, step.plan(model, []), PassContext([], 0, 64, 64))
    inputs, networks = (
        small_inputs(model.family, model.denoiser),
        (model.denoiser, fused(model.denoiser, model.fusions)),
    )
    plain, made = (launches(partial(run, model.family, network, inputs)) for network in networks)
    return plain, made


def table() -> str:
    """Markdown: a row per reference model."""
    lines = ["| reference model | plain | fused | of them ours |", "|---|---|---|---|"]
    for name in MODELS:
        plain, made = counted(name)
        ours = sum(count for operator, count in made.items() if operator.startswith("latent::"))
        lines.append(f"| `{name}` | {plain.total()} | {made.total()} | {ours} |")
    return "\n".join(lines) + "\n"


def main(words: Sequence[str] | None = None) -> None:
    """Print the table."""
    argparse.ArgumentParser(description=__doc__).parse_args(words)
    print(table(), end="")


if __name__ == "__main__":
    main()
