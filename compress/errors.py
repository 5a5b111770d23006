"""The errors a user meets, each with the exit code of the command line."""

from __future__ import annotations


class CompressError(Exception):
    """Base: one sentence that names the cause and the way out."""

    exit_code = 1


class PassError(CompressError):
    """Our fault: a pass, an export or a measurement did not do what it promised."""

    exit_code = 1


class RecipeError(CompressError):
    """The recipe is wrong: file, line, key, what is allowed."""

    exit_code = 2


class RefusedError(CompressError):
    """What was asked cannot be done to this model or target."""

    exit_code = 3


class GateError(CompressError):
    """A gate of the recipe was not met; the engine is kept under `rejected/`."""

    exit_code = 4
