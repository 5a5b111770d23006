"""What a backbone must tell the compiler: units, cuts, example inputs, sensitive layers; one file per family."""

from __future__ import annotations

from compress.families.base import CutInfo, Family
from compress.families.controlled_unet import ControlledUNet
from compress.families.dit import DiT
from compress.families.flux import Flux
from compress.families.layout import Layout
from compress.families.pixart import PixArt
from compress.families.sd3 import SD3
from compress.families.segments import DenoiserSegment, Network, Segmentation
from compress.families.unet import UNet

FAMILIES: dict[str, Family] = {family.denoiser_class: family for family in (UNet(), SD3(), DiT(), PixArt(), Flux())}
"""diffusers class name of the denoiser -> what is known about it."""

CONTROLLED_UNET: Family = ControlledUNet()
"""For the UNets of pipelines with a ControlNet."""

__all__ = ["CONTROLLED_UNET", "FAMILIES", "CutInfo", "DenoiserSegment", "Family", "Layout", "Network", "Segmentation"]
