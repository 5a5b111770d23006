"""Finds where error enters: the stage, the part, and the first bad layer."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import numpy as np

from compress.errors import PassError
from compress.measure.metrics import DB_CAP, latent_psnr_db, sqnr_db
from compress.report.report import Handover, Layer
from export.loop import PartFunction

if TYPE_CHECKING:
    from torch import nn

    from compress.model.latent_diffusion import LatentDiffusion

THRESHOLD_DB = 30.0
"""A layer whose output, given the same input, has less signal-to-noise than this is pointed out: int8 layers of a
healthy network lie between 33 and 50 dB, and a weight scale that is ten times too coarse leaves 28."""

Fill = Callable[[str, Mapping[str, np.ndarray]], Mapping[str, np.ndarray]]

_KEPT = 65536


@dataclass(frozen=True)
class LayerErrors:
    """The layers of one network, in the order of their first execution, compared with the reference.

    Attributes:
        layers: each with its own (local) and its inherited (cumulative) signal-to-noise ratio.
    """

    layers: tuple[Layer, ...]

    def worst(self) -> Layer:
        """The layer that loses most when given the same input."""
        return min(self.layers, key=lambda layer: layer.local_db)

    def ranked(self, count: int) -> tuple[Layer, ...]:
        """The layers that lose most when given the same input, worst first."""
        return tuple(sorted(self.layers, key=lambda layer: layer.local_db)[:count])

    def first_below(self, threshold_db: float = THRESHOLD_DB) -> Layer | None:
        """The first layer that loses more than is healthy when given the same input; None where none does."""
        return next((layer for layer in self.layers if layer.local_db < threshold_db), None)

    def largest_drop(self) -> Layer:
        """The layer at which the noise of the running network, as a share of the signal, rises most."""
        levels = [layer.local_db if layer.cumulative_db is None else layer.cumulative_db for layer in self.layers]
        shares = [0.0, *(10 ** (-level / 10) for level in levels)]
        rises = [after - before for before, after in pairwise(shares)]
        return self.layers[rises.index(max(rises))]


def compare_layers(
    reference: nn.Module, candidate: nn.Module, run: Callable[[nn.Module], object], prefix: str = ""
) -> LayerErrors:
    """Compare two versions of a network layer by layer.

    Every layer of the candidate is given the reference's own input (local error), and both networks run by
    themselves (cumulative error). Only layers with weights count: they are where a number format lives.

    Args:
        reference: in full precision.
        candidate: the same network with layers of the same names in other precision.
        run: runs either network on the same inputs, one or several times.
        prefix: put before the names of the layers.

    Raises:
        PassError: the networks have no layers in common, or none of them ran.
    """
    import torch

    layers = {
        name: module
        for name, module in reference.named_modules()
        if name and not list(module.children()) and list(module.parameters(recurse=False))
    }
    twins = {name: module for name, module in candidate.named_modules() if name in layers}
    if not twins:
        raise PassError("the two networks have no layers in common, so they cannot be compared layer by layer")
    local: dict[str, Ratio] = {}
    cumulative: dict[str, Ratio] = {}
    kept: dict[str, list[np.ndarray]] = {}

    def given_the_same(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
            expected = _sampled(output)
            local.setdefault(name, Ratio()).add(expected, _sampled(twins[name](*args, **kwargs)))
            kept.setdefault(name, []).append(expected)

        return hook

    def by_itself(name: str) -> Callable[..., None]:
        calls = iter(kept[name])

        def hook(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
            cumulative.setdefault(name, Ratio()).add(next(calls), _sampled(output))

        return hook

    with torch.inference_mode():
        hooks = [layers[name].register_forward_hook(given_the_same(name), with_kwargs=True) for name in twins]
        _run(run, reference, hooks)
        hooks = [twins[name].register_forward_hook(by_itself(name)) for name in kept]
        _run(run, candidate, hooks)
    if not local:
        raise PassError("none of the layers in common ran, so they cannot be compared layer by layer")
    found = [
        Layer(
            name=prefix + name, local_db=ratio.db(), cumulative_db=cumulative[name].db() if name in cumulative else None
        )
        for name, ratio in local.items()
    ]
    return LayerErrors(tuple(found))


def compare_parts(
    original: LatentDiffusion,
    compressed: LatentDiffusion,
    inputs: Mapping[str, Sequence[Mapping[str, np.ndarray]]],
    dialect: str | None = None,
) -> LayerErrors | None:
    """Compare every quantized part of a model with the original's, layer by layer.

    Args:
        original: uncut, in full precision.
        compressed: the same networks with quantization plans; one that is pruned is compared with itself in float.
        inputs: part -> the inputs of some of its calls, as a `Recorder` on the original's functions kept them.
        dialect: of the target; what its lowering rounds is rounded.

    Returns:
        The layers of all parts in the order text encoders, denoiser, VAE, named `part.module`; None where no part is
        quantized.
    """
    import torch

    from compress.quantization.fake_quantize import fake_quantized

    order = [*original.text_encoders, "denoiser", "vae_encoder", "vae_decoder"]
    layers: list[Layer] = []
    for part in order:
        if part not in compressed.quant_plans or part not in inputs:
            continue
        changed = compressed.denoiser if part == "denoiser" else compressed.parts()[part].component
        reference = original.parts()[part]
        network = original.denoiser if part == "denoiser" else reference.component
        if _shapes(network) != _shapes(changed):
            reference, network = compressed.parts()[part], changed
        rounded = fake_quantized(changed, compressed.quant_plans[part], dialect=dialect)
        calls = [{key: torch.from_numpy(np.array(value)) for key, value in call.items()} for call in inputs[part]]

        def run(module: nn.Module, part: str = part, whole: Any = reference, calls: Any = calls) -> None:
            if part == "denoiser":
                whole = original.family.segments(module, None)[0][0].module
            elif module is not whole.component:
                whole = type(whole)(module)
            for call in calls:
                whole(**call)

        layers += compare_layers(network, rounded, run, f"{part}.").layers
    return LayerErrors(tuple(layers)) if layers else None


def _shapes(network: nn.Module) -> dict[str, tuple[int, ...]]:
    return {name: tuple(tensor.shape) for name, tensor in network.state_dict().items()}


def _run(run: Callable[[nn.Module], object], network: nn.Module, hooks: Sequence[Any]) -> None:
    try:
        run(network)
    finally:
        for hook in hooks:
            hook.remove()


def _sampled(output: Any) -> np.ndarray:
    """At most `_KEPT` values of a layer's (first) output, evenly spread."""
    while isinstance(output, tuple | list):
        output = output[0]
    flat: np.ndarray = output.detach().float().reshape(-1).numpy()
    return flat[:: math.ceil(flat.size / _KEPT)].copy()


