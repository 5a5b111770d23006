"""What a family of denoisers tells the compiler, and how a denoiser is cut into segments."""

from __future__ import annotations

import inspect
import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, TypeAlias

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

from compress.errors import RefusedError
from export.step_plan import Slot

PAIR_SHARE = 0.05
"""A shallow path with at most this share of the parameters is exported twice, inside `full` and as `shallow`."""

Network: TypeAlias = Any
"""An nn.Module of diffusers or transformers, whose attributes (config, blocks) the type checker does not know."""


@dataclass(frozen=True)
class CutInfo:
    """One place where a denoiser can be cut.

    Attributes:
        index: what the recipe names.
        name: the module whose input is cached.
        macs_share: multiply-accumulates of the shallow path, as a fraction of the whole denoiser's.
        parameter_share: parameters of the shallow path, as a fraction of the whole denoiser's.
    """

    index: int
    name: str
    macs_share: float
    parameter_share: float


@dataclass(frozen=True)
class DenoiserSegment:
    """A row of a cut denoiser: `module(**{name: tensor for name in inputs})` is the tuple named by `outputs`."""

    name: str
    module: SegmentModule
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]


class SegmentModule(nn.Module):
    """Holds the whole denoiser under `denoiser`, so that module paths in a traced graph are those of the denoiser."""

    prefix: ClassVar[str] = "denoiser"
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]

    def __init__(self, denoiser: Network) -> None:
        super().__init__()
        self.denoiser = denoiser

    @property
    def component(self) -> Network:
        """The whole denoiser."""
        return self.denoiser


@dataclass(frozen=True)
class Piece:
    """A segment before it is bound to weights: `run(denoiser, *inputs)` gives the outputs."""

    name: str
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    run: Callable[..., tuple[Tensor, ...]]

    def bind(self, denoiser: Network) -> DenoiserSegment:
        """Make it a module over this denoiser; the weights are shared, not copied."""
        names = ("self", *self.inputs)
        kind = inspect.Parameter.POSITIONAL_OR_KEYWORD
        signature = inspect.Signature([inspect.Parameter(name, kind) for name in names])
        run = self.run

        def forward(*args: Any, **kwargs: Any) -> tuple[Tensor, ...]:
            module, *tensors = signature.bind(*args, **kwargs).args
            return run(module.denoiser, *tensors)

        # torch.export names a graph's inputs after the parameters of `forward`, and they differ from cut to cut.
        forward.__signature__ = signature  # type: ignore[attr-defined]
        members = {"forward": forward, "inputs": self.inputs, "outputs": self.outputs}
        module: SegmentModule = type("SegmentModule", (SegmentModule,), members)(denoiser)
        module.training = denoiser.training
        return DenoiserSegment(self.name, module, self.inputs, self.outputs)


