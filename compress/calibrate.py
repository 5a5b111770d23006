"""Calibration: watch layers of the uncompressed model along the denoising runs that the engine will make."""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from torch import Tensor, nn

from compress.errors import PassError, RefusedError
from compress.model.latent_diffusion import LatentDiffusion
from compress.quantization import statistics
from compress.quantization.attention import observed, scales
from compress.quantization.statistics import LayerStatistics, Observed, RowFile
from export.loop import Lags
from export.plan_rows import Step
from export.quant_plan import AttentionQuant
from export.runtime import Runtime

if TYPE_CHECKING:
    from compress.passes.base import PassContext

Layers = Mapping[str, Sequence[str]]
"""Part name -> names of the layers in its component."""

Weights = Mapping[str, Sequence[float]]
"""Layer of the denoiser -> how much each network call counts."""

Watch = Callable[[str, str, nn.Module, Tensor, Tensor], None]
"""Called with (part, layer name, layer, input, output)."""

ROWS = 2048
"""Rows of inputs that are kept of each layer, from all its calls alike."""


def run(floats: Runtime, context: PassContext, what: str, ended: Callable[[int], None] = lambda row: None) -> None:
    """Make one picture per calibration prompt.

    Every network call of the plan happens, for both halves of the guidance, so a layer sees the activations of all
    timesteps. Nothing is kept: whoever wants to know something registers hooks.

    Args:
        floats: the uncompressed model bound to its own step plan.
        context: prompts, seed and size.
        what: is being done, for progress.
        ended: is told every row of the plan whose network call has been made.

    Raises:
        RefusedError: there are no prompts.
    """
    if not context.prompts:
        raise RefusedError("calibration needs at least one prompt")
    total = len(context.prompts)
    batches = -(-total // context.batch)
    rows = len(floats.plan.steps)
    for first in range(0, total, context.batch):
        prompts = list(context.prompts[first : first + context.batch])
        seeds = [context.seed + first + i for i in range(len(prompts))]

        def told(row: int, step: Step, _: Lags, __: Lags, done: int = rows * (first // context.batch)) -> Step:
            context.progress(what, done + row, rows * batches)
            ended(row)
            return step

        latents = floats.sample(prompts, seeds, context.height, context.width, revise=told)
        pictures = floats.decode(latents)
        if "vae_encoder" in floats.functions:
            floats.encode_image(pictures)
    context.progress(what, rows * batches, rows * batches)


def observe(
    model: LatentDiffusion, layers: Layers, context: PassContext, *, rows: int = ROWS, weights: Weights | None = None
) -> dict[tuple[str, str], LayerStatistics]:
    """What the layers see along the calibration runs: (part, layer) -> its statistics.

    They are kept in the store, where there is one, under everything they depend on: other number formats and methods
    use them again. Rows of inputs go to the disk as they come.

    Args:
        model: uncompressed; its step plan is run.
        layers: to watch.
        context: prompts, seed and size.
        rows: of the inputs of each layer to keep; 0 keeps histograms alone.
        weights: how much the calls count; all alike unless given.

    Raises:
        PassError: a layer never ran, or an activation is not finite.
    """

    def make(folder: Path) -> None:
        with statistics.writing(folder) as file:
            statistics.save(folder, _watched(model, layers, context, rows, weights or {}, file))

    if context.store is None:
        with tempfile.TemporaryDirectory() as folder:
            make(Path(folder))
            return statistics.load(Path(folder))
    inputs = {
        "what": "calibration",
        "model": model.state_hash(),
        "layers": {part: list(names) for part, names in layers.items()},
        "rows": rows,
        "weights": {name: list(own) for name, own in (weights or {}).items()},
        "runs": [list(context.prompts), context.seed, context.height, context.width, context.batch],
    }
    return context.store.fetch(inputs, make, statistics.load)


def _watched(
    model: LatentDiffusion, layers: Layers, context: PassContext, rows: int, weights: Weights, file: RowFile
) -> dict[tuple[str, str], LayerStatistics]:
    batches = -(-len(context.prompts) // context.batch)
    calls = 1 if model.step_plan is None else model.step_plan.network_calls
    seen: dict[tuple[str, str], Observed] = {}
    row = 0

    def ended(at: int) -> None:
        nonlocal row
        row = (at + 1) % calls

    def watch(part: str, name: str, layer: nn.Module, x: Tensor, y: Tensor) -> None:
        if (part, name) not in seen:
            times = batches * (calls if part == "denoiser" else 1)
            seen[part, name] = Observed(f"{part}.{name}", layer, -(-rows // times), file)
        try:
            own = weights.get(name) if part == "denoiser" else None
            seen[part, name].update(x, y, 1.0 if own is None else own[row])
        except PassError as error:
            raise PassError(f"{part}.{name}: {error}") from None

    with watching(model, layers, watch):
        run(model.runtime(simulate=False), context, "calibrate", ended)
    _all_ran(layers, set(seen))
    return dict(seen)


def observe_attention(model: LatentDiffusion, names: Sequence[str], context: PassContext) -> dict[str, AttentionQuant]:
    """The scales of the queries and keys of attention modules of the denoiser.

    Raises:
        PassError: a module computes no scaled dot product, or a number is not finite.
    """
    with observed(model.denoiser, names) as largest:
        run(model.runtime(simulate=False), context, "calibrate attention")
    _all_ran({"denoiser": names}, {("denoiser", name) for name in largest})
    return scales(largest)


@contextlib.contextmanager
def watching(model: LatentDiffusion, layers: Layers, watch: Watch) -> Iterator[None]:
    """Call `watch` at every call of the named layers."""
    handles = []

    def attach(part: str, name: str) -> None:
        layer = component_of(model, part).get_submodule(name)
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


def component_of(model: LatentDiffusion, part: str) -> nn.Module:
    """The network that holds the layers of a part."""
    place = "vae" if part.startswith("vae_") else part
    found: nn.Module = model.text_encoders[place] if place in model.text_encoders else getattr(model, place)
    return found


def _all_ran(layers: Layers, ran: set[tuple[str, str]]) -> None:
    idle = sorted({f"{part}.{name}" for part, own in layers.items() for name in own} - {".".join(key) for key in ran})
    if idle:
        raise PassError(
            f"{len(idle)} layers never ran in calibration, e.g. {idle[0]}; leave them out with a `layers` rule"
        )
