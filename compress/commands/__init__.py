"""The words of the command line: a command is one file with `arguments(parser)` and `execute(arguments, terminal)`."""

from __future__ import annotations

import importlib
from typing import Any

COMMANDS = {
    "run": "generate pictures with an engine",
    "serve": "serve engines over HTTP",
    "package": "write an engine and what runs it into one archive",
    "bench": "time an engine against the original pipeline",
    "verify": "check an engine's hashes and golden latents",
    "checkpoint": "write a quantized model as a diffusers folder that others can read",
    "inspect": "show what an engine or a model is made of",
    "doctor": "show what this machine can build and run",
    "store": "show or prune the stored results of earlier runs",
}
"""Command -> what it does. A first word that is no command is a recipe to build (the file `build.py`)."""


def load(name: str) -> Any:
    """Import a command's module; they are imported one at a time, so that `--help` is instant."""
    return importlib.import_module(f"compress.commands.{name}")
