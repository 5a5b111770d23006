"""The queries and keys inside attention modules: found, watched and rounded, whatever processor computes them."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.overrides import TorchFunctionMode
from typing_extensions import override

from compress.errors import PassError
from export.quant_plan import AttentionQuant
from kernels import operators as operators  # registers torch.ops.latent

Change = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]
"""From query and key, both (batch, heads, tokens, head channels), to what is attended with instead."""


def attentions(network: nn.Module) -> list[str]:
    """The names of the modules of diffusers that compute attention, in order."""
    from diffusers.models.attention import AttentionModuleMixin
    from diffusers.models.attention_processor import Attention

    return [name for name, module in network.named_modules() if isinstance(module, Attention | AttentionModuleMixin)]


def intercept(attention: nn.Module, change: Change) -> Callable[[], None]:
    """Let `change` see every query and key of a module before their product; call what is returned to end that.

    Of several, the last that began ends first.
    """
    before, forward = attention.__dict__.get("forward"), attention.forward

    def intercepted(*args: Any, **kwargs: Any) -> Any:
        with _Intercepted(change):
            return forward(*args, **kwargs)

    def undo() -> None:
        if before is None:
            del attention.forward
        else:
            attention.forward = before

    attention.forward = intercepted
    return undo


@contextlib.contextmanager
def observed(network: nn.Module, names: Sequence[str]) -> Iterator[dict[str, tuple[float, float]]]:
    """Collect name -> the largest absolute query and key of attention modules, while the context lasts.

    Raises:
        PassError: at the call, where one is not finite.
    """
    largest: dict[str, tuple[float, float]] = {}

    def watch(name: str) -> Change:
        def change(query: Tensor, key: Tensor) -> tuple[Tensor, Tensor]:
            found = (float(query.abs().max()), float(key.abs().max()))
            if not all(math.isfinite(number) for number in found):
                raise PassError(f"a query or key of {name} is not finite in the uncompressed model")
            before = largest.get(name, (0.0, 0.0))
            largest[name] = (max(before[0], found[0]), max(before[1], found[1]))
            return query, key

        return change

    with contextlib.ExitStack() as stack:
        for name in names:
            stack.callback(intercept(network.get_submodule(name), watch(name)))
        yield largest


def scales(largest: Mapping[str, tuple[float, float]]) -> dict[str, AttentionQuant]:
    """Name -> scales at which the largest numbers just fit: it is they that decide where attention goes."""
    return {
        name: AttentionQuant("int8-qk", max(query, 1e-6) / 127, max(key, 1e-6) / 127)
        for name, (query, key) in largest.items()
    }


def rounding(quant: AttentionQuant) -> Change:
    """Quantize and dequantize as the lowered graph does."""
    return lambda query, key: (_rounded(query, quant.query), _rounded(key, quant.key))


def _rounded(x: Tensor, scale: float) -> Tensor:
    return torch.clamp(torch.round(x / scale), -128, 127) * scale


class _Intercepted(TorchFunctionMode):
    def __init__(self, change: Change) -> None:
        super().__init__()
        self._change = change

    @override
    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in (functional.scaled_dot_product_attention, torch.ops.latent.attention.default):
            named = dict(zip(("query", "key"), args, strict=False)) | kwargs
            kwargs = {name: value for name, value in kwargs.items() if name not in ("query", "key")}
            args = (*self._change(named["query"], named["key"]), *args[2:])
        return func(*args, **kwargs)
