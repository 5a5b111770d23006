"""Calibration: watch layers of the uncompressed model along the denoising runs that the engine will make."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from compress.errors import PassError, RefusedError
from compress.model.latent_diffusion import LatentDiffusion
from compress.quantization.attention import observed, scales
from compress.quantization.brevitas_layers import calibrated_grids, weight_scales, with_brevitas_layers
from compress.quantization.fake_quantize import round_to, rounded_weight
from compress.quantization.observers import Histogram
from export.quant_plan import Affine, AttentionQuant, LayerQuant, Op
from export.runtime import Runtime

if TYPE_CHECKING:
    from compress.passes.base import PassContext

Layers = Mapping[str, Sequence[str]]
"""Part name -> names of the layers in its component."""

Grids = Mapping[tuple[str, str], tuple[Affine, Affine | None]]
"""(part, layer) -> the grids of its input and, for convolutions, of its output."""

Watch = Callable[[str, str, nn.Module, Tensor, Tensor], None]
"""Called with (part, layer name, layer, input, output)."""


def run(floats: Runtime, context: PassContext, what: str) -> None:
    """Make one picture per calibration prompt.

    Every network call of the plan happens, for both halves of the guidance, so a layer sees the activations of all
    timesteps. Nothing is kept: whoever wants to know something registers hooks.

    Args:
        floats: the uncompressed model bound to its own step plan.
        context: prompts, seed and size.
        what: is being done, for progress.

    Raises:
        RefusedError: there are no prompts.
    """
    if not context.prompts:
        raise RefusedError("calibration needs at least one prompt")
    total = len(context.prompts)
    for first in range(0, total, context.batch):
        prompts = list(context.prompts[first : first + context.batch])
        seeds = [context.seed + first + i for i in range(len(prompts))]
        pictures = floats.generate(prompts, seeds, context.height, context.width)
        if "vae_encoder" in floats.functions:
            floats.encode_image(pictures)
        context.progress(what, first + len(prompts), total)


def observe(model: LatentDiffusion, layers: Layers, observer: str, context: PassContext) -> Grids:
    """The grids of every layer's input, and of the outputs of convolutions.

    `average` lets Brevitas calibrate: the average over network calls of each call's interval. The other observers
    are this project's, because an average cannot hold the largest range of a trajectory: they look at one histogram
    over all timesteps.

    Raises:
        PassError: a layer never ran, or an activation is not finite.
    """
    if observer == "average":
        return _observe_with_brevitas(model, layers, context)
    inputs: dict[tuple[str, str], Histogram] = {}
    outputs: dict[tuple[str, str], Histogram] = {}

    def watch(part: str, name: str, layer: nn.Module, x: Tensor, y: Tensor) -> None:
        inputs.setdefault((part, name), Histogram()).update(x)
        if isinstance(layer, nn.Conv2d):
            outputs.setdefault((part, name), Histogram()).update(y)

    with watching(model, layers, watch):
        run(model.runtime(simulate=False), context, "calibrate")
    _all_ran(layers, set(inputs))
    return {
        key: (seen.grid(observer), outputs[key].grid(observer) if key in outputs else None)
        for key, seen in inputs.items()
    }


def observe_attention(model: LatentDiffusion, names: Sequence[str], context: PassContext) -> dict[str, AttentionQuant]:
    """The scales of the queries and keys of attention modules of the denoiser.

    Raises:
        PassError: a module computes no scaled dot product, or a number is not finite.
    """
    with observed(model.denoiser, names) as largest:
        run(model.runtime(simulate=False), context, "calibrate attention")
    _all_ran({"denoiser": names}, {("denoiser", name) for name in largest})
    return scales(largest)


def correct_biases(
    model: LatentDiffusion, quants: Mapping[str, Mapping[str, LayerQuant]], context: PassContext
) -> None:
    """Add to each bias by how much quantization shifts its output channel on average; layers without one stay.

    Each layer sees float inputs, so the error of earlier layers is not compensated again in later ones. Source: Nagel
    et al. 2019, arXiv 1906.04721, section 4.2, measured on calibration data.
    """
    sums: dict[Any, Tensor] = {}
    counts: dict[Any, int] = {}
    weights: dict[Any, Tensor] = {}

    def watch(part: str, name: str, layer: Any, x: Tensor, y: Tensor) -> None:
        quant = quants[part][name]
        if layer not in sums:
            sums[layer], counts[layer] = torch.zeros(len(quant.weight_scale), dtype=torch.float64), 0
            weights[layer] = rounded_weight(layer.weight, quant)
        rounded = x if quant.input is None else round_to(x, quant.input)
        if isinstance(layer, nn.Conv2d):
            error = (y - layer._conv_forward(rounded, weights[layer], layer.bias)).movedim(1, -1)
        else:
            error = y - nn.functional.linear(rounded, weights[layer], layer.bias)
        error = error.reshape(-1, error.shape[-1])
        sums[layer] += error.sum(0, dtype=torch.float64)
        counts[layer] += error.shape[0]

    components = {part: _component(model, part) for part in quants}
    layers = {
        part: [name for name in own if getattr(components[part].get_submodule(name), "bias", None) is not None]
        for part, own in quants.items()
    }
    with watching(model, layers, watch):
        run(model.runtime(simulate=False), context, "correct biases")
    with torch.no_grad():
        for layer, total in sums.items():
            layer.bias += (total / counts[layer]).to(layer.bias.dtype)


@contextlib.contextmanager
def watching(model: LatentDiffusion, layers: Layers, watch: Watch) -> Iterator[None]:
    """Call `watch` at every call of the named layers."""
    handles = []

    def attach(part: str, name: str) -> None:
        layer = _component(model, part).get_submodule(name)
        hook = layer.register_forward_hook(lambda module, args, output: watch(part, name, module, args[0], output))
        handles.append(hook)

    try:
        for part, names in layers.items():
            for name in names:
                attach(part, name)
        yield
    finally:
        for handle in handles:
            handle.remove()


def layer_quants(
    model: LatentDiffusion, chosen: Mapping[str, Mapping[str, str]], grids: Grids
) -> dict[str, dict[str, LayerQuant]]:
    """The numbers of each layer: the scales Brevitas gives its weights, and the grids of its activations.

    Args:
        model: holds the weights.
        chosen: part -> layer -> scheme.
        grids: of the layers that were observed; the others keep float activations.
    """
    quants: dict[str, dict[str, LayerQuant]] = {}
    for part, own in chosen.items():
        quantized = with_brevitas_layers(_component(model, part), own.keys(), activations=False)
        quants[part] = {}
        for name, scheme in own.items():
            layer = quantized.get_submodule(name)
            op: Op = "conv" if isinstance(layer, nn.Conv2d) else "linear"
            quants[part][name] = LayerQuant(op, scheme, weight_scales(layer), *grids.get((part, name), (None, None)))
    return quants


def _observe_with_brevitas(model: LatentDiffusion, layers: Layers, context: PassContext) -> Grids:
    from brevitas.graph.calibrate import calibration_mode

    copy = model.clone()
    names: dict[str, set[str]] = {}
    for part, own in layers.items():
        names.setdefault(_place(part), set()).update(own)
    for place, own_names in names.items():
        swapped = with_brevitas_layers(_network(copy, place), own_names)
        if place in copy.text_encoders:
            copy.text_encoders[place] = swapped
        else:
            setattr(copy, place, swapped)
    floats = copy.runtime(simulate=False)  # first, since binding the networks ends their training mode
    with contextlib.ExitStack() as stack:
        for place in names:
            stack.enter_context(calibration_mode(_network(copy, place)))
        ran: set[tuple[str, str]] = set()
        with watching(copy, layers, lambda part, name, *_: ran.add((part, name))):
            run(floats, context, "calibrate")
    _all_ran(layers, ran)
    return {
        (part, name): calibrated_grids(_component(copy, part).get_submodule(name))
        for part, own in layers.items()
        for name in own
    }


def _all_ran(layers: Layers, ran: set[tuple[str, str]]) -> None:
    idle = sorted({f"{part}.{name}" for part, own in layers.items() for name in own} - {".".join(key) for key in ran})
    if idle:
        raise PassError(
            f"{len(idle)} layers never ran in calibration, e.g. {idle[0]}; leave them out with a `layers` rule"
        )


def _place(part: str) -> str:
    return "vae" if part.startswith("vae_") else part


def _network(model: LatentDiffusion, place: str) -> nn.Module:
    found: nn.Module = model.text_encoders[place] if place in model.text_encoders else getattr(model, place)
    return found


def _component(model: LatentDiffusion, part: str) -> nn.Module:
    return _network(model, _place(part))
