"""Counts the operators of one network call that would launch work on a GPU: all but views and allocations."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from typing_extensions import override

_FREE = ("aten::_unsafe_view", "aten::detach", "aten::empty", "aten::empty_like", "aten::new_empty", "aten::lift_fresh")


def launches(call: Callable[[], object]) -> Counter[str]:
    """Operator -> how often `call` dispatches it.

    One of ours counts as one, whatever kernels it needs, and so does one of torch: both take three for a group norm.
    """
    with torch.no_grad(), _Counting() as counting:
        call()
    return counting.found


class _Counting(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.found: Counter[str] = Counter()

    @override
    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func._schema.name
        if not func.is_view and name not in _FREE:
            self.found[name] += 1
        return func(*args, **(kwargs or {}))
