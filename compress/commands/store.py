"""`compress store`: how much earlier runs have kept, and making it less."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from compress.terminal import Terminal


def arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options."""
    parser.add_argument("--cache", type=Path, metavar="FOLDER", help="the folder with the results")
    parser.add_argument(
        "--prune", type=float, metavar="MIB", help="delete what was used longest ago until at most MIB are left"
    )


def execute(arguments: argparse.Namespace, terminal: Terminal) -> dict[str, Any]:
    """Report the size of the store, after pruning it where that was asked for."""
    from compress.errors import RecipeError
    from compress.store import Store, cache_folder

    store = Store((arguments.cache or cache_folder()) / "store")
    result: dict[str, Any] = {"folder": str(store.folder)}
    if arguments.prune is not None:
        if not 0.0 <= arguments.prune < 2**40:
            raise RecipeError(f"--prune takes a number of MiB of at least 0, not {arguments.prune}")
        gone = store.prune(int(arguments.prune * 2**20))
        result |= {"deleted_entries": gone.entries, "deleted_bytes": gone.bytes}
        terminal.say(f"deleted {gone.entries} results, {gone.bytes / 2**20:.1f} MiB")
    left = store.usage()
    terminal.say(f"{store.folder}: {left.entries} results, {left.bytes / 2**20:.1f} MiB")
    return {**result, "entries": left.entries, "bytes": left.bytes}
