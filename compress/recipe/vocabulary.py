"""The names a recipe may use that are defined elsewhere: schedulers and targets."""

from __future__ import annotations

import functools
import importlib.util
import re
from pathlib import Path


@functools.cache
def scheduler_names() -> tuple[str, ...]:
    """Return the scheduler classes of the installed diffusers.

    Read from its table of lazy imports, since importing diffusers and torch takes seconds and a misspelt name
    should not.
    """
    spec = importlib.util.find_spec("diffusers")
    names: set[str] = set()
    for folder in (spec.submodule_search_locations or ()) if spec is not None else ():
        table = Path(folder) / "schedulers" / "__init__.py"
        if table.is_file():
            names |= set(re.findall(r'"([A-Z]\w*Scheduler)"', table.read_text(encoding="utf-8")))
    if not names:
        import diffusers

        names = {name for name in dir(diffusers) if name.endswith("Scheduler")}
    return tuple(sorted(name for name in names if not name.startswith("Flax")))


def target_names() -> tuple[str, ...]:
    """Return the names of the rows of the target table."""
    from export.target import TARGETS

    return tuple(TARGETS)
