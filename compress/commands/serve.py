"""`compress serve`: engines behind HTTP."""

from __future__ import annotations

import argparse
import dataclasses
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from compress.errors import RecipeError, RefusedError
from compress.terminal import Terminal

EXTRA = ("fastapi", "uvicorn", "prometheus_client")


def arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options."""
    parser.add_argument("engines", metavar="[NAME=]ENGINE", nargs="+", help="engine folders; called as their folders")
    parser.add_argument("--host", default="127.0.0.1", metavar="ADDRESS", help="to listen at (default: %(default)s)")
    parser.add_argument("--port", type=int, default=8000, metavar="N", help="0 takes a free one (default: %(default)s)")
    parser.add_argument("--keys", type=Path, metavar="FILE", help="API keys, one a line; needed unless only local")
    parser.add_argument("--target", metavar="NAME", help="a target of the engines; the best one here by default")
    parser.add_argument("--threads", type=int, metavar="N", help="of the runtime")
    parser.add_argument("--trusted", action="store_true", help="run machine code of the engine: you know who built it")
    parser.add_argument("--queue", type=int, metavar="N", help="pictures that may wait (64)")
    parser.add_argument("--batch", type=int, metavar="N", help="pictures drawn together at most (8)")
    parser.add_argument("--pictures", type=int, metavar="N", help="of one request (8)")
    parser.add_argument("--pixels", type=int, metavar="N", help="of one picture (4194304)")
    parser.add_argument("--deadline-s", type=float, metavar="S", help="the longest a request may take (120)")


def execute(arguments: argparse.Namespace, terminal: Terminal) -> dict[str, Any]:
    """Serve until a signal comes."""
    missing = [name for name in EXTRA if find_spec(name) is None]
    if missing:
        raise RefusedError(f'{missing[0]} is not installed; run: pip install "latent-compress[server]"')
    from serve.limits import Limits
    from serve.server import Settings, serve

    given = {name: getattr(arguments, name) for name in ("queue", "batch", "pictures", "pixels", "deadline_s")}
    for name, value in given.items():
        if value is not None and not 1 <= value <= 1 << 32:
            raise RecipeError(f"--{name.replace('_', '-')} must be at least 1, not {value}")
    if not 0 <= arguments.port < 1 << 16:
        raise RecipeError(f"--port must be from 0 to 65535, not {arguments.port}")
    limits = dataclasses.replace(Limits(), **{name: value for name, value in given.items() if value is not None})
    if limits.pictures > limits.queue:
        raise RecipeError(f"--pictures {limits.pictures} of one request never fit into --queue {limits.queue}")
    engines = _named(arguments.engines)
    serve(
        Settings(
            engines,
            arguments.host,
            arguments.port,
            arguments.keys,
            arguments.target,
            arguments.threads,
            arguments.trusted,
            limits,
        ),
        terminal.say,
    )
    return {"engines": {name: str(folder) for name, folder in engines.items()}}


def _named(words: list[str]) -> dict[str, Path]:
    """Name -> folder of `NAME=FOLDER`, or `FOLDER` alone."""
    named: dict[str, Path] = {}
    for word in words:
        name, equals, folder = word.partition("=")
        path = Path(folder if equals else word)
        key = name if equals else path.resolve().name
        if not key or key in named:
            raise RecipeError(f"{word}: each engine needs a name of its own; write NAME=FOLDER")
        named[key] = path
    return named
