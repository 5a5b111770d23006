"""What a section is given, and the rows it gives back: contests of our operations with their peers, and their floor."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from recipes.benchmarks.gpu.clock import Clock, graphed

Row = dict[str, Any]


@dataclass(frozen=True)
class Bar:
    """What was promised: `ours` at least so many times as fast as `than`, or within so many times of the floor."""

    times: float
    than: str | None = None

    def __str__(self) -> str:
        """For people."""
        floor = f"within {self.times:g} times of the floor"
        return floor if self.than is None else f"{self.times:g} times as fast as {self.than}"


@dataclass(frozen=True)
class Bench:
    """A device to measure on.

    Attributes:
        device: all tensors are there.
        tiny: shapes that a CPU runs in a moment, to show that everything runs.
        compile: whether `torch.compile` takes part.
        clock: takes the times.
        ceilings: what the device reached, GB/s for `copy` and TFLOP/s for `bfloat16`, `float8_e4m3fn`, `int8`.
    """

    device: torch.device
    tiny: bool
    compile: bool
    clock: Clock
    ceilings: Mapping[str, float] = field(default_factory=dict)

    def randn(self, *shape: int, dtype: torch.dtype = torch.bfloat16, seed: int = 0) -> torch.Tensor:
        """Standard-normal numbers, the same at every call."""
        generator = torch.Generator(self.device).manual_seed(seed)
        return torch.randn(shape, generator=generator, device=self.device).to(dtype)

    def compiled(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """The function as Inductor tunes it."""
        torch._dynamo.reset()
        return torch.compile(function, mode="max-autotune-no-cudagraphs", dynamic=False)

    def floor_ms(self, moved: float, flops: float = 0.0, kind: str = "bfloat16") -> float | None:
        """The least time that memory and tensor cores of this device allow; None where no ceiling was measured.

        Args:
            moved: bytes that must be read and written once.
            flops: of products.
            kind: of their operands.
        """
        if "copy" not in self.ceilings or (flops and kind not in self.ceilings):
            return None
        compute = flops / self.ceilings[kind] / 1e9 if flops else 0.0
        return max(moved / self.ceilings["copy"] / 1e6, compute)

    def beside_a_copy(self, row: Row, moved: float, share: float) -> Row:
        """The row of a contest, with the time of copying as many bytes, of which ours must reach a share.

        Small copies are far from the ceiling of large ones, and so is all else of their size.
        """
        source = torch.randint(256, (round(moved / 2),), dtype=torch.uint8, device=self.device)
        target = torch.empty_like(source)

        def copying() -> None:
            target.copy_(source)

        copy = self.clock.milliseconds(graphed(copying) if self.device.type == "cuda" else copying)
        row = {**row, "copy_ms": copy}
        bar = Bar(share, "a copy of as many bytes")
        if self.device.type != "cuda":
            return row | {"bar": str(bar)}
        return row | judged({**row, "ms": {**row["ms"], "a copy of as many bytes": copy}}, bar)

    def contest(
        self,
        operation: str,
        model: str,
        shape: str,
        contestants: Mapping[str, Callable[[], Any]],
        *,
        moved: float,
        flops: float = 0.0,
        kind: str = "bfloat16",
        bar: Bar | None = None,
        truth: torch.Tensor | None = None,
    ) -> Row:
        """Time every contestant, `ours` among them, as a CUDA graph where there is a GPU.

        Args:
            operation: what is done.
            model: whose shape it is.
            shape: for people.
            contestants: name -> the call.
            moved: bytes, see `floor_ms`.
            flops: of products, likewise.
            kind: of their operands.
            bar: what is promised of `ours` on a GPU.
            truth: what each should give; `error` is the relative one of each.
        """
        times: dict[str, float] = {}
        failed: dict[str, str] = {}
        errors: dict[str, float] = {}
        for name, call in contestants.items():
            try:
                with torch.no_grad():
                    result = call()
                if truth is not None and isinstance(result, torch.Tensor):
                    errors[name] = relative_error(result, truth)
                del result
                timed = graphed(call) if self.device.type == "cuda" else call
                times[name] = self.clock.milliseconds(timed)
            except Exception as error:
                failed[name] = " ".join(f"{type(error).__name__}: {error}".split())[:200]
        floor = self.floor_ms(moved, flops, kind)
        row: Row = {"operation": operation, "model": model, "shape": shape, "ms": times, "floor_ms": floor}
        row |= {"failed": failed} if failed else {}
        row |= {"error": errors} if errors else {}
        peers = {name: ms for name, ms in times.items() if not name.startswith("ours")}
        own = {name: ms for name, ms in times.items() if name.startswith("ours")}
        if peers and own:
            best = min(peers, key=lambda name: peers[name])
            row |= {"best_peer": best, "ratio": peers[best] / min(own.values())}
        if floor:
            row["times_the_floor"] = {name: ms / floor for name, ms in times.items()}
            row["bound"] = "memory" if self.floor_ms(moved) == floor else "products"
        if bar is None:
            return row
        return row | (judged(row, bar) if self.device.type == "cuda" else {"bar": str(bar)})


def judged(row: Row, bar: Bar) -> Row:
    """Whether a row is over its bar, and why not."""
    times = row["ms"]
    if "ours" not in times:
        return {"bar": str(bar), "passed": False, "reason": f"ours did not run: {row.get('failed', {}).get('ours')}"}
    if bar.than is None:
        if not row["floor_ms"]:
            return {"bar": str(bar), "passed": None, "reason": "no ceiling was measured"}
        reached = row["floor_ms"] / times["ours"]
        missed = 1 / bar.times
    elif bar.than not in times:
        return {"bar": str(bar), "passed": None, "reason": f"{bar.than} did not run"}
    else:
        reached, missed = times[bar.than] / times["ours"], bar.times
    if reached >= missed:
        return {"bar": str(bar), "passed": True, "reached": reached}
    reason = f"{reached:.2f} was reached"
    if row["floor_ms"]:
        reason += f"; ours takes {times['ours'] / row['floor_ms']:.2f} times the {row['bound']} floor"
    if bar.than is not None and row["floor_ms"]:
        reason += f", {bar.than} {times[bar.than] / row['floor_ms']:.2f} times"
    return {"bar": str(bar), "passed": False, "reached": reached, "reason": reason}


def relative_error(got: torch.Tensor, truth: torch.Tensor) -> float:
    """`||got - truth|| / ||truth||` in float64; infinite where anything is not finite."""
    error = float((got.double() - truth.double()).norm() / truth.double().norm().clamp_min(1e-30))
    return error if math.isfinite(error) else math.inf
