"""`compress RECIPE`: follow a recipe from a model to a measured engine."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from compress.terminal import Terminal


def arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options."""
    parser.add_argument("recipe", metavar="RECIPE", help="a YAML file; README.md lists the keys")
    parser.add_argument("--dry-run", action="store_true", help="print every edit and the cost; write nothing")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="override a key of the recipe")
    parser.add_argument("--out", metavar="FOLDER", help="where the engine goes, the same as --set out=FOLDER")
    parser.add_argument("--cache", type=Path, metavar="FOLDER", help="where results are stored for the next run")


def execute(arguments: argparse.Namespace, terminal: Terminal) -> dict[str, Any]:
    """Build an engine, or with --dry-run only plan it."""
    from compress.errors import RecipeError
    from compress.recipe.schema import Recipe
    from compress.store import cache_folder

    out = [f"out={arguments.out}"] if arguments.out is not None else []
    recipe = Recipe.load(arguments.recipe, [*arguments.set, *out])

    from compress import compiler
    from compress.report.outcome_view import need

    work = arguments.cache or cache_folder()
    try:
        outcome = compiler.run(
            recipe,
            dry_run=arguments.dry_run,
            progress=terminal.progress,
            work_dir=work,
            announce=lambda cost: terminal.note(need(cost)),
        )
    except RecipeError as error:
        raise recipe.placed(error) from error
    terminal.close()
    terminal.say(outcome.render())
    result: dict[str, Any] = outcome.to_dict()
    return result
