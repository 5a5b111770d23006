"""Recovery: what is left of a network learns to give again what the whole network gives, without data."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from compress.progress import Progress
from compress.training.features import Watched, normalised_error
from compress.training.losses import weighted_error
from compress.training.objective import in_parts
from compress.training.runs import Asked, Runs, conditioned, teacher_runs
from compress.training.student import unguided
from compress.training.targets import Drawn, noised
from compress.training.teacher import Network
from compress.training.teaching import network_of, taught
from compress.training.trainer import Schedule

if TYPE_CHECKING:
    from compress.families.segments import Network as Module
    from compress.model.latent_diffusion import LatentDiffusion
    from compress.store import Store


@dataclass(frozen=True)
class Terms:
    """How much each loss counts.

    Attributes:
        output: the error of what the teacher estimates at the same latent (BK-SDM, Kim et al. 2023, arXiv 2305.15798).
        denoise: the error of the clean latent that was noised, as in the training of the model.
        features: that of block outputs, each divided by the square of the teacher's (LAPTOP-Diff, Zhang et al. 2024,
            arXiv 2404.11098, section 3.3).
        unconditional: share of the samples that are asked for without their prompt, where guidance needs that half.
    """

    output: float
    denoise: float
    features: float
    unconditional: float


@dataclass(frozen=True)
class Recovery:
    """Teacher and student at the same noised latents; `compress.training.trainer.train` minimises it.

    Attributes:
        source: the teacher's own clean latents, with the noise levels of its plan.
        teacher: the network as it was.
        student: what is left of it.
        terms: of the loss.
        nothing: conditioning of no prompt, one row; None where nothing guides.
        watched: (teacher's, student's) block outputs; None where they do not count.
    """

    source: Runs
    teacher: Network
    student: Network
    terms: Terms
    nothing: Mapping[str, Tensor] | None = None
    watched: tuple[Watched, Watched] | None = None

    def losses(self, random: torch.Generator, batch: int, parts: int) -> list[Callable[[], Tensor]]:
        """See `compress.training.trainer.Learnable`."""
        drawn = noised(self.source, random, batch)
        without = torch.rand(batch, generator=random) < self.terms.unconditional
        return [partial(self._loss, drawn.part(rows), without[rows], batch) for rows in in_parts(batch, parts)]

    def _loss(self, drawn: Drawn, without: Tensor, batch: int) -> Tensor:
        source, device, terms = self.source, drawn.latents.device, self.terms
        signal, sigma = source.level(drawn.at)
        asked = (drawn.latents, source.times[drawn.at].to(device), signal, sigma, self._conditioning(drawn, without))
        with torch.no_grad():
            wanted = self.teacher.clean(*asked)
        clean = self.student.clean(*asked)
        loss = terms.output * weighted_error(clean, wanted, signal, sigma, "snr+1")
        if terms.denoise:
            truth = source.states[drawn.runs, -1]
            loss = loss + terms.denoise * weighted_error(clean, truth, signal, sigma, "snr+1")
        if self.watched is not None:
            theirs, own = self.watched
            loss = loss + terms.features * normalised_error(own.taken(), theirs.taken())
        return loss * (len(drawn.latents) / batch)

    def _conditioning(self, drawn: Drawn, without: Tensor) -> dict[str, Tensor]:
        """Of the samples' prompts, or of none."""
        given = self.source.conditioned(drawn.runs)
        if self.nothing is None:
            return given
        mask = without.to(drawn.latents.device)
        return {
            name: torch.where(mask.view(-1, *[1] * (rows.ndim - 1)), self.nothing[name], rows)
            for name, rows in given.items()
        }


def recover(
    model: LatentDiffusion,
    whole: LatentDiffusion,
    blocks: Sequence[tuple[str, str]],
    terms: Terms,
    asked: Asked,
    schedule: Schedule,
    *,
    minutes: float | None,
    bf16: bool,
    store: Store | None,
    progress: Progress,
) -> None:
    """Train the denoiser of a pruned model, and say so in its provenance.

    Latents are those of the whole model's own runs without guidance: of the distribution that its two halves are
    estimates for. They are noised anew at the timesteps of the plan.

    Args:
        model: pruned, with its plan.
        whole: the same before the cuts.
        blocks: (path in the whole denoiser, path in what is left) of blocks whose outputs count.
        terms: of the loss.
        asked: the whole model's runs.
        schedule: with 0 updates for as many as fit into `minutes`.
        minutes: see there.
        bf16: networks compute in bfloat16.
        store: keeps runs by content, and checkpoints until the end; None keeps neither.
        progress: receives (what, done, in all).

    Raises:
        PassError: the loss is not finite, or the model has no plan.
    """
    runtime = whole.runtime(simulate=False)  # refuses a model without a plan
    plan = runtime.plan
    device = next(model.denoiser.parameters()).device
    guided = any(step.guidance != "none" for step in plan.steps)
    teacher = replace(whole, step_plan=unguided(plan))
    rows = range(plan.network_calls)
    runs = teacher_runs(teacher, rows, asked, store, progress, ends_only=True).to(device)
    nothing = None
    if guided and terms.unconditional:
        found = conditioned(whole, None, asked.height, asked.width)
        nothing = {name: row.to(device) for name, row in found.items()}
    network = network_of(whole, whole.denoiser, plan, bf16)
    seen = Watched(whole.denoiser, [theirs for theirs, _ in blocks]) if terms.features else None

    def objective(student: Module) -> Recovery:
        watched = None if seen is None else (seen, Watched(student, [own for _, own in blocks]))
        return Recovery(runs, network, network_of(model, student, plan, bf16), terms, nothing, watched)

    inputs = {
        "model": model.state_hash(),
        "teacher": teacher.state_hash(),
        "terms": asdict(terms),
        "asked": asdict(asked),
        "minutes": minutes,
        "bf16": bf16,
    }
    said = taught(model.denoiser, objective, "recover", inputs, schedule, minutes, store, progress)
    model.provenance.append(said)
