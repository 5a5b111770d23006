"""What a stage makes of the same prompts and seeds: latents, pictures, step-by-step traces, and their quality."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from compress.errors import PassError
from compress.measure import metrics
from compress.measure.metrics import Estimate
from compress.progress import Progress, silent
from compress.prompts import Prompt
from export.loop import PartFunction
from export.noise import INITIAL, noise
from export.runtime import Runtime

if TYPE_CHECKING:
    from compress.measure.clip_score import ClipScorer
    from compress.measure.scorer import Scorer
    from compress.report.report import Curve


@dataclass(frozen=True)
class Workload:
    """What every stage is asked to generate.

    Attributes:
        prompts: one per picture, with the attributes a scorer should read.
        seeds: one per picture.
        height, width: of the pictures, in pixels.
        batch: pictures generated at once.
    """

    prompts: Sequence[Prompt]
    seeds: Sequence[int]
    height: int
    width: int
    batch: int = 16

    @classmethod
    def of(cls, prompts: Sequence[Prompt], seed: int, height: int, width: int, batch: int = 16) -> Workload:
        """Number the seeds of the pictures from `seed` on."""
        return cls(list(prompts), range(seed, seed + len(prompts)), height, width, batch)

    @property
    def texts(self) -> list[str]:
        """The prompts without their attributes."""
        return [prompt.text for prompt in self.prompts]

    def first(self, count: int) -> Workload:
        """The first `count` pictures only."""
        return replace(self, prompts=self.prompts[:count], seeds=self.seeds[:count])

    def batches(self) -> Iterator[Workload]:
        """Yield the same pictures in batches."""
        for start in range(0, len(self.prompts), self.batch):
            part = slice(start, start + self.batch)
            yield replace(self, prompts=self.prompts[part], seeds=self.seeds[part])


@dataclass(frozen=True)
class Stage:
    """What one stage made of a workload.

    Attributes:
        latents: float32 (n, channels, h, w).
        images: uint8 (n, height, width, 3).
    """

    latents: np.ndarray
    images: np.ndarray

    def __len__(self) -> int:
        return len(self.latents)

    def first(self, count: int) -> Stage:
        """The first `count` pictures only."""
        return Stage(self.latents[:count], self.images[:count])

    def save(self, path: Path) -> None:
        """Write an .npz file."""
        np.savez(path, latents=self.latents, images=self.images)

    @classmethod
    def load(cls, path: Path) -> Stage:
        """Read what `save` wrote."""
        with np.load(path, allow_pickle=False) as arrays:
            return cls(arrays["latents"], arrays["images"])


def generate(
    stage: Runtime, workload: Workload, name: str, progress: Progress = silent, allow_flat: bool = False
) -> Stage:
    """Generate a workload, batch by batch.

    Args:
        stage: the runtime of the stage.
        workload: what to generate.
        name: of the stage, for progress and errors.
        progress: receives (name, pictures done, pictures in all).
        allow_flat: a picture of one flat colour is no error (one or two steps may end in one).

    Raises:
        PassError: latents or pictures that are not finite, or a picture of one flat colour.
    """
    checked = stage.altered(functions=_finite(stage.functions, name))
    latents, images = [], []
    done = 0
    progress(name, done, len(workload.prompts))
    for part in workload.batches():
        latents.append(checked.sample(part.texts, list(part.seeds), part.height, part.width))
        if not np.isfinite(latents[-1]).all():
            raise PassError(f"the stage {name!r} gives latents that are not finite")
        images.append(checked.decode(latents[-1]))
        done += len(part.prompts)
        progress(name, done, len(workload.prompts))
    result = Stage(np.concatenate(latents), np.concatenate(images))
    flat = np.flatnonzero((result.images == result.images[:, :1, :1]).all(axis=(1, 2, 3)))
    if flat.size and not allow_flat:
        raise PassError(
            f"the stage {name!r} gives a picture of one flat colour for the prompt {workload.texts[flat[0]]!r} "
            f"(and for {flat.size - 1} others)"
        )
    return result


def _finite(functions: Mapping[str, PartFunction], stage: str) -> dict[str, PartFunction]:
    """Wrap the decoder, whose pictures could no longer tell a NaN."""

    def decode(arrays: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        decoded = functions["vae_decoder"](arrays)
        if not all(np.isfinite(array).all() for array in decoded.values()):
            raise PassError(f"the VAE decoder of the stage {stage!r} gives values that are not finite")
        return decoded

    return {**functions, "vae_decoder": decode}


def check_changed(before: Stage, after: Stage, what: str) -> None:
    """Refuse a lossy change that changed nothing.

    Args:
        before: what the model made before it.
        after: what it makes now; as many pictures or fewer.
        what: which change, for the error.

    Raises:
        PassError: the latents are the same to the last bit.
    """
    if np.array_equal(before.first(len(after)).latents, after.latents):
        raise PassError(f"{what} changed no latent by a single bit, so it was not applied")


@dataclass(frozen=True)
class Trace:
    """A run, network call by network call.

    Attributes:
        first: (n, channels, h, w), the latents before the first call.
        latents: (calls, n, channels, h, w), after each call.
        outputs: the same shape, the guided network output of each call.
    """

    first: np.ndarray
    latents: np.ndarray
    outputs: np.ndarray


def trace(stage: Runtime, workload: Workload, given: Trace | None = None) -> Trace:
    """Run a workload, as one batch, and keep every step.

    Args:
        stage: the runtime of the stage.
        workload: a few pictures.
        given: a trace whose latents replace this run's own after every call, so that only the error of one call
            shows; slots are filled from the given latents, too. None lets the run go on by itself.
    """
    plan = stage.plan
    shape = (stage.latent.channels, workload.height // stage.latent.downscale, workload.width // stage.latent.downscale)
    seeds = list(workload.seeds)
    latents, outputs = [], []

    def keep(row: int, after: np.ndarray, tensors: dict[str, np.ndarray]) -> None:
        step, raw, n = plan.steps[row], tensors[plan.output], len(seeds)
        guided = (
            raw[:n] + np.float32(step.guidance_scale) * (raw[n:] - raw[:n]) if step.guidance != "none" else raw[-n:]
        )
        latents.append(after)
        outputs.append(guided)

    if given is None:
        first = np.float32(plan.init_noise_sigma) * noise(seeds, INITIAL, shape)
        stage.sample(workload.texts, seeds, workload.height, workload.width, on_step=keep)
    else:
        first = given.first
        rows = tuple(replace(step, x={}, m={}, noise=1.0) for step in plan.steps)
        forced = replace(plan, steps=rows, init_noise_sigma=1.0, starts={})

        def draw(row: int, size: tuple[int, ...]) -> np.ndarray:
            return given.first if row == INITIAL else given.latents[row - 1]

        stage.altered(plan=forced).sample(
            workload.texts, None, workload.height, workload.width, noise=draw, on_step=keep
        )
    return Trace(first, np.stack(latents), np.stack(outputs))


def step_errors(name: str, reference: Trace, free: Trace, forced: Trace) -> Curve:
    """Compare traces with the original's, call by call.

    Args:
        name: of the stage.
        reference: the original's trace.
        free: the stage's own run.
        forced: the stage's run given the original's latents.

    Raises:
        PassError: the runs have different numbers of network calls.
    """
    from compress.report.report import Curve

    if reference.latents.shape != free.latents.shape:
        raise PassError(f"the stage {name!r} calls the network another number of times than the original")
    return Curve(
        stage=name,
        relative_l2=tuple(metrics.relative_l2(a, b) for a, b in zip(reference.latents, free.latents, strict=True)),
        psnr_db=tuple(metrics.latent_psnr_db(a, b).value for a, b in zip(reference.latents, free.latents, strict=True)),
        one_step=tuple(metrics.relative_l2(a, b) for a, b in zip(reference.outputs, forced.outputs, strict=True)),
    )


@dataclass(frozen=True)
class Quality:
    """The quality of one stage, and what it was computed from, to compare picture by picture.

    Attributes:
        estimates: metric -> estimate.
        hits: (n, 2), see `metrics.attribute_hits`; None without a scorer.
        features: (n, width) of the scorer; None without one.
        clip: (n,) CLIP scores; None without a CLIP model.
    """

    estimates: dict[str, Estimate] = field(default_factory=dict)
    hits: np.ndarray | None = None
    features: np.ndarray | None = None
    clip: np.ndarray | None = None


class Judge:
    """Measures quality with the scorer and the CLIP model that a recipe names.

    Args:
        prompts: of the whole workload.
        scorer: reads attributes; None leaves attribute accuracy and Frechet distance away.
        clip: a CLIP model; None leaves the CLIP score away.

    Raises:
        RefusedError: the prompts ask for an attribute that the scorer does not have.
    """

    def __init__(self, prompts: Sequence[Prompt], scorer: Scorer | None = None, clip: ClipScorer | None = None) -> None:
        self._prompts = list(prompts)
        self._scorer = scorer
        self._clip = clip

    def quality(self, stage: Stage, original: Stage | None = None, judged: Quality | None = None) -> Quality:
        """Judge one stage.

        Args:
            stage: the first pictures of the workload, as many as it has.
            original: what the original made of at least as many; None judges the original itself.
            judged: the original's quality, for the Frechet distance.
        """
        estimates: dict[str, Estimate] = {}
        n = len(stage)
        hits = features = clip = None
        if original is not None:
            reference = original.first(n)
            estimates["latent_psnr_db"] = metrics.latent_psnr_db(reference.latents, stage.latents)
            estimates["image_psnr_db"] = metrics.image_psnr_db(reference.images, stage.images)
            if min(stage.images.shape[1:3]) >= metrics.SSIM_WINDOW:
                estimates["ssim"] = metrics.ssim(reference.images, stage.images)
        if self._scorer is not None:
            scores = self._scorer.score(stage.images)
            features = scores.features
            labels = [prompt.attributes for prompt in self._prompts[:n]]
            hits = metrics.attribute_hits(scores.logits, self._scorer.heads, labels)
            if hits[:, 1].any():
                estimates["attribute_accuracy"] = metrics.attribute_accuracy(hits)
            if judged is not None and judged.features is not None and n >= metrics.FRECHET_MINIMUM:
                estimates["frechet_distance"] = metrics.frechet_distance(features, judged.features[:n], paired=True)
        if self._clip is not None:
            clip = self._clip.score(stage.images, [prompt.text for prompt in self._prompts[:n]])
            estimates["clip_score"] = metrics.mean(clip)
        return Quality(estimates, hits, features, clip)


def changes(before: Quality, after: Quality) -> dict[str, Estimate]:
    """Compare two stages picture by picture; `before` may have more pictures."""
    found: dict[str, Estimate] = {}
    if before.hits is not None and after.hits is not None and after.hits[:, 1].any():
        found["attribute_accuracy"] = metrics.accuracy_change(before.hits[: len(after.hits)], after.hits)
    if before.clip is not None and after.clip is not None:
        found["clip_score"] = metrics.paired_change(before.clip[: len(after.clip)], after.clip)
    return found


def planned_metrics(scorer: bool, clip: bool, samples: int) -> list[str]:
    """Which metrics a run will measure, known before it starts (the gates may only bound these).

    Args:
        scorer: a scorer is named.
        clip: a CLIP model is named.
        samples: pictures per stage.
    """
    found = ["latency_ms", "size_mib", "peak_rss_mib", "latent_psnr_db", "image_psnr_db", "ssim"]
    if scorer:
        found.append("attribute_accuracy")
        if samples >= metrics.FRECHET_MINIMUM:
            found.append("frechet_distance")
    return [*found, "clip_score"] if clip else found
