"""The budget `latency_ratio` of the pass `prune`: what units save is measured on the runtime, and so is the result."""

from __future__ import annotations

import os.path
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from compress.cost import Cost
from compress.errors import PassError, RefusedError
from export.backends import available

if TYPE_CHECKING:
    from torch import Tensor

    from compress.graph_times import Bench, Piece
    from compress.model.latent_diffusion import LatentDiffusion
    from compress.passes.base import PassContext
    from compress.pruning.axis import Axis, Network
    from compress.pruning.units import Chunk, Name
    from export.target import Target

TOLERANCE = 0.05
"""By how much of the budget the measured latency may exceed it."""
GRAPH_SECONDS = 1.0
"""Exporting, checking and timing the graph of one layer on one core of a server CPU."""
TRIES = 3
"""Of choosing; what the whole network takes corrects what is asked of its layers."""


def timed_target(targets: Sequence[Target]) -> Target:
    """The first target whose runtime is here and computes on the CPU.

    Raises:
        RefusedError: there is none.
    """
    for row in targets:
        if row.device == "cpu" and available(row.backend):
            return row
    raise RefusedError(
        "prune.latency_ratio: is measured on the first CPU target whose runtime is installed, and targets has none: "
        "add onnxruntime-cpu or openvino-cpu, or give macs_ratio"
    )


def timing_cost(axes: int, weights: int) -> Cost:
    """What the measurements will take, from a constant: a layer at three sizes for each axis.

    Args:
        axes: how many.
        weights: bytes of the denoiser.
    """
    return Cost("timing layers", 3 * axes * GRAPH_SECONDS, 4 * weights, "fewer prune.axes, or macs_ratio")


@dataclass(frozen=True)
class Choice:
    """What is removed, and what was measured of it.

    Attributes:
        removed: chunks.
        row: for the provenance; milliseconds of one call of the network, before, after, and as predicted; and what the
            network saves for each millisecond that its layers save by themselves.
    """

    removed: list[Chunk]
    row: dict[str, Any]

    @property
    def ratio(self) -> float:
        """The share of the latency that is left."""
        return float(self.row["after"] / self.row["before"])


def check_latency(row: Mapping[str, Any], budget: float, part: str) -> None:
    """Refuse what takes too long.

    Raises:
        PassError: says what was measured.
    """
    ratio = row["after"] / row["before"]
    if ratio > budget * (1.0 + TOLERANCE):
        raise PassError(
            f"prune.latency_ratio is {ratio:.3f}, more than {TOLERANCE:.0%} above {budget:g}: on {row['target']}, one "
            f"thread, a call of the {part} took {row['after']:.2f} ms of {row['before']:.2f} ms, where the times of "
            f"its layers predicted {row['predicted']:.2f} ms; give a lower latency_ratio, or more axes"
        )


def choose(
    model: LatentDiffusion,
    part: str,
    network: Network,
    axes: Sequence[Axis],
    losses: Mapping[Chunk, float],
    budget: float,
    context: PassContext,
) -> Choice:
    """Remove what loses least and saves enough time (LAPTOP-Diff, Zhang et al. 2024, arXiv 2404.11098, section 3.2).

    Units save what their layers by themselves do, times one factor for all: what the whole network saves without any of
    them, by the sum of it. What is chosen is measured too; where it misses the budget, more or less is asked for, by
    interpolation between what was measured.

    Args:
        model: uncut.
        part: of it.
        network: the part's.
        axes: of the network.
        losses: of every chunk, see `compress.importance.losses`.
        budget: share of the latency that may be left.
        context: targets, size and store.

    Raises:
        RefusedError: all together do not save enough.
    """
    from compress.graph_times import Bench
    from compress.pruning.knapsack import least_loss
    from compress.pruning.units import tree

    bench = Bench(timed_target(context.targets), context.store, context.progress)
    savings = _savings(model, part, network, axes, losses, bench, context)
    items = tree(list(losses), losses, savings)
    whole = _whole(model, part, network, context)
    least = _whole(model, part, _without(network, [item.what for item in items]), context)
    both = bench.milliseconds([whole, least], f"the {part}")
    before, most = both[whole.key], both[whole.key] - both[least.key]
    told = sum(item.saving for item in items)
    if told <= 0.0 or most < (1.0 - budget) * before:
        raise RefusedError(
            f"prune.latency_ratio: {budget:g} cannot be reached: with one step of each axis left, a call of the {part} "
            f"takes {both[least.key]:.2f} ms of {before:.2f} ms on {bench.target.name}, one thread; raise it, or add "
            "axes"
        )
    items = tree(list(losses), losses, {name: most / told * each for name, each in savings.items()})
    tried, points = list[Choice](), [(0.0, 0.0), (most, most)]  # what was saved, and what should have been
    for _ in range(TRIES):
        points.sort()
        wanted = float(np.interp((1.0 - budget) * before, [one for one, _ in points], [asked for _, asked in points]))
        taken = least_loss(items, wanted) or items
        removed, saved = [item.what for item in taken], sum(item.saving for item in taken)
        pair = [whole, _whole(model, part, _without(network, removed), context)]
        both = bench.milliseconds(pair, f"the {part} and what is left of it")
        first, after = (both[piece.key] for piece in pair)
        row = {
            "target": bench.target.name,
            "threads": 1,
            "before": first,
            "after": after,
            "predicted": first * (1.0 - saved / before),
            "layers": most / told,
        }
        tried.append(Choice(removed, row))
        if abs(tried[-1].ratio / budget - 1.0) <= TOLERANCE / 2.0:
            break
        points.append(((1.0 - after / first) * before, saved))
    return min(tried, key=lambda choice: abs(choice.ratio / budget - 1.0))


