"""UNet2DConditionModel with what a ControlNet adds to it (Zhang et al. 2023, arXiv 2302.05543) as further inputs."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace

import torch
from torch import Tensor
from typing_extensions import override

from compress.families.layout import Layout
from compress.families.segments import Network, Unit
from compress.families.unet import UNet, down_layers
from export.step_plan import Slot

_MID = "residual_mid"


class ControlledUNet(UNet):
    """`residual_i` is added to skip i where the up path takes it, `residual_mid` to the output of the middle block.

    The down path never sees them. `controlled_i` is the sum that unit `up_i` consumes, and `mid` holds its residual
    already, so whatever is kept between network calls is kept with the control it was computed with; the decoder of
    encoder propagation takes no residual. The network that computes them is the caller's own.
    """

    name = "controlled-unet"

    @override
    def inputs(self, denoiser: Network) -> tuple[str, ...]:
        return (*super().inputs(denoiser), *self.residuals(denoiser))

    @override
    def residuals(self, denoiser: Network) -> dict[str, tuple[int, int]]:
        found: dict[str, tuple[int, int]] = {}
        channels, divisor = int(denoiser.config.block_out_channels[0]), 1
        for i, layers in enumerate(down_layers(denoiser)):
            if layers.resnet is not None:
                channels = int(denoiser.get_submodule(layers.resnet).out_channels)
            elif i:
                divisor *= 2
            found[f"residual_{i}"] = channels, divisor
        return found | {_MID: (channels, divisor)}

    @override
    def whole(self, denoiser: Network, *tensors: Tensor) -> Tensor:
        names = super().inputs(denoiser)
        given, residuals = dict(zip(names, tensors, strict=False)), tensors[len(names) :]
        sample, timestep, text = (given.pop(name) for name in self.conditioning[:3])
        return denoiser(
            sample,
            timestep,
            encoder_hidden_states=text,
            added_cond_kwargs=given,
            down_block_additional_residuals=residuals[:-1],
            mid_block_additional_residual=residuals[-1],
            return_dict=False,
        )[0]

    @override
    def units(self, denoiser: Network) -> list[Unit]:
        return list(_controlled(super().units(denoiser)))

    @override
    def encoder_layout(self, denoiser: Network) -> Layout:
        kept = [f"controlled_{i}" for i in range(len(self.cut_names(denoiser)))]
        slots = {tensor: Slot(tensor) for tensor in (*kept, "mid")}
        return Layout.of(slots, {"decoder": tuple(slots)})

    @override
    def example_inputs(
        self, denoiser: Network, batch: int, height: int, width: int, prompt_tokens: int
    ) -> dict[str, Tensor]:
        inputs = super().example_inputs(denoiser, batch, height, width, prompt_tokens)
        generator = torch.Generator().manual_seed(1)
        for name, (channels, divisor) in self.residuals(denoiser).items():
            size = batch, channels, height // divisor, width // divisor
            inputs[name] = torch.randn(size, generator=generator)
        return inputs


def _controlled(units: list[Unit]) -> Iterator[Unit]:
    for unit in units:
        kind, _, index = unit.name.partition("_")
        if kind == "up":
            given = (f"controlled_{index}" if name == f"skip_{index}" else name for name in unit.inputs)
            yield replace(unit, inputs=tuple(given))
        elif unit.name == "mid":
            yield replace(unit, inputs=(*unit.inputs, _MID), run=_adding(unit))
        else:
            yield unit
        if kind == "down":
            names = (f"skip_{index}", f"residual_{index}")
            yield Unit(
                f"control_{index}", names, (f"controlled_{index}",), lambda _, skip, residual: (skip + residual,)
            )


def _adding(unit: Unit) -> Callable[..., tuple[Tensor, ...]]:
    """The unit's run, with the last input added to its output."""

    def run(unet: Network, *tensors: Tensor) -> tuple[Tensor, ...]:
        (output,) = unit.run(unet, *tensors[:-1])
        return (output + tensors[-1],)

    return run
