"""What a family of denoisers tells the compiler: its units, where it can be cut, what is sensitive in it."""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from torch import Tensor, nn

from compress.errors import RefusedError
from compress.families.costs import PathCost, path_costs
from compress.families.layout import Layout
from compress.families.segments import Network, Program, Segmentation, Unit
from compress.families.sublayers import KINDS, Kind, Sublayer
from export.step_plan import Slot

Guidance = Literal["classifier-free", "embedded", "none"]

SHALLOW = "shallow"
"""The path of a plain cut that reads the deep features."""


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


class Family(ABC):
    """One kind of denoiser. Stateless: every method takes the denoiser it speaks of.

    Attributes:
        name: of the family.
        denoiser_class: class name in diffusers.
        part: its folder in a pipeline.
        conditioning: the tensors given from outside, the latent first; of some, a denoiser takes those in `inputs`.
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
        """The denoiser as its own `forward` computes it; `tensors` in the order of `inputs`."""

    @abstractmethod
    def cut_names(self, denoiser: Network) -> list[str]:
        """The module whose input is cached, for every cut in order."""

    @abstractmethod
    def units(self, denoiser: Network) -> list[Unit]:
        """The denoiser unit by unit, in running order; the last gives `output` last.

        Block transformers also have units that only gates read: `change_i`, what the first i blocks add to the image
        tokens, and `modulated`, the input of the first attention.
        """

    @abstractmethod
    def deep_slot(self, denoiser: Network, cut: int) -> Slot:
        """What a cut keeps: reading it leaves the shallow path of that cut."""

    @abstractmethod
    def sublayers(self, denoiser: Network) -> list[Sublayer]:
        """The attention and MLP modules inside the units, in running order."""

    @abstractmethod
    def example_inputs(
        self, denoiser: Network, batch: int, height: int, width: int, prompt_tokens: int
    ) -> dict[str, Tensor]:
        """Seeded tensors for `inputs`; height and width in latent pixels."""

    @abstractmethod
    def dynamic_axes(self) -> dict[str, dict[int, str]]:
        """Input -> {dimension: "batch", "height", "width" or "prompt_tokens"}; other dimensions are fixed."""

    @abstractmethod
    def latent_multiple(self, denoiser: Network) -> int:
        """Height and width of the latent must be multiples of this."""

    def inputs(self, denoiser: Network) -> tuple[str, ...]:
        """Those of `conditioning` that this denoiser takes, in the same order."""
        return self.conditioning

    def guidance(self, denoiser: Network) -> Guidance:
        """How a guidance scale reaches it: by two network calls, by an input `guidance`, or not at all."""
        return "classifier-free"

    def sampler_options(self, denoiser: Network, height: int, width: int) -> dict[str, Any]:
        """What the pipeline tells the scheduler of a latent of this size, see `compress.schedulers.completed`."""
        return {}

    def residuals(self, denoiser: Network) -> dict[str, tuple[int, int]]:
        """Inputs of features to add, each with its channels and the latent pixels to one of its own, in a direction."""
        return {}

    def latent_channels(self, denoiser: Network) -> int:
        """Channels of the latent it takes."""
        return int(denoiser.config.in_channels)

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
        """What one cut is, and what its shallow path costs.

        Raises:
            RefusedError: there is no such cut.
        """
        cost = self.path_costs(denoiser, self.cut_layout(denoiser, cut))[SHALLOW]
        return CutInfo(cut, self.cut_names(denoiser)[cut], cost.macs_share, cost.parameter_share)

    def cut_layout(self, denoiser: Network, cut: int) -> Layout:
        """One slot `deep`, and the path `shallow` that reads it.

        Raises:
            RefusedError: there is no such cut.
        """
        known = len(self.cut_names(denoiser))
        if not 0 <= cut < known:
            raise RefusedError(f"there is no cut {cut}: the cuts of this denoiser are 0 to {known - 1}")
        return Layout.of({"deep": self.deep_slot(denoiser, cut)}, {SHALLOW: ("deep",)})

    def encoder_layout(self, denoiser: Network) -> Layout:
        """The path `decoder` reads everything that the encoder of a UNet gives.

        Raises:
            RefusedError: the denoiser has no encoder and decoder.
        """
        raise RefusedError(
            f"a {self.name} denoiser has no encoder whose features its decoder takes; that is for UNets: use `ddt` or "
            "`deepcache`"
        )

    def block_slots(self, denoiser: Network, first: int, last: int) -> dict[str, Slot]:
        """What stands for the equal blocks `first` to `last - 1`: one slot per stream that blocks after them read.

        Raises:
            RefusedError: the denoiser is no sequence of equal blocks, or has no such blocks.
        """
        raise RefusedError(f"a {self.name} denoiser is no sequence of equal blocks, which this caches: use `deepcache`")

    def block_count(self, denoiser: Network) -> int:
        """How many equal blocks the denoiser has; 0 where it is no sequence of them."""
        return 0

    def sublayer_slots(self, denoiser: Network, kinds: Sequence[Kind] = KINDS) -> dict[str, Slot]:
        """A slot for every output of the sub-layers of some kinds, named as the tensors are."""
        chosen = [sublayer for sublayer in self.sublayers(denoiser) if sublayer.kind in kinds]
        return {tensor: Slot(tensor) for sublayer in chosen for tensor in sublayer.tensors}

    def path_costs(self, denoiser: Network, layout: Layout) -> dict[str, PathCost]:
        """What the paths of a layout cost at the latent size of the training and 77 prompt tokens."""
        side = self.latent_side(denoiser)
        inputs = self.example_inputs(denoiser, batch=1, height=side, width=side, prompt_tokens=77)
        device = next(denoiser.parameters()).device
        inputs = {name: tensor.to(device) for name, tensor in inputs.items()}
        return path_costs(denoiser, self.units(denoiser), self.sublayers(denoiser), layout, inputs)

    def segments(self, denoiser: Network, layout: Layout | None) -> Segmentation:
        """The denoiser as segments, with the paths through them and the slots between network calls.

        Without a layout: one segment `denoiser`. With one: segments that the paths share; or one per path where
        every cached path holds at most 5 % of the parameters, so that sharing them gains nothing.

        Raises:
            RefusedError: the layout does not fit the denoiser.
        """
        if layout is None or len(layout.paths) == 1:
            whole = Unit(
                "denoiser",
                self.inputs(denoiser),
                (self.output,),
                lambda model, *tensors: (self.whole(model, *tensors),),
            )
            slots = {} if layout is None else dict(layout.slots)
            return Segmentation([whole.bind(denoiser)], {"full": ("denoiser",)}, slots)
        return Program(denoiser, self.units(denoiser), self.sublayers(denoiser), layout).segmentation()


def _layers(denoiser: Network, patterns: Sequence[str]) -> list[str]:
    """The paths of the linear and convolution layers that match one of the patterns."""
    pattern = re.compile("|".join(patterns))
    return [
        path
        for path, module in denoiser.named_modules()
        if isinstance(module, nn.Linear | nn.Conv2d) and pattern.search(path)
    ]