class Ratio:
    """Signal and noise power of one tensor, summed over calls.

    Attributes:
        seen: whether anything was added.
    """

    def __init__(self) -> None:
        self.seen = False
        self._signal = 0.0
        self._noise = 0.0

    def add(self, expected: np.ndarray, found: np.ndarray) -> None:
        """Add one call; a value that is not finite counts as infinite noise."""
        self.seen = True
        self._signal += float(np.square(expected, dtype=np.float64).sum())
        noise = float(np.square(np.subtract(found, expected, dtype=np.float64)).sum())
        self._noise += noise if math.isfinite(noise) else math.inf

    def db(self) -> float:
        """Signal-to-noise ratio, within +-`DB_CAP`."""
        if self._noise == 0.0:
            return DB_CAP
        if self._signal == 0.0 or math.isinf(self._noise):
            return -DB_CAP
        return min(max(10.0 * math.log10(self._signal / self._noise), -DB_CAP), DB_CAP)


class Shadow:
    """Functions that answer as the reference does, while a candidate is given the same inputs and compared.

    Bind `functions` to a runtime in place of the reference's own and generate: the run is the reference's, and
    `outputs` tells how well every output of every function of the candidate agrees.

    Args:
        reference: by name, as a runtime takes them.
        candidate: likewise; names that only one side has are left alone.
    """

    def __init__(self, reference: Mapping[str, PartFunction], candidate: Mapping[str, PartFunction]) -> None:
        self._ratios: dict[str, list[float]] = {}
        common = [name for name in reference if name in candidate]
        if not common:
            raise PassError("the two stages have no function in common, so they cannot be compared")
        self.functions: dict[str, PartFunction] = dict(reference)
        for name in common:
            self.functions[name] = self._both(name, reference[name], candidate[name])

    def _both(self, name: str, reference: PartFunction, candidate: PartFunction) -> PartFunction:
        def call(arrays: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
            expected, found = reference(arrays), candidate(arrays)
            for output, array in expected.items():
                if output in found:
                    ratio = sqnr_db(array, found[output])
                    self._ratios.setdefault(f"{name}: {output}", []).append(ratio)
            return expected

        return call

    @property
    def outputs(self) -> tuple[Layer, ...]:
        """Every output that was compared, at its worst call, worst first."""
        found = [Layer(name=name, local_db=min(ratios)) for name, ratios in self._ratios.items()]
        return tuple(sorted(found, key=lambda layer: layer.local_db))


class Recorder:
    """Functions that work as before while their inputs are kept, to feed a localiser with what a run really sees.

    Args:
        functions: by name, as a runtime takes them.
        fill: makes what is kept of a function's name and its inputs; every call is shown to it.
        limit: calls kept per function; once there are more, every second one is forgotten, so those kept are spread
            over the whole run.
    """

    def __init__(self, functions: Mapping[str, PartFunction], fill: Fill | None = None, limit: int = 4) -> None:
        self._fill, self._limit = fill, limit
        self._stride: dict[str, int] = {}
        self._seen: dict[str, int] = {}
        self.inputs: dict[str, list[dict[str, np.ndarray]]] = {}
        self.functions: dict[str, PartFunction] = {
            name: self._recorded(name, function) for name, function in functions.items()
        }

    def _recorded(self, name: str, function: PartFunction) -> PartFunction:
        def call(arrays: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
            self._keep(name, arrays if self._fill is None else self._fill(name, arrays))
            return function(arrays)

        return call

    def _keep(self, name: str, arrays: Mapping[str, np.ndarray]) -> None:
        kept, stride, seen = self.inputs.setdefault(name, []), self._stride.get(name, 1), self._seen.get(name, 0)
        if seen % stride == 0:
            kept.append({key: np.array(value) for key, value in arrays.items()})
            if len(kept) > self._limit:
                del kept[1::2]
                self._stride[name] = 2 * stride
        self._seen[name] = seen + 1


def handovers(stages: Mapping[str, np.ndarray]) -> tuple[Handover, ...]:
    """Compare the final latents of each stage with those of the stage before it.

    Args:
        stages: name -> latents (n, channels, h, w) of the same prompts and seeds, in the order of the flow.
    """
    names = list(stages)
    return tuple(
        Handover(before=before, after=after, psnr_db=latent_psnr_db(stages[before], stages[after]).value)
        for before, after in pairwise(names)
    )


def worst_stage(found: Sequence[Handover]) -> str | None:
    """Name the stage that loses most against the one before it; None where all agree to the last bit."""
    worst = min(found, key=lambda handover: handover.psnr_db, default=None)
    return None if worst is None or worst.psnr_db >= DB_CAP else worst.after
