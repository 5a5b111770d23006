"""Attention and MLP outputs inside the units of a denoiser: watched or replaced while the units run."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from torch import Tensor

Kind = Literal["self_attention", "cross_attention", "mlp"]
KINDS: tuple[Kind, ...] = ("self_attention", "cross_attention", "mlp")


@dataclass(frozen=True)
class Sublayer:
    """One module whose output is kept as FORA and PAB do: before its gate, so that a fresh gate weighs it.

    Attributes:
        kind: what it computes; the joint attention of an MMDiT is its self-attention.
        module: its path in the denoiser.
        streams: how many of its outputs are used (joint attention: image and text).
        returns: how many it returns, as a tuple where there are several.
    """

    kind: Kind
    module: str
    streams: int = 1
    returns: int = 1

    @property
    def tensors(self) -> tuple[str, ...]:
        """The names of its outputs."""
        name = self.module.replace(".", "_")
        return (name, *(f"{name}_{stream}" for stream in range(1, self.streams)))


@contextlib.contextmanager
def intercepted(
    denoiser: Any, watched: Sequence[Sublayer], given: Mapping[Sublayer, Sequence[Tensor]]
) -> Iterator[dict[str, Tensor]]:
    """While units run, collect the outputs of some sub-layers, and let others return what is given.

    Yields:
        Tensor name -> output of every watched sub-layer that has run.
    """
    seen: dict[str, Tensor] = {}
    hooks = []
    replaced = []
    for sublayer in watched:

        def keep(_: Any, __: Any, output: Any, sublayer: Sublayer = sublayer) -> None:
            tensors = output if isinstance(output, tuple) else (output,)
            seen.update(zip(sublayer.tensors, tensors[: sublayer.streams], strict=True))

        hooks.append(denoiser.get_submodule(sublayer.module).register_forward_hook(keep))
    for sublayer, tensors in given.items():
        module: Any = denoiser.get_submodule(sublayer.module)
        unused = (None,) * (sublayer.returns - sublayer.streams)
        value = (*tensors, *unused) if sublayer.returns > 1 else tensors[0]
        module.forward = lambda *_, value=value, **__: value
        replaced.append(module)
    try:
        yield seen
    finally:
        for hook in hooks:
            hook.remove()
        for module in replaced:
            del module.forward
