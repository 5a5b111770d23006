"""`compress package`: an engine and the little that runs it, as one archive."""

from __future__ import annotations

import argparse
import dataclasses
from pathlib import Path
from typing import Any

from compress.errors import RecipeError
from compress.terminal import Terminal

SUFFIX = ".tar.gz"


def arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options."""
    parser.add_argument("engine", metavar="ENGINE", type=Path, help="an engine folder")
    parser.add_argument("-o", "--out", type=Path, metavar="FILE", help=f"the archive (default: ENGINE{SUFFIX})")
    parser.add_argument("--target", metavar="NAME", help="take this target alone along; all by default")


def execute(arguments: argparse.Namespace, terminal: Terminal) -> dict[str, Any]:
    """Write the archive; equal engines give equal archives."""
    from compress.deploy.package import package

    out = arguments.out or arguments.engine.resolve().with_name(arguments.engine.resolve().name + SUFFIX)
    if not out.name.endswith(SUFFIX) or out.name == SUFFIX:
        raise RecipeError(f"-o {out}: archives are written as NAME{SUFFIX}")
    made = package(arguments.engine, out, arguments.target)
    terminal.say(
        f"{out}: {made.files} files, {made.bytes / 2**20:.1f} MiB, for {', '.join(made.targets)}\n"
        f"sha256 {made.sha256}\n"
        f"to use it: unpack, pip install -r requirements.txt, then run.py, or python -m serve engine"
    )
    return {"file": str(out), **dataclasses.asdict(made)}
