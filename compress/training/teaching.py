"""One student trained in a folder that outlives a kill, and its averaged weights given to the network it was."""

from __future__ import annotations

import contextlib
import copy
import json
import os
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from compress.progress import Progress
from compress.training.randomness import generator
from compress.training.recompute import Recomputed
from compress.training.teacher import Network
from compress.training.trainer import Learnable, Schedule, train

if TYPE_CHECKING:
    from compress.families.segments import Network as Module
    from compress.model.latent_diffusion import LatentDiffusion
    from compress.store import Store
    from export.step_plan import StepPlan


def taught(
    network: Module,
    objective: Callable[[Module], Learnable],
    what: str,
    inputs: Mapping[str, Any],
    schedule: Schedule,
    minutes: float | None,
    store: Store | None,
    progress: Progress,
) -> dict[str, Any]:
    """Train a copy of a network, and give the network the copy's averaged weights.

    Args:
        network: stays as it is until the end, so that the objective may ask it.
        objective: of the copy.
        what: is being done, for progress.
        inputs: plain data that the result depends on besides the schedule.
        schedule: with 0 updates for as many as fit into the minutes.
        minutes: see there.
        store: keeps checkpoints until the end; None keeps none.
        progress: receives (what, done, in all).

    Returns:
        What was done, for the provenance: updates, seconds, and the curve of the loss.

    Raises:
        PassError: the loss is not finite.
    """
    student = copy.deepcopy(network).requires_grad_(True)
    learnable = objective(student)
    with _folder(store, {"what": "training", **inputs, "schedule": asdict(schedule)}) as folder:
        if not schedule.updates:
            schedule = replace(schedule, updates=_updates(learnable, schedule, minutes or 0.0, folder))
        trained = train(student, learnable, schedule, folder, progress, what)
    own = dict(network.named_parameters())
    for name, weight in trained.average.items():
        own[name].data.copy_(weight)
    said = {"updates": schedule.updates, "seconds": round(trained.seconds, 1), "loss": trained.curve}
    return {"trained": what, **said}


def network_of(
    model: LatentDiffusion, denoiser: Module, plan: StepPlan, bf16: bool, recompute: bool = False
) -> Network:
    """A denoiser of the model's family, whole, as training asks it."""
    whole = model.family.segments(denoiser, None).segments[0].module
    return Network(Recomputed(model.family, denoiser) if recompute else whole, plan.latent_input, plan.prediction, bf16)


@contextlib.contextmanager
def _folder(store: Store | None, inputs: Mapping[str, object]) -> Iterator[Path]:
    if store is not None:
        with store.workspace(inputs) as folder:
            yield folder
        return
    with tempfile.TemporaryDirectory(prefix="training-") as name:
        yield Path(name)


def _updates(objective: Learnable, schedule: Schedule, minutes: float, folder: Path) -> int:
    """As many updates as fit; decided once, and kept for a run that goes on after a kill."""
    kept = folder / "updates.json"
    if kept.is_file():
        return int(json.loads(kept.read_text(encoding="utf-8")))
    seconds = []
    for _ in range(2):
        began = time.perf_counter()
        for part in objective.losses(generator(schedule.seed, 0), schedule.batch, schedule.accumulate):
            part().backward()
        seconds.append(time.perf_counter() - began)
    updates = max(1, int(60.0 * minutes / min(seconds)))
    written = kept.with_suffix(".part")
    written.write_text(json.dumps(updates), encoding="utf-8")
    os.replace(written, kept)
    return updates
