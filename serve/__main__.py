"""Runs the server without the compiler: `python -m serve ENGINE`."""

from __future__ import annotations

import argparse
import sys

from export.errors import EngineError
from serve.command import MissingError, UsageError, arguments, settings


def main() -> int:
    """Serve until a signal comes; returns the exit code."""
    parser = argparse.ArgumentParser("python -m serve", description="Serve engines over HTTP.")
    arguments(parser)
    try:
        chosen = settings(parser.parse_args())
        from serve.server import serve

        serve(chosen, print)
    except (EngineError, MissingError, UsageError) as error:
        print(f"serve: {error}", file=sys.stderr)
        return error.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main())
