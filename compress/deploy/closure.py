"""Which files of this project a program needs: its imports, followed to their end."""

from __future__ import annotations

import ast
from collections.abc import Iterable
from pathlib import Path

ROOT = Path(__file__).parent.parent.parent
PACKAGES = ("export", "serve")
"""What may be taken along; compilers stay at home."""


def sources(modules: Iterable[str]) -> dict[str, Path]:
    """Path in the project -> file, for the modules and all of ours that they import, packages' own files included."""
    waiting, found = list(modules), dict[str, Path]()
    while waiting:
        file = _file(waiting.pop())
        if file is None or file.relative_to(ROOT).as_posix() in found:
            continue
        found[file.relative_to(ROOT).as_posix()] = file
        waiting += _imports(file)
    return dict(sorted(found.items()))


def _file(module: str) -> Path | None:
    path = ROOT.joinpath(*module.split("."))
    if module.partition(".")[0] not in PACKAGES:
        return None
    return next((file for file in (path.with_suffix(".py"), path / "__init__.py") if file.is_file()), None)


def _imports(file: Path) -> list[str]:
    """Every module a file names, with the packages around it."""
    named = [".".join(file.relative_to(ROOT).with_suffix("").parts)]
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            named += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module is not None:
            named += [node.module, *(f"{node.module}.{alias.name}" for alias in node.names)]
    parts = [name.split(".") for name in named]
    return [".".join(words[:count]) for words in parts for count in range(1, len(words) + 1)]
