"""What quantization will take of time and memory, from a few measured calls of the very model."""

from __future__ import annotations

import statistics as summary
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from compress import calibrate
from compress.cost import Cost
from compress.example_inputs import example_inputs
from compress.peak_memory import PeakMemory, resident_bytes
from compress.quantization import statistics
from compress.quantization.checks import check_layer
from compress.quantization.layer import Methods, channel_errors, quantized_layer
from compress.quantization.scheme import Scheme
from compress.quantization.statistics import LayerStatistics, Observed
from compress.sensitivity import POSITIONS, SAMPLES
from export.quant_plan import LayerQuant

if TYPE_CHECKING:
    from compress.model.latent_diffusion import LatentDiffusion
    from compress.passes.base import PassContext

LAYERS = 12
"""Quantized by a probe, beside the largest."""
HASHED = 3
"""How often the model is hashed: as what the pass, and calibration, are kept under, and again with its plans."""
CHECKED = 2
"""How often a layer is checked: when it is made, and when it is read back."""
_WARM = 2
"""Calls that are timed, after one that is not."""

Key = tuple[str, str]


@dataclass(frozen=True)
class Work:
    """What the pass will do.

    Attributes:
        rows: layer that gets few bits -> its scheme.
        watched: part -> its layers whose inputs are watched.
        backwards: of the denoiser's layers, those whose sensitivity is wanted; none goes no way back.
        floats: of the denoiser's layers, those that are compared with float weights and inputs.
        methods: how layers are quantized.
        kept: rows of inputs that are kept of each layer.
        passes: how often calibration is run.
    """

    rows: Mapping[Key, Scheme]
    watched: Mapping[str, Sequence[str]]
    backwards: Sequence[str]
    floats: Sequence[str]
    methods: Methods
    kept: int
    passes: int = 1


