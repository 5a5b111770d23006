"""Weights that are float16 in memory and compute as float32, each widened only while it is used."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

LARGE = 1 << 14
"""Parameters of fewer elements stay float32: they cost nothing, and an exporter folds some of them into constants."""


class HalfWeight(Tensor):
    """A float32 tensor of which only the float16 values, `stored`, are kept."""

    stored: Tensor

    @staticmethod
    def __new__(cls, stored: Tensor) -> HalfWeight:
        """Wrap float16 values; they are not copied."""
        made: HalfWeight = torch.Tensor._make_wrapper_subclass(cls, stored.shape, dtype=torch.float32)
        made.stored = stored
        return made

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # type: ignore[override]
        """Widen what an operation takes; a detached one is still one."""
        if func is torch.ops.aten.detach.default:
            return cls(args[0].stored)
        wide = tree_map(lambda value: value.stored.float() if isinstance(value, cls) else value, (args, kwargs or {}))
        return func(*wide[0], **wide[1])


def halve(module: nn.Module) -> None:
    """Keep the large float32 parameters of a module as float16, in place."""
    for owner in module.modules():
        for name, parameter in list(owner.named_parameters(recurse=False)):
            if parameter.dtype == torch.float32 and parameter.numel() >= LARGE:
                setattr(owner, name, nn.Parameter(HalfWeight(parameter.detach().half()), requires_grad=False))


@contextlib.contextmanager
def stand_ins(module: nn.Module) -> Iterator[dict[str, Tensor]]:
    """Put a number without memory in the place of every `HalfWeight`, so that the module can be traced.

    Gives the path of each parameter -> its float16 values, in the order of the numbers: `values_of` finds them again.
    """
    places = [
        (f"{path}.{name}" if path else name, owner, name, parameter)
        for path, owner in module.named_modules()
        for name, parameter in owner.named_parameters(recurse=False)
        if isinstance(parameter, HalfWeight)
    ]
    try:
        for at, (_, owner, name, parameter) in enumerate(places):
            number = torch.tensor(float(at)).expand(parameter.shape)
            setattr(owner, name, nn.Parameter(number, requires_grad=False))
        yield {path: parameter.stored for path, _, _, parameter in places}
    finally:
        for _, owner, name, parameter in places:
            setattr(owner, name, parameter)


def values_of(name: str, array: np.ndarray, halves: Mapping[str, Tensor]) -> np.ndarray | None:
    """The float16 values that an initializer stands for; None where it is no stand-in.

    An exporter transposes the matrices of linear layers, and gives the results other names.
    """
    if array.size < LARGE or any(array.strides):
        return None
    path, half = list(halves.items())[int(array.flat[0])]
    return half.numpy() if name == path else half.numpy().T
