"""What a family of denoisers tells the compiler, and how a denoiser is cut into segments."""

from __future__ import annotations

import inspect
import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from compress.errors import RefusedError
from export.step_plan import Slot

PAIR_SHARE = 0.05
"""A shallow path with at most this share of the parameters is exported twice, inside `full` and as `shallow`."""

Run = Callable[..., tuple[Tensor, ...]]
Segmentation = tuple[list["DenoiserSegment"], dict[str, tuple[str, ...]], dict[str, Slot]]


@dataclass(frozen=True)
class CutInfo:
    """One place where a denoiser can be cut.

    Attributes:
        index: what the recipe names.
        name: the module whose input is cached.
        macs_share, parameter_share: of the shallow path, as a fraction of the whole denoiser.
    """

    index: int
    name: str
    macs_share: float
    parameter_share: float


@dataclass(frozen=True)
class DenoiserSegment:
    """A row of a cut denoiser: `module(**{name: tensor for name in inputs})` is the tuple named by `outputs`."""

    name: str
    module: nn.Module
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]


@dataclass(frozen=True)
class Piece:
    """A segment before it is bound to weights: `run(denoiser, *inputs)` gives the outputs."""

    name: str
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    run: Run

    def bind(self, denoiser: nn.Module) -> DenoiserSegment:
        """Make it a module over this denoiser; the weights are shared, not copied."""
        return DenoiserSegment(self.name, _segment_class(self)(denoiser), self.inputs, self.outputs)


class SegmentModule(nn.Module):
    """Holds the whole denoiser under `denoiser`, so that module paths of traced graphs are those of the denoiser."""

    prefix = "denoiser"
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]

    def __init__(self, denoiser: nn.Module) -> None:
        super().__init__()
        self.denoiser = denoiser

    @property
    def component(self) -> nn.Module:
        """The whole denoiser."""
        return self.denoiser


def _segment_class(piece: Piece) -> type[SegmentModule]:
    """A module class whose `forward` has the inputs as explicit parameters, which is what torch.export names."""
    names = ("self", *piece.inputs)
    signature = inspect.Signature([inspect.Parameter(name, inspect.Parameter.POSITIONAL_OR_KEYWORD) for name in names])

    def forward(*args: Any, **kwargs: Any) -> tuple[Tensor, ...]:
        module, *tensors = signature.bind(*args, **kwargs).args
        return piece.run(module.denoiser, *tensors)

    forward.__signature__ = signature  # type: ignore[attr-defined]
    return type(  # the name is that of the base: it shows in traced graphs
        SegmentModule.__name__,
        (SegmentModule,),
        {"forward": forward, "inputs": piece.inputs, "outputs": piece.outputs},
    )


def compose(
    name: str, pieces: Sequence[Piece], inputs: tuple[str, ...], outputs: tuple[str, ...], residual: Slot | None = None
) -> Piece:
    """Run pieces one after the other as one piece.

    Args:
        inputs, outputs: the tensors that cross its boundary.
        residual: a residual slot whose difference (`residual`) crosses the boundary in place of the tensor.
    """

    def run(denoiser: nn.Module, *tensors: Tensor) -> tuple[Tensor, ...]:
        known = dict(zip(inputs, tensors, strict=True))
        for piece in pieces:
            if residual is not None and residual.tensor in piece.inputs and "residual" in known:
                known[residual.tensor] = known[residual.base or ""] + known["residual"]
            known.update(zip(piece.outputs, piece.run(denoiser, *(known[key] for key in piece.inputs)), strict=True))
        if residual is not None and "residual" not in known:
            known["residual"] = known[residual.tensor] - known[residual.base or ""]
        return tuple(known[key] for key in outputs)

    return Piece(name, inputs, outputs, run)


