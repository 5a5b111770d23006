"""`compress checkpoint`: a recipe's quantized model as a diffusers folder that other projects can read."""

from __future__ import annotations

import argparse
from collections import Counter
from pathlib import Path
from typing import Any

from compress.terminal import Terminal


def arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options."""
    parser.add_argument("recipe", metavar="RECIPE", help="a YAML file with the pass quantize")
    parser.add_argument("--out", metavar="FOLDER", type=Path, required=True, help="the folder to write; must be new")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="override a key of the recipe")
    parser.add_argument("--cache", type=Path, metavar="FOLDER", help="where results are stored for the next run")


def execute(arguments: argparse.Namespace, terminal: Terminal) -> dict[str, Any]:
    """Follow the recipe up to its last pass and write the model; nothing is exported or measured."""
    from compress.errors import RecipeError
    from compress.recipe.schema import Recipe
    from compress.store import cache_folder

    recipe = Recipe.load(arguments.recipe, arguments.set)
    if arguments.out.exists():
        raise RecipeError(f"{arguments.out} is there already: name a new folder")

    from compress import compiler
    from compress.report.outcome_view import need

    work = arguments.cache or cache_folder()
    try:
        written = compiler.checkpoint(
            recipe,
            arguments.out,
            progress=terminal.progress,
            work_dir=work,
            announce=lambda cost: terminal.note(need(cost)),
        )
    except RecipeError as error:
        raise recipe.placed(error) from error
    terminal.close()
    terminal.say(
        f"{arguments.out}: {len(written.stored)} layers of the denoiser in few bits "
        f"({_counted(written.stored.values())}), {len(written.left)} in float, {written.bytes / 2**20:.2f} MiB"
    )
    for reason, count in Counter(written.left.values()).most_common():
        first = next(name for name, own in written.left.items() if own == reason)
        terminal.say(f"  {count} in float: {reason} ({first}{', ...' if count > 1 else ''})")
    return {"folder": str(arguments.out), **vars(written)}


def _counted(names: Any) -> str:
    return ", ".join(f"{count} x {name}" for name, count in Counter(names).most_common())
