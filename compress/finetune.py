"""Selective finetuning: what quantization hurts most learns to give the float denoiser's output again.

Source: Wang et al. 2025, arXiv 2402.03666 (QuEST): the layers that read the timestep, the layers most sensitive to few
bits, and the scales of activations are trained against the float model, and nothing else. Here gradients go straight
through the rounding, the scales of weights stay, and biases learn too.
"""

from __future__ import annotations

import copy
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from compress.errors import PassError
from compress.quantization.fake_quantize import computed
from compress.quantization.rounding import round_input, round_weight, scales_of, to_element
from compress.quantization.transforms import InputTransform, product, weight_of
from export.elements import element
from export.grids import Affine, Scaled
from export.quant_plan import LayerQuant, QuantPlan

if TYPE_CHECKING:
    from compress.model.latent_diffusion import LatentDiffusion
    from compress.passes.base import PassContext

RECORDS = 4
"""Samples kept of every network call of every batch, guidance halves counted apart."""
TOGETHER = 4
"""Network calls, at random timesteps, whose gradients make one step."""
JUDGED = 4
"""How often on the way the error over all records is taken; the best plan is kept, the first one included."""
NUMBER_RATE, SCALE_RATE, BIAS_RATE = 1e-2, 1e-3, 1e-4
"""Learning rates of weights, in units of their scale; of the logarithm of scales; and of biases."""


@dataclass(frozen=True)
class Record:
    """Some samples of one network call: inputs by name, and what the float denoiser gives."""

    inputs: Mapping[str, np.ndarray]
    output: np.ndarray


