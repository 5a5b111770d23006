"""`compress serve`: engines behind HTTP."""

from __future__ import annotations

import argparse
from typing import Any

from compress.terminal import Terminal


def arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options."""
    from serve import command

    command.arguments(parser)


def execute(arguments: argparse.Namespace, terminal: Terminal) -> dict[str, Any]:
    """Serve until a signal comes."""
    from serve.command import settings

    chosen = settings(arguments)
    from serve.server import serve

    serve(chosen, terminal.say)
    return {"engines": {name: str(folder) for name, folder in chosen.engines.items()}}
