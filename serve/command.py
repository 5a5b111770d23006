"""The words of the command line that starts a server, alone or as `compress serve`."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

from serve.limits import Limits

if TYPE_CHECKING:
    from serve.server import Settings

PACKAGES = ("fastapi", "prometheus_client", "uvicorn")
BOUNDS: dict[str, tuple[type, str]] = {
    "queue": (int, "pictures that may wait"),
    "batch": (int, "pictures drawn together at most"),
    "pictures": (int, "pictures of one request"),
    "pixels": (int, "pixels of one picture"),
    "deadline_s": (float, "seconds a request may take"),
}
"""Field of `Limits` -> its type, and what it is; the rest of the limits are not for the command line."""


class UsageError(Exception):
    """The command line is wrong: one sentence."""

    exit_code = 2


class MissingError(Exception):
    """A package of the server is not installed: one sentence with the way out."""

    exit_code = 3


def arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options."""
    usual = Limits()
    parser.add_argument("engines", metavar="[NAME=]ENGINE", nargs="+", help="engine folders; called as their folders")
    parser.add_argument("--host", default="127.0.0.1", metavar="ADDRESS", help="to listen at (default: %(default)s)")
    parser.add_argument("--port", type=int, default=8000, metavar="N", help="0 takes a free one (default: %(default)s)")
    parser.add_argument("--keys", type=Path, metavar="FILE", help="API keys, one a line; needed unless only local")
    parser.add_argument("--target", metavar="NAME", help="a target of the engines; the best one here by default")
    parser.add_argument("--threads", type=int, metavar="N", help="of the runtime")
    parser.add_argument("--trusted", action="store_true", help="run machine code of the engine: you know who built it")
    for name, (kind, what) in BOUNDS.items():
        option, letter = f"--{name.replace('_', '-')}", "S" if kind is float else "N"
        parser.add_argument(
            option, type=kind, default=getattr(usual, name), metavar=letter, help=f"{what} (default: %(default)s)"
        )


def settings(given: argparse.Namespace) -> Settings:
    """Check the options, before anything is opened.

    Raises:
        UsageError: one does not make sense.
        MissingError: the server's packages are not installed.
    """
    missing = [name for name in PACKAGES if find_spec(name) is None]
    if missing:
        raise MissingError(f'{missing[0]} is not installed; run: pip install "latent-compress[server]"')
    from serve.server import Settings

    for name in BOUNDS:
        if not 1 <= getattr(given, name) <= 1 << 32:
            raise UsageError(f"--{name.replace('_', '-')} must be at least 1, not {getattr(given, name)}")
    if not 0 <= given.port < 1 << 16:
        raise UsageError(f"--port must be from 0 to 65535, not {given.port}")
    if given.pictures > given.queue:
        raise UsageError(f"--pictures {given.pictures} of one request never fit into --queue {given.queue}")
    return Settings(
        engines=_named(given.engines),
        host=given.host,
        port=given.port,
        keys=given.keys,
        target=given.target,
        threads=given.threads,
        trusted=given.trusted,
        limits=Limits(**{name: getattr(given, name) for name in BOUNDS}),
    )


def _named(words: Sequence[str]) -> dict[str, Path]:
    """Name -> folder of `NAME=FOLDER`, or `FOLDER` alone."""
    named: dict[str, Path] = {}
    for word in words:
        name, equals, folder = word.partition("=")
        path = Path(folder if equals else word)
        key = name if equals else path.resolve().name
        if not key or key in named:
            raise UsageError(f"{word}: each engine needs a name of its own; write NAME=FOLDER")
        named[key] = path
    return named
