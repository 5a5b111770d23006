"""Whole denoising runs of a network with random weights: eager, compiled, and ours in bf16, fp8 and with a cache."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from kernels.denoise_step import DenoisingState, begin, denoise_step
from recipes.benchmarks.gpu.bench import Bar, Bench, Row, judged, relative_error
from recipes.benchmarks.gpu.clock import graphed, launches
from recipes.benchmarks.gpu.networks import (
    MMDIT,
    REPEATED,
    TINY_MMDIT,
    TINY_UNET,
    UNET,
    Eager,
    MMDiT,
    Operations,
    Sizes,
    UNet,
)
from recipes.benchmarks.gpu.ours import Ours, OursFp8
from recipes.benchmarks.gpu.steps import eager_step, multistep

COMPILED_BLOCKS = "compiled blocks, one graph"

INTERVAL = 3
"""Every third call runs the whole network; the others take its deep part from the last whole call."""

BARS = {"unet": (Bar(2.0, "compiled"), Bar(2.0, COMPILED_BLOCKS), Bar(4.0, "eager"))}

OPERATIONS = Eager()


def unet(bench: Bench) -> Iterator[Row]:
    """SDXL's UNet, 1024 x 1024 pixels."""
    yield from _runs(bench, "unet", UNet, TINY_UNET if bench.tiny else UNET)


def mmdit(bench: Bench) -> Iterator[Row]:
    """The MMDiT of Stable Diffusion 3 medium, 1024 x 1024 pixels."""
    yield from _runs(bench, "mmdit", MMDiT, TINY_MMDIT if bench.tiny else MMDIT)


class Subject:
    """A network with one prompt, guided, and the buffers of its runs."""

    def __init__(self, bench: Bench, make: Callable[[Sizes], nn.Module], sizes: Sizes) -> None:
        torch.manual_seed(0)
        with torch.device(bench.device):
            network = make(sizes)
        self.network = network.to(torch.bfloat16).to(memory_format=torch.channels_last).eval()
        self.first = bench.randn(1, *sizes.latent, dtype=torch.float32)
        self.text = bench.randn(2, *sizes.text, seed=1)
        self.table = multistep(4 if bench.tiny else 20)
        self.state = begin(self.table, self.first, dtype=torch.bfloat16)

    def peer(self, network: Callable[..., Any], capture: bool) -> Callable[[], Tensor]:
        """The loop as it is written in Python, scheduler in eager torch; `capture` copies what a graph overwrites."""
        times = [float(t) for t in (self.table.first_timestep, *self.table.coefficients[:-1, 4])]
        numbers = [(0.9, -0.5, 0.0 if row == 0 else 0.15) for row in range(len(times))]

        def run() -> Tensor:
            latent, before = self.first, torch.zeros_like(self.first)
            given = torch.cat([latent, latent]).to(torch.bfloat16)
            for t, three in zip(times, numbers, strict=True):
                if capture:
                    torch.compiler.cudagraph_mark_step_begin()
                output, _ = network(given, torch.full((2,), t, device=given.device), self.text)
                latent, given, before = eager_step(latent, output, before, three)
            return latent

        return run

    def ours(self, operations: Operations, cached: bool) -> Callable[[], Tensor]:
        """The loop with the fused step, all of it fit to be recorded."""

        def run() -> Tensor:
            self.restart()
            deep: Tensor | None = None
            for row in range(self.table.rows):
                kept = deep if cached and row % INTERVAL else None
                output, deep = self.network(*_given(self.state), self.text, operations, kept)
                denoise_step(self.state, output.contiguous())
            return self.state.latent(self.table.rows)

        return run

    def restart(self) -> None:
        """Begin again, in a way that a graph can hold."""
        self.state.restart(self.first)


def _given(state: DenoisingState) -> tuple[Tensor, Tensor]:
    return state.network_input, state.timestep.expand(len(state.network_input))