def _savings(
    model: LatentDiffusion,
    part: str,
    network: Network,
    axes: Sequence[Axis],
    losses: Mapping[Chunk, float],
    bench: Bench,
    context: PassContext,
) -> dict[Name, Tensor]:
    """Axis -> milliseconds that each of its units saves, float64 (units,)."""
    import torch

    from compress.graph_times import calls_of
    from compress.pruning.axis import DepthAxis
    from compress.pruning.units import name_of

    wholly = [path for axis in axes if isinstance(axis, DepthAxis) for unit in axis.units for path in unit]
    owners = {name_of(axis): _owner(axis) for axis in axes if not isinstance(axis, DepthAxis)}
    run = _runner(model, part, network, context)
    calls = calls_of(network, run, list(dict.fromkeys([*wholly, *owners.values()])))
    blocks = {path: calls[path].piece(network.get_submodule(path)) for path in wholly}
    sizes: dict[Name, list[tuple[int, Piece]]] = {}
    for axis in axes:
        if isinstance(axis, DepthAxis):
            continue
        own = [one for one in losses if one.axis is axis]
        path = owners[name_of(axis)]
        for count in sorted({0, -(-len(own) // 2), len(own)}):
            cut = _without(network, own[:count]) if count else network
            piece = calls[path].piece(cut.get_submodule(path))
            gone = sum(len(one.units) for one in own[:count])
            sizes.setdefault(name_of(axis), []).append((gone, piece))
    pieces = [*blocks.values(), *(piece for row in sizes.values() for _, piece in row)]
    times = bench.milliseconds(pieces, "layers")
    found = {}
    for axis in axes:
        if isinstance(axis, DepthAxis):
            units = [sum(times[blocks[path].key] for path in unit) for unit in axis.units]
            found[name_of(axis)] = torch.tensor(units, dtype=torch.float64)
        else:
            row = sizes[name_of(axis)]
            each = _slope([gone for gone, _ in row], [times[piece.key] for _, piece in row])
            found[name_of(axis)] = torch.full((axis.size,), each, dtype=torch.float64)
    return found


def _slope(gone: Sequence[int], times: Sequence[float]) -> float:
    """What a unit saves: the least-squares line through the times of a layer at some sizes, falling or level."""
    if len(gone) < 2:
        return 0.0
    return max(0.0, -float(np.polyfit(gone, times, 1)[0]))


def _owner(axis: Any) -> str:
    """The smallest module, its own or around it, that holds all parameters of an axis."""
    paths = [axis.module, *(one.parameter for one in axis.slices)]
    return os.path.commonpath([path.replace(".", "/") for path in paths]).replace("/", ".")


def _without(network: Network, removed: Sequence[Chunk]) -> Network:
    from compress.importance import sharing_copy
    from compress.pruning.structure import Structure, prune
    from compress.pruning.units import cuts_of

    other = sharing_copy(network)
    prune(other, cuts_of(removed), Structure())
    return other


def _over(model: LatentDiffusion, part: str, network: Network) -> Any:
    """The part over another network."""
    if part == "denoiser":
        return model.family.segments(network, None).segments[0].module
    return model.parts()[part].over(network)


def _inputs(model: LatentDiffusion, part: str, context: PassContext) -> dict[str, Tensor]:
    """Of one picture: two samples for the denoiser where the plan is guided."""
    from compress.example_inputs import example_inputs

    steps = () if model.step_plan is None else model.step_plan.steps
    batch = 2 if part == "denoiser" and any(step.guidance != "none" for step in steps) else 1
    return example_inputs(model, part, batch, context.height, context.width)


def _runner(model: LatentDiffusion, part: str, network: Network, context: PassContext) -> Any:
    module, inputs = _over(model, part, network), _inputs(model, part, context)
    return lambda: module(**inputs)


def _whole(model: LatentDiffusion, part: str, network: Network, context: PassContext) -> Piece:
    from compress.graph_times import piece_of

    module = _over(model, part, network)
    return piece_of(module, network, _inputs(model, part, context), tuple(module.outputs))