class Family(ABC):
    """One kind of denoiser. Stateless: every method takes the denoiser it speaks of.

    Attributes:
        name: of the family.
        denoiser_class: class name in diffusers.
        part: its folder in a pipeline.
        conditioning: the tensors given from outside, the latent first.
        output: the network output, with as many channels as the latent.
        float_layers: patterns of the paths of the first and last layers: cheap, and their error is everywhere.
        modulation_layers: patterns of the paths of the linear layers that read one vector per picture (time embedding,
            adaptive norms): they cost the bytes of their weights, not arithmetic, and their error is everywhere.
    """

    name: ClassVar[str]
    denoiser_class: ClassVar[str]
    part: ClassVar[str]
    conditioning: ClassVar[tuple[str, ...]]
    output: ClassVar[str]
    float_layers: ClassVar[tuple[str, ...]]
    modulation_layers: ClassVar[tuple[str, ...]]

    @abstractmethod
    def check(self, denoiser: Network) -> None:
        """Refuse a variant this family does not cover.

        Raises:
            RefusedError: names the config entry and the reason.
        """

    @abstractmethod
    def whole(self, denoiser: Network, *tensors: Tensor) -> Tensor:
        """The denoiser as its own `forward` computes it; `tensors` in the order of `conditioning`."""

    @abstractmethod
    def cut_names(self, denoiser: Network) -> list[str]:
        """The module whose input is cached, for every cut in order."""

    @abstractmethod
    def pieces(self, denoiser: Network, cut: int) -> tuple[Piece, Piece, Piece, Slot]:
        """The disjoint (entry, deep, exit) of a cut, and the slot that deep fills and exit reads."""

    @abstractmethod
    def shallow_modules(self, denoiser: Network, cut: int) -> list[str]:
        """The paths of the modules and lone parameters that the shallow path of a cut runs."""

    @abstractmethod
    def example_inputs(
        self, denoiser: Network, batch: int, height: int, width: int, prompt_tokens: int
    ) -> dict[str, Tensor]:
        """Seeded conditioning tensors; height and width in latent pixels."""

    @abstractmethod
    def dynamic_axes(self) -> dict[str, dict[int, str]]:
        """Input -> {dimension: "batch", "height", "width" or "prompt_tokens"}; other dimensions are fixed."""

    @abstractmethod
    def latent_multiple(self, denoiser: Network) -> int:
        """Height and width of the latent must be multiples of this."""

    def latent_side(self, denoiser: Network) -> int:
        """Height and width of the latent the denoiser was trained at."""
        return int(denoiser.config.sample_size)

    def sensitive(self, denoiser: Network) -> list[str]:
        """The linear and convolution layers among `float_layers`."""
        return _layers(denoiser, self.float_layers)

    def modulation(self, denoiser: Network) -> list[str]:
        """The linear layers among `modulation_layers`."""
        return _layers(denoiser, self.modulation_layers)

    def cuts(self, denoiser: Network) -> list[CutInfo]:
        """Every place where the denoiser can be cut."""
        return [self.cut_info(denoiser, cut) for cut in range(len(self.cut_names(denoiser)))]

    def cut_info(self, denoiser: Network, cut: int) -> CutInfo:
        """What one cut is, and what its shallow path costs at the latent size of the training and 77 prompt tokens.

        Raises:
            RefusedError: there is no such cut.
        """
        self._check_cut(denoiser, cut)
        side = self.latent_side(denoiser)
        inputs = self.example_inputs(denoiser, batch=1, height=side, width=side, prompt_tokens=77)
        entry, deep, exit_, _ = self.pieces(denoiser, cut)
        macs = _macs(denoiser, (entry, deep, exit_), inputs)
        return CutInfo(
            index=cut,
            name=self.cut_names(denoiser)[cut],
            macs_share=(macs["entry"] + macs["exit"]) / sum(macs.values()),
            parameter_share=self._parameter_share(denoiser, cut),
        )

    def segments(
        self, denoiser: Network, cut: int | None
    ) -> tuple[list[DenoiserSegment], dict[str, tuple[str, ...]], dict[str, Slot]]:
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
        self._check_cut(denoiser, cut)
        entry, deep, exit_, slot = self.pieces(denoiser, cut)
        if self._parameter_share(denoiser, cut) > PAIR_SHARE:
            bound = [piece.bind(denoiser) for piece in (entry, deep, exit_)]
            return bound, {"full": ("entry", "deep", "exit"), "shallow": ("entry", "exit")}, {"deep": slot}
        full, shallow, slot = self._pair(entry, deep, exit_, slot)
        pair = [full.bind(denoiser), shallow.bind(denoiser)]
        return pair, {"full": ("full",), "shallow": ("shallow",)}, {"deep": slot}

    def _pair(self, entry: Piece, deep: Piece, exit_: Piece, slot: Slot) -> tuple[Piece, Piece, Slot]:
        """The two paths as one segment each. A residual is then taken inside them and kept as a feature."""
        write, read, crossing = [deep], [exit_], slot.tensor
        if slot.base is not None:
            base, tensor, crossing = slot.base, slot.tensor, "residual"
            write.append(Piece("difference", (tensor, base), (crossing,), lambda _, value, base: (value - base,)))
            read.insert(0, Piece("sum", (base, crossing), (tensor,), lambda _, base, residual: (base + residual,)))
        full = _chain("full", [entry, *write, exit_], (crossing, self.output))
        shallow = _chain("shallow", [entry, *read], (self.output,))
        return full, shallow, Slot(crossing)

    def _check_cut(self, denoiser: Network, cut: int) -> None:
        known = len(self.cut_names(denoiser))
        if not 0 <= cut < known:
            raise RefusedError(f"there is no cut {cut}: the cuts of this denoiser are 0 to {known - 1}")

    def _parameter_share(self, denoiser: Network, cut: int) -> float:
        """The parameters at or below the modules of the shallow path, as a fraction of all."""
        tops = tuple(self.shallow_modules(denoiser, cut))
        sizes = {path: parameter.numel() for path, parameter in denoiser.named_parameters()}
        shallow = [path for path in sizes if any(path == top or path.startswith(top + ".") for top in tops)]
        return sum(sizes[path] for path in shallow) / sum(sizes.values())


def _chain(name: str, pieces: Sequence[Piece], outputs: tuple[str, ...]) -> Piece:
    """Pieces run one after the other as one piece; tensors are matched by name, what none gives is an input."""
    made = {tensor for piece in pieces for tensor in piece.outputs}
    inputs = tuple(dict.fromkeys(tensor for piece in pieces for tensor in piece.inputs if tensor not in made))

    def run(denoiser: Network, *tensors: Tensor) -> tuple[Tensor, ...]:
        known = dict(zip(inputs, tensors, strict=True))
        for piece in pieces:
            known.update(zip(piece.outputs, piece.run(denoiser, *(known[key] for key in piece.inputs)), strict=True))
        return tuple(known[key] for key in outputs)

    return Piece(name, inputs, outputs, run)


def _macs(denoiser: Network, pieces: Sequence[Piece], inputs: Mapping[str, Tensor]) -> dict[str, int]:
    """Multiply-accumulates of every piece (convolutions, matrix products, attention); shapes only, nothing is run."""
    known, macs = dict(inputs), {}
    with torch.no_grad(), FakeTensorMode(allow_non_fake_inputs=True):
        for piece in pieces:
            with FlopCounterMode(display=False, custom_mapping=_UNCOUNTED) as counter:
                outputs = piece.run(denoiser, *(known[name] for name in piece.inputs))
            known.update(zip(piece.outputs, outputs, strict=True))
            macs[piece.name] = counter.get_total_flops() // 2
    return macs


def _attention_flops(query: Sequence[int], key: Sequence[int], value: Sequence[int], *_: Any, **__: Any) -> int:
    """Of (batch, heads, tokens, width) shapes: two per multiply-accumulate of both matrix products."""
    batch, heads, queries, width = query
    return 2 * batch * heads * queries * key[2] * (width + value[3])


_UNCOUNTED = {torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: _attention_flops}
"""What FlopCounterMode does not know of."""


def _layers(denoiser: Network, patterns: Sequence[str]) -> list[str]:
    """The paths of the linear and convolution layers that match one of the patterns."""
    pattern = re.compile("|".join(patterns))
    return [
        path
        for path, module in denoiser.named_modules()
        if isinstance(module, nn.Linear | nn.Conv2d) and pattern.search(path)
    ]