def _runs(bench: Bench, name: str, make: Callable[[Sizes], nn.Module], sizes: Sizes) -> Iterator[Row]:
    """One row per way to run; errors are those of the last latents against eager."""
    subject = Subject(bench, make, sizes)
    parameters = sum(p.numel() for p in subject.network.parameters())
    flops = _flops(subject)
    eager = partial(subject.network, ops=OPERATIONS)
    times: dict[str, float] = {}
    base: dict[str, Any] = {"network": name, "parameters": parameters, "calls": subject.table.rows, "flops": flops}
    reference = subject.peer(eager, False)
    ways: dict[str, Callable[[], Callable[[], Tensor]]] = {
        "eager": lambda: reference,
        "ours": lambda: subject.ours(Ours(), False),
        "ours fp8": lambda: subject.ours(OursFp8(subject.network), False),
        "ours fp8 cached": lambda: subject.ours(OursFp8(subject.network), True),
    }
    if bench.device.type == "cuda":
        ways = {"eager": ways.pop("eager"), "eager, one graph": lambda: reference, **ways}
    if bench.compile:
        ways[COMPILED_BLOCKS] = lambda: subject.peer(partial(_compiled_blocks(subject), ops=OPERATIONS), False)
        for mode, way in (("max-autotune", "compiled"), ("default", "compiled default")):
            ways[way] = lambda mode=mode: subject.peer(torch.compile(eager, mode=mode), mode == "max-autotune")
    truth: Tensor | None = None
    for way, open_way in ways.items():
        row: Row = {**base, "way": way}
        try:
            torch._dynamo.reset()
            with torch.no_grad():
                run = open_way()
                latents = run().clone()
            truth = latents if truth is None else truth
            row["error"] = relative_error(latents, truth)
            if not way.startswith("compiled"):
                row["launches"] = launches(run, bench.device)
            recorded = bench.device.type == "cuda" and (way.startswith("ours") or way.endswith("one graph"))
            timed = graphed(run) if recorded else run
            times[way] = bench.clock.milliseconds(timed, warm=1)
            row["ms"] = times[way]
        except Exception as error:
            row["reason"] = " ".join(f"{type(error).__name__}: {error}".split())[:300]
        yield row
        if way == "ours fp8 cached" or way.startswith("compiled"):  # the last verdict counts
            yield _verdict(bench, name, times, base)


def _compiled_blocks(subject: Subject) -> nn.Module:
    """A copy of the network whose repeated modules are compiled, each shape once: minutes less than all in one."""
    network = copy.deepcopy(subject.network)
    with torch._dynamo.config.patch(recompile_limit=128, accumulated_recompile_limit=512):
        for module in network.modules():
            if isinstance(module, REPEATED):
                module.compile(mode="max-autotune-no-cudagraphs", dynamic=False)
        with torch.no_grad():
            network(*_given(subject.state), subject.text, OPERATIONS)
    return network


def _verdict(bench: Bench, name: str, times: dict[str, float], base: dict[str, Any]) -> Row:
    """The ratios of the fastest of ours, and whether they are over their bars; the last one counts."""
    own = {way: ms for way, ms in times.items() if way.startswith("ours")}
    if not own:
        return {**base, "way": "verdict", "passed": False, "reason": "none of ours ran"}
    best = min(own, key=lambda way: own[way])
    floor = bench.floor_ms(0.0, base["flops"] * base["calls"])
    row: Row = {**base, "way": "verdict", "best": best, "floor_ms": floor, "bound": "bf16 products of all calls"}
    measured = {**row, "ms": {**times, "ours": own[best]}}
    row |= {f"against {way}": ms / own[best] for way, ms in times.items() if way not in own}
    bars = BARS.get(name, ()) if bench.device.type == "cuda" else ()
    return row | {"bars": [judged(measured, bar) for bar in bars]}


def _flops(subject: Subject) -> float:
    """Of one network call, counted by torch."""
    from torch.utils.flop_counter import FlopCounterMode

    with FlopCounterMode(display=False) as counter, torch.no_grad():
        subject.network(*_given(subject.state), subject.text, Eager())
    return float(counter.get_total_flops())