def costs(model: LatentDiffusion, work: Work, context: PassContext) -> list[Cost]:
    """Time and memory of calibration, of going backwards, and of quantizing the layers.

    One call of every part at the batch of calibration, watched as it will be; one call of the denoiser backwards; and a
    dozen layers of all sizes, and the largest, quantized as they will be. All else follows from how often each is done.

    Args:
        model: float, with its step plan.
        work: what the pass will do.
        context: of the pass.
    """
    plan = model.step_plan
    calls = 1 if plan is None else plan.network_calls
    halves = 2 if plan is not None and any(step.guidance != "none" for step in plan.steps) else 1
    batch = max(1, min(context.batch, len(context.prompts)))
    batches = -(-len(context.prompts) // batch)
    before = resident_bytes()
    found = []
    with tempfile.TemporaryDirectory() as folder, statistics.writing(Path(folder)) as file:
        seconds, seen = 0.0, dict[Key, LayerStatistics]()
        with PeakMemory() as peak:
            for part in model.parts():
                inputs = example_inputs(
                    model, part, batch * (1 if part.startswith("vae") else halves), context.height, context.width
                )
                times = work.passes * batches * (calls if part == "denoiser" else 1)
                seconds += times * _seconds(_watching(model, part, work, inputs, -(-work.kept // times), {}, file))
                _watching(model, part, work, inputs, work.kept, seen, file)()
        found.append(Cost("calibration", seconds, peak.bytes - before, "fewer calibration.samples or sampler.steps"))
        if work.backwards:
            found.append(_backwards(model, work, calls, halves, min(SAMPLES, len(context.prompts)), context, before))
        found.append(_layers(model, work, seen, before))
    began = time.perf_counter()
    model.state_hash()
    found.append(Cost("hashes", HASHED * (time.perf_counter() - began), 0, "a smaller model"))
    return found


def _watching(
    model: LatentDiffusion,
    part: str,
    work: Work,
    inputs: Mapping[str, Tensor],
    rows: int,
    seen: dict[Key, LayerStatistics],
    file: statistics.RowFile,
) -> Callable[[], None]:
    """A call of a part as calibration makes it, with as many rows of inputs kept; statistics go to `seen`."""
    module, layers = model.parts()[part], {part: list(work.watched.get(part, ()))}
    own = dict[Key, Observed]()

    def watch(part: str, name: str, layer: nn.Module, x: Tensor, y: Tensor) -> None:
        key = part, name
        if key not in own:
            own[key] = seen[key] = Observed(f"{part}.{name}", layer, rows, file)
        own[key].update(x, y)

    def call() -> None:
        with calibrate.watching(model, layers, watch), torch.inference_mode():
            module(**inputs)

    return call


def _backwards(
    model: LatentDiffusion, work: Work, calls: int, halves: int, samples: int, context: PassContext, before: int
) -> Cost:
    """The denoising run of a few samples, and the way back through every call of it."""
    side = int(model.latent["downscale"])
    places = context.height // side * (context.width // side)
    together = min(samples * halves, max(1, POSITIONS // places))
    module = model.parts()["denoiser"]
    inputs = example_inputs(model, "denoiser", together, context.height, context.width)
    latent = model.runtime(simulate=False).latent_input

    def backwards() -> None:
        given = {**inputs, latent: inputs[latent].clone().requires_grad_()}
        with torch.enable_grad(), _wanting_gradients(model, work.backwards):
            module(**given)[0].square().sum().backward()

    with PeakMemory() as peak:
        back = _seconds(backwards)
        with torch.inference_mode():
            forward = _seconds(
                lambda: module(**example_inputs(model, "denoiser", samples * halves, context.height, context.width))
            )
    seconds = calls * (forward + -(-samples * halves // together) * back)
    return Cost("going backwards", seconds, peak.bytes - before, "float_share: 0.0 in the pass quantize")


@contextmanager
def _wanting_gradients(model: LatentDiffusion, names: Sequence[str]) -> Iterator[None]:
    """Sum the squared gradients of the outputs of layers, and keep nothing, as `compress.sensitivity` does."""

    def hook(layer: nn.Module, _: Any, output: Tensor) -> None:
        if not output.requires_grad:
            output.requires_grad_()
        others = [at for at in range(output.ndim) if at != (1 if isinstance(layer, nn.Conv2d) else output.ndim - 1)]
        output.register_hook(lambda gradient: (gradient.double().square().sum(others), None)[1])

    handles = [model.denoiser.get_submodule(name).register_forward_hook(hook) for name in names]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _layers(model: LatentDiffusion, work: Work, seen: Mapping[Key, LayerStatistics], before: int) -> Cost:
    """Quantizing the layers: one of a dozen of like size is, and the others take as long for as many weights."""
    sizes = {key: _weight(model, key).numel() for key in work.rows}
    order = sorted(sizes, key=lambda key: (sizes[key], key))
    each = -(-max(1, len(order) - 1) // LAYERS)
    alike = [order[at : at + each] for at in range(0, len(order) - 1, each)] + [order[-1:]]
    seconds, numbers = 0.0, 0
    with PeakMemory() as peak:
        for keys in filter(None, alike):
            sampled = keys[len(keys) // 2]
            began = time.perf_counter()
            quant = _quantized(model, work, seen, sampled)
            seconds += (time.perf_counter() - began) * sum(sizes[key] for key in keys) / sizes[sampled]
            if quant.weight.numbers is not None:
                numbers += quant.weight.numbers.itemsize * sum(sizes[key] for key in keys)
    return Cost("quantizing layers", seconds, peak.bytes - before + numbers, "rounding: nearest in the pass quantize")


def _quantized(model: LatentDiffusion, work: Work, seen: Mapping[Key, LayerStatistics], key: Key) -> LayerQuant:
    layer = calibrate.component_of(model, key[0]).get_submodule(key[1])
    quant = quantized_layer(layer, work.rows[key], seen.get(key), work.methods)
    if key[0] == "denoiser" and key[1] in work.floats:
        for one in (quant, replace(quant, input=None, output=None, bias=None)):
            channel_errors(layer, one, seen[key], 1, 1)
    for _ in range(CHECKED):
        check_layer(".".join(key), layer, quant)
    return quant


def _weight(model: LatentDiffusion, key: Key) -> Tensor:
    weight: Tensor = calibrate.component_of(model, key[0]).get_submodule(key[1]).weight  # type: ignore[assignment]
    return weight


def _seconds(call: Callable[[], object]) -> float:
    """Seconds of a call: the mean of two after one that warms up."""
    seconds = []
    for _ in range(_WARM + 1):
        began = time.perf_counter()
        call()
        seconds.append(time.perf_counter() - began)
    return summary.mean(seconds[1:])
