"""The one training loop of all stages: AdamW, warm-up, decay, averaged weights, checkpoints, resume and progress."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from recipes.reference.checkpoint import read_checkpoint, write_checkpoint

#: Updates between looks at the loss on an accelerator, where each look waits for it.
_CHECK_EVERY = 50


@dataclass(frozen=True)
class Budget:
    """How long and how fast a stage learns: `steps` in all, linear `warmup`, constant `rate`, linear `decay` to 2 %.

    `batch` counts samples an update where a stage does not choose its own batches.
    """

    steps: int
    rate: float
    batch: int = 32
    warmup: int = 100
    decay: int = 1000
    average: float = 0.999
    weight_decay: float = 0.01
    save_seconds: float = 120.0

    def rate_at(self, step: int) -> float:
        """Learning rate of update `step` (0-based)."""
        rise = min(1.0, (step + 1) / max(1, self.warmup))
        fall = min(1.0, max(0.0, (self.steps - step) / max(1, self.decay)))
        return self.rate * rise * max(0.02, fall)


def average_into(average: dict[str, torch.Tensor], module: torch.nn.Module, step: int, decay: float) -> None:
    """Exponential moving average of floating-point weights in place, with decay min(decay, (1+k)/(10+k))."""
    weight = 1.0 - min(decay, (1 + step) / (10 + step))
    current = module.state_dict()
    names = [name for name, value in average.items() if value.is_floating_point()]
    torch._foreach_lerp_([average[name] for name in names], [current[name] for name in names], weight)


def train(
    name: str,
    module: torch.nn.Module,
    loss_at: Callable[[int], torch.Tensor],
    budget: Budget,
    path: Path,
    report: Callable[[str], None] = print,
    watch: Callable[[int, float], None] | None = None,
) -> dict[str, torch.Tensor]:
    """Train `module` by minimising `loss_at(step)` and return the averaged weights.

    `loss_at` must depend on the step number alone, so that a run that is killed and started again ends with the
    same bits. The checkpoint at `path` is read first, written every `save_seconds` and at the end.
    `watch(step, seconds)` is called after each write. Raises FloatingPointError when the loss is no longer finite.
    """
    parameters = [p for p in module.parameters() if p.requires_grad]
    accelerated = parameters[0].device.type != "cpu"
    optimiser = torch.optim.AdamW(
        parameters, lr=budget.rate, betas=(0.9, 0.99), weight_decay=budget.weight_decay, fused=accelerated
    )
    average = {key: value.detach().clone() for key, value in module.state_dict().items()}
    first, spent, smooth = 0, 0.0, parameters[0].new_zeros((), dtype=torch.float64)
    state = read_checkpoint(path)
    if state is not None:
        module.load_state_dict(state["module"])
        optimiser.load_state_dict(state["optimiser"])
        for key, value in state["average"].items():
            average[key].copy_(value)
        first, spent = state["step"], state["seconds"]
        smooth.fill_(state["loss"])
    if first >= budget.steps:
        report(f"{name}: already trained ({first} steps)")
        return average

    module.train()
    began = saved = time.monotonic()
    for step in range(first, budget.steps):
        for group in optimiser.param_groups:
            group["lr"] = budget.rate_at(step)
        loss = loss_at(step)
        optimiser.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimiser.step()
        average_into(average, module, step, budget.average)
        smooth.lerp_(loss.detach().double(), min(1.0, max(0.02, 1.0 / (step + 1))))
        now = time.monotonic()
        done = step + 1
        save = now - saved >= budget.save_seconds or done == budget.steps
        if (save or not accelerated or done % _CHECK_EVERY == 0) and not math.isfinite(smooth):
            raise FloatingPointError(f"{name}: the loss is {float(smooth)} at step {step}")
        if save:
            seconds = spent + now - began
            left = (now - began) / (done - first) * (budget.steps - done)
            report(
                f"{name}: step {done}/{budget.steps}  loss {float(smooth):.4f}  rate {budget.rate_at(step):.1e}  "
                f"{seconds / 60:.1f} min spent, {left / 60:.1f} min left"
            )
            write_checkpoint(
                path,
                {
                    "module": module.state_dict(),
                    "average": average,
                    "optimiser": optimiser.state_dict(),
                    "step": done,
                    "seconds": seconds,
                    "loss": float(smooth),
                },
            )
            saved = now
            if watch is not None:
                watch(done, seconds)
    return average
