"""The errors of the engine floor, each with the exit code of the command line."""

from __future__ import annotations


class EngineError(Exception):
    """An engine, a target or a runtime package is missing, damaged or unfit: one sentence with the way out."""

    exit_code = 3


class ExportError(Exception):
    """A module could not be written as a graph that computes the same: our fault; names the module."""

    exit_code = 1