class Family(ABC):
    """One kind of denoiser. Stateless; every method takes the denoiser it speaks of.

    Class facts: `name`; `denoiser_class` (of diffusers); `part` (its folder in a pipeline); `conditioning` (the
    tensors given from outside, the latent first); `output` (the network output); `float_layers` (patterns of the
    modules that stay in float unless asked otherwise).
    """

    name: ClassVar[str]
    denoiser_class: ClassVar[str]
    part: ClassVar[str]
    conditioning: ClassVar[tuple[str, ...]]
    output: ClassVar[str]
    float_layers: ClassVar[tuple[str, ...]]

    @abstractmethod
    def check(self, denoiser: nn.Module) -> None:
        """Refuse a variant this family does not cover.

        Raises:
            RefusedError: names the config entry and the reason.
        """

    @abstractmethod
    def whole(self, denoiser: nn.Module, *tensors: Tensor) -> Tensor:
        """The denoiser as its own `forward` computes it; `tensors` in the order of `conditioning`."""

    @abstractmethod
    def cut_names(self, denoiser: nn.Module) -> list[str]:
        """The module whose input is cached, for every cut in order."""

    @abstractmethod
    def pieces(self, denoiser: nn.Module, cut: int) -> tuple[Piece, Piece, Piece, Slot]:
        """The disjoint (entry, deep, exit) of a cut, and the slot filled by deep and read before exit."""

    @abstractmethod
    def shallow_modules(self, denoiser: nn.Module, cut: int) -> list[str]:
        """The paths of the modules (or parameters) that run in the shallow path of a cut."""

    @abstractmethod
    def example_inputs(
        self, denoiser: nn.Module, batch: int, height: int, width: int, prompt_tokens: int
    ) -> dict[str, Tensor]:
        """Seeded conditioning tensors; height and width in latent pixels."""

    @abstractmethod
    def dynamic_axes(self) -> dict[str, dict[int, str]]:
        """Input -> {dimension: "batch", "height", "width" or "prompt_tokens"}; other dimensions are fixed."""

    @abstractmethod
    def latent_multiple(self, denoiser: nn.Module) -> int:
        """Height and width of the latent must be multiples of this."""

    @abstractmethod
    def latent_side(self, denoiser: nn.Module) -> int:
        """Height and width of the latent the denoiser was trained at."""

    def sensitive(self, denoiser: nn.Module) -> list[str]:
        """The linear and convolution layers that stay in float by default: cheap, and their error is everywhere."""
        pattern = re.compile("|".join(self.float_layers))
        return [
            path
            for path, module in denoiser.named_modules()
            if isinstance(module, nn.Linear | nn.Conv2d) and pattern.search(path)
        ]

    def cuts(self, denoiser: nn.Module) -> list[CutInfo]:
        """Every place where the denoiser can be cut, with what the shallow path then costs."""
        macs = _macs(denoiser, self.segments(denoiser, None)[0][0].module, self._smallest_inputs(denoiser))
        return [
            CutInfo(
                index=cut,
                name=name,
                macs_share=_share(macs, self.shallow_modules(denoiser, cut)),
                parameter_share=self._parameter_share(denoiser, cut),
            )
            for cut, name in enumerate(self.cut_names(denoiser))
        ]

    def segments(self, denoiser: nn.Module, cut: int | None) -> Segmentation:
        """The denoiser as segments, with the paths through them and the slots between network calls.

        Without a cut: one segment `denoiser`. With a cut: `entry`, `deep`, `exit`; or `full` and `shallow` where
        the shallow path holds at most 5 % of the parameters, so that sharing them gains nothing.

        Raises:
            RefusedError: there is no such cut.
        """
        if cut is None:
            whole = Piece(
                "denoiser", self.conditioning, (self.output,), lambda model, *tensors: (self.whole(model, *tensors),)
            )
            return [whole.bind(denoiser)], {"full": ("denoiser",)}, {}
        known = len(self.cut_names(denoiser))
        if not 0 <= cut < known:
            raise RefusedError(f"this denoiser has no cut {cut}: its cuts are 0 to {known - 1}")
        entry, deep, exit_, slot = self.pieces(denoiser, cut)
        if self._parameter_share(denoiser, cut) > PAIR_SHARE:
            bound = [piece.bind(denoiser) for piece in (entry, deep, exit_)]
            return bound, {"full": ("entry", "deep", "exit"), "shallow": ("entry", "exit")}, {"deep": slot}
        residual = slot if slot.kind == "residual" else None
        crossing = "residual" if residual else slot.tensor
        full = compose("full", (entry, deep, exit_), self.conditioning, (crossing, self.output), residual)
        shallow = compose("shallow", (entry, exit_), (*self.conditioning, crossing), (self.output,), residual)
        paths: dict[str, tuple[str, ...]] = {"full": ("full",), "shallow": ("shallow",)}
        return [full.bind(denoiser), shallow.bind(denoiser)], paths, {"deep": Slot(crossing)}

    def _smallest_inputs(self, denoiser: nn.Module) -> dict[str, Tensor]:
        side = self.latent_side(denoiser)
        return self.example_inputs(denoiser, batch=1, height=side, width=side, prompt_tokens=8)

    def _parameter_share(self, denoiser: nn.Module, cut: int) -> float:
        sizes = {path: parameter.numel() for path, parameter in denoiser.named_parameters()}
        return _share(sizes, self.shallow_modules(denoiser, cut))


def _share(amounts: Mapping[str, int], paths: Iterable[str]) -> float:
    """The fraction of the total that lies at or below `paths`; keys are disjoint module or parameter paths."""
    tops = tuple(paths)
    inside = sum(n for key, n in amounts.items() if any(key == top or key.startswith(top + ".") for top in tops))
    return inside / max(1, sum(amounts.values()))


def _macs(denoiser: nn.Module, module: nn.Module, inputs: Mapping[str, Tensor]) -> dict[str, int]:
    """Multiply-accumulates of one run by path of the innermost module (convolutions, matmuls, attention)."""
    counter = FlopCounterMode(display=False)
    with torch.inference_mode(), counter:
        module(**inputs)
    prefix = f"{type(module).__name__}.denoiser."
    total = {
        path.removeprefix(prefix): sum(operations.values()) // 2
        for path, operations in counter.get_flop_counts().items()
        if path.startswith(prefix)
    }
    below = {path: [key for key in total if key.startswith(path + ".")] for path in total}
    own = {path: total[path] - sum(total[key] for key in below[path] if _parent(key, total) == path) for path in total}
    return {path: n for path, n in own.items() if n}


def _parent(path: str, known: Mapping[str, int]) -> str | None:
    """The nearest enclosing module that was counted."""
    while "." in path:
        path = path.rpartition(".")[0]
        if path in known:
            return path
    return None
