"""What training a denoiser takes, from one pass forward and back through it."""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from compress.example_inputs import example_inputs
from compress.training.recompute import Recomputed

if TYPE_CHECKING:
    from compress.model.latent_diffusion import LatentDiffusion

TRIED = 2
"""Samples in the try."""
COPIES = 5
"""Of the weights: themselves, their average, the gradients, and two moments of AdamW."""


@dataclass(frozen=True)
class SampleCost:
    """Of one sample.

    Attributes:
        forward: seconds without gradients.
        update: seconds forward and back.
        kept: bytes kept on the way for going back.
        weights: bytes of the denoiser's weights; not of a sample.
    """

    forward: float
    update: float
    kept: float
    weights: float

    def memory(self, batch: int) -> float:
        """Bytes at the peak of an update with `batch` samples at once."""
        return COPIES * self.weights + batch * self.kept


def denoiser_cost(model: LatentDiffusion, height: int, width: int, recompute: bool = False) -> SampleCost:
    """Of the model's denoiser, whole.

    Args:
        model: is left as it was.
        height: of the pictures in pixels.
        width: likewise.
        recompute: see `compress.training.recompute`.
    """
    whole = model.family.segments(model.denoiser, None).segments[0].module
    call = Recomputed(model.family, model.denoiser) if recompute else whole
    return sample_cost(model.denoiser, call, example_inputs(model, "denoiser", TRIED, height, width))


def sample_cost(
    denoiser: nn.Module, call: Callable[..., tuple[Tensor, ...]] | Recomputed, inputs: Mapping[str, Tensor]
) -> SampleCost:
    """Time one call on `TRIED` samples, and count what it keeps; the denoiser is left as it was.

    Args:
        denoiser: holds the weights.
        call: computes with them.
        inputs: of the call.
    """
    parameters = list(denoiser.parameters())
    wanted = [parameter.requires_grad for parameter in parameters]
    own = {parameter.untyped_storage().data_ptr() for parameter in parameters}
    kept = functools.partial(kept_bytes, own=own)

    def back() -> None:
        with torch.enable_grad():
            loss = call(**inputs)[0].square().mean()
        torch.autograd.grad(loss, parameters, allow_unused=True)

    try:
        denoiser.requires_grad_(True)
        within = call.kept(kept, **inputs) if isinstance(call, Recomputed) else kept(lambda: call(**inputs)[0].square())
        with torch.no_grad():
            forward = _seconds(lambda: call(**inputs))
        update = _seconds(back)
    finally:
        for parameter, wants in zip(parameters, wanted, strict=True):
            parameter.requires_grad_(wants)
    weights = sum(parameter.numel() * parameter.element_size() for parameter in parameters)
    return SampleCost(forward / TRIED, update / TRIED, within / TRIED, float(weights))


def kept_bytes(run: Callable[[], object], own: Collection[int] = ()) -> int:
    """Bytes that a call keeps for going back.

    Args:
        run: the call; what it gives stays until it is counted.
        own: addresses of storages that do not count.
    """
    kept: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.enable_grad(), torch.autograd.graph.saved_tensors_hooks(pack, _same):
        made = run()
    del made
    return sum(kept.values())


def _same(tensor: Tensor) -> Tensor:
    return tensor


def _seconds(work: Callable[[], Any]) -> float:
    """The better of two."""
    found = []
    for _ in range(2):
        began = time.perf_counter()
        work()
        found.append(time.perf_counter() - began)
    return min(found)