def recorded(model: LatentDiffusion, context: PassContext, what: str = "record outputs") -> list[Record]:
    """Network calls of the float denoiser along the calibration runs; `RECORDS` samples of each, at random."""
    from compress.calibrate import run

    floats = model.runtime(simulate=False)
    random, records = np.random.default_rng(context.seed), list[Record]()
    functions = dict(floats.functions)
    whole = model.family.segments(model.denoiser, None).segments[0]
    denoise = model.parts()["denoiser"]
    if set(whole.inputs) - {key for names in floats.plan.segments.values() for key in names.inputs}:
        raise PassError("finetuning needs an uncut denoiser: put quantize before cache")
    name = whole.name
    inner = functions[name]

    def watched(arrays: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        made = inner(arrays)
        output = made[denoise.outputs[0]]
        chosen = np.sort(random.permutation(len(output))[:RECORDS])
        taken = {key: _some(np.asarray(arrays[key]), chosen, len(output)) for key in denoise.inputs}
        records.append(Record(taken, output[chosen]))
        return made

    functions[name] = watched
    run(floats.altered(functions=functions), context, what)
    return records


def _some(array: np.ndarray, chosen: np.ndarray, samples: int) -> np.ndarray:
    return array[chosen] if array.ndim and len(array) == samples else array


def finetuned(
    model: LatentDiffusion,
    plan: QuantPlan,
    records: Sequence[Record],
    selected: Collection[str],
    steps: int,
    context: PassContext,
) -> QuantPlan:
    """The plan with other numbers in the selected layers, other static input scales and biases; never a worse one.

    Args:
        model: its denoiser is float, and stays.
        plan: of the denoiser.
        records: of the float denoiser.
        selected: layers whose weights learn.
        steps: of Adam.
        context: gives the seed, and hears of progress.

    Raises:
        PassError: the error is not finite.
    """
    denoiser = copy.deepcopy(model.denoiser).requires_grad_(False)
    layers = {}
    for name, quant in plan.layers.items():
        layers[name] = _Trained(denoiser.get_submodule(name), quant, name in selected)
        denoiser.get_submodule(name).forward = layers[name]
    part = model.family.segments(denoiser, None).segments[0].module
    device = next(denoiser.parameters()).device
    groups = [
        {"params": [p for layer in layers.values() for p in getattr(layer, kind)], "lr": rate}
        for kind, rate in (("numbers", NUMBER_RATE), ("scales", SCALE_RATE), ("biases", BIAS_RATE))
    ]
    adam = torch.optim.Adam([group for group in groups if group["params"]], betas=(0.9, 0.95))
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(adam, steps)
    random = np.random.default_rng(context.seed)

    def error(record: Record) -> Tensor:
        inputs = {key: torch.from_numpy(value).to(device) for key, value in record.inputs.items()}
        target = torch.from_numpy(record.output).to(device)
        return (part(**inputs)[0] - target).square().mean() / target.square().mean()

    @torch.no_grad()
    def judged() -> float:
        return sum(float(error(record)) for record in records)

    best = judged(), dict(plan.layers)
    for step in range(steps):
        adam.zero_grad()
        for at in random.integers(len(records), size=TOGETHER):
            with torch.enable_grad():
                loss = error(records[at]) / TOGETHER
                loss.backward()
            if not torch.isfinite(loss):
                raise PassError("the error of the quantized denoiser is not finite, so it cannot be finetuned")
        adam.step()
        schedule.step()
        context.progress("finetune", step + 1, steps)
        if (step + 1) % max(1, steps // JUDGED) == 0 or step + 1 == steps:
            now = judged()
            if now < best[0]:
                best = now, {name: layer.result() for name, layer in layers.items()}
    return replace(plan, layers=best[1])


class _Trained:
    """The computation of a quantized layer, through whose rounding gradients go straight.

    Attributes:
        numbers, scales, biases: what learns: offsets of the weights in units of their scale; the logarithm of what the
            input scale is multiplied by; the bias.
    """

    def __init__(self, layer: Any, quant: LayerQuant, learns: bool) -> None:
        self.layer, self.quant = layer, quant
        with torch.no_grad():
            self.weights = weight_of(layer.weight, quant)
            self.rounded = round_weight(self.weights, quant.weight)
        device = self.rounded.device
        self.transform = InputTransform(quant, device)
        self.steps = scales_of(quant.weight, self.rounded.shape[1], device)
        self.branch = None if quant.low_rank is None else product(quant.low_rank, device)
        own = layer.bias
        bias = own if quant.bias is None else torch.from_numpy(quant.bias).to(device)
        self.bias = None if bias is None else bias.detach().float().clone().requires_grad_()
        self.numbers = [torch.zeros_like(self.rounded, requires_grad=True)] if learns else []
        scaled = isinstance(quant.input, Affine | Scaled)
        self.scales = [torch.zeros((), device=device, requires_grad=True)] if scaled else []
        self.biases = [] if self.bias is None else [self.bias]

    def __call__(self, x: Tensor) -> Tensor:
        x = self.transform(x)
        y = computed(self.layer, self._input(x), self._weight(), self.bias)
        return y if self.branch is None else y + computed(self.layer, x, self.branch, None)

    def _input(self, x: Tensor) -> Tensor:
        grid = self.quant.input
        if grid is None:
            return x
        if not self.scales:
            return x + (round_input(x, grid, -1 if self.quant.op == "linear" else 1) - x).detach()
        scale = grid.scale * self.scales[0].exp()  # type: ignore[union-attr]
        y = x / scale
        if isinstance(grid, Affine):
            y = (y + (torch.round(y) - y).detach()).clamp(-grid.zero_point, grid.levels - grid.zero_point)
        else:
            kind = element(grid.element)
            y = y.clamp(-kind.largest, kind.largest)
            y = y + (to_element(y, kind) - y).detach()
        return y * scale

    def _weight(self) -> Tensor:
        if not self.numbers:
            return self.rounded
        moved = self.rounded + self.numbers[0] * self.steps
        kind = element(self.quant.weight.element)
        return moved + (to_element(moved / self.steps, kind) * self.steps - moved).detach()

    @torch.no_grad()
    def result(self) -> LayerQuant:
        """The layer with what it has learned."""
        quant = self.quant
        if self.numbers:
            kind = element(quant.weight.element)
            numbers = to_element(self.rounded / self.steps + self.numbers[0], kind).cpu().numpy()
            numbers = numbers.astype(np.int8 if kind.is_integer else np.float16)
            quant = replace(quant, weight=replace(quant.weight, numbers=numbers))
        if self.scales and isinstance(quant.input, Affine | Scaled):
            scale = float(np.float32(quant.input.scale * float(self.scales[0].exp())))
            quant = replace(quant, input=replace(quant.input, scale=scale))
        if self.bias is not None:
            quant = replace(quant, bias=self.bias.detach().cpu().numpy())
        return quant
