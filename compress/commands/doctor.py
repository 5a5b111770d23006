"""`compress doctor`: what this machine can build and run."""

from __future__ import annotations

import argparse
from typing import Any

from compress.terminal import Terminal


def arguments(parser: argparse.ArgumentParser) -> None:
    """Take no options."""


def execute(arguments: argparse.Namespace, terminal: Terminal) -> dict[str, Any]:
    """Examine the machine and its packages; a finding is a row, never a failure."""
    from rich.table import Table

    from compress import doctor

    found = doctor.examine()
    table = Table("what", "found", "means", title="this machine", title_justify="left", box=None)
    for row in found.rows:
        table.add_row(row.what, row.found, row.means)
    terminal.say(table)
    for problem in found.problems:
        terminal.say(f"problem: {problem}")
    if not found.problems:
        terminal.say("no problems")
    return found.to_dict()
