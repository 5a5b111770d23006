"""PASSES, the one table of passes, in the order a recipe may use them."""

from __future__ import annotations

import importlib
from collections.abc import Iterator, Mapping

from compress.passes.base import Pass

_CLASSES = {
    "prune": "compress.passes.prune:Prune",
    "distill": "compress.passes.distill:Distill",
    "quantize": "compress.passes.quantize:Quantize",
    "solver": "compress.passes.solver:Solver",
    "cache": "compress.passes.cache:Cache",
    "fuse": "compress.passes.fuse:Fuse",
}


class _Table(Mapping[str, type[Pass]]):
    """Pass name -> class; a class is imported when it is asked for, since some bring torch with them."""

    def __getitem__(self, name: str) -> type[Pass]:
        module, _, attribute = _CLASSES[name].partition(":")
        found: type[Pass] = getattr(importlib.import_module(module), attribute)
        return found

    def __iter__(self) -> Iterator[str]:
        return iter(_CLASSES)

    def __len__(self) -> int:
        return len(_CLASSES)


PASSES: Mapping[str, type[Pass]] = _Table()
