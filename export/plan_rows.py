"""The words of a step plan: segments, slots, one row per network call, and the gate that may decide a row."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

SlotKind = Literal["feature", "residual", "output"]
SlotHalves = Literal["each", "mean"]
GuidanceMode = Literal["none", "cfg", "cfg_sequential"]
GateReference = Literal["last_full", "previous"]


class StepPlanError(ValueError):
    """A step plan that contradicts itself; the message says which row and why."""


@dataclass(frozen=True)
class Segment:
    """A pure function of named tensors: the part of the denoiser between two cuts.

    Inputs are conditioning tensors, or outputs of segments that ran earlier in the same step, or slots.
    """

    inputs: tuple[str, ...]
    outputs: tuple[str, ...]


@dataclass(frozen=True)
class Slot:
    """A tensor kept from one network call to later ones.

    `feature` keeps the tensor itself; `residual` keeps `tensor - base`, and reading gives `base + forecast`;
    `output` is a feature slot on the network output; a row that reads it runs no segment at all.

    Attributes:
        tensor: what is kept.
        kind: see above.
        base: of a residual slot.
        history: how many values are kept, the newest first.
        halves: what a row that runs the conditional half alone reads where both halves were written: the
            conditional half (`each`) or the mean of the two (`mean`; T-GATE, Zhang et al. 2024, arXiv 2404.02747).
    """

    tensor: str
    kind: SlotKind = "feature"
    base: str | None = None
    history: int = 1
    halves: SlotHalves = "each"


@dataclass(frozen=True)
class Gate:
    """Decides, per sample and at the gated rows alone, whether a network call is skipped.

    The metric is the relative L1 change of one tensor, `sum |a - b| / sum |b|` over all elements of a sample, both
    guidance halves together. A sample keeps its cached path while `value < threshold`, at most `max_run` calls long.

    Attributes:
        tensor: what is watched; the first segments of every gated path compute it, before any slot is read.
        threshold: of the value.
        max_run: at most so many consecutive cached calls per sample.
        reference: `last_full` compares with the last full call of the sample (First-Block-Cache, ParaAttention
            2024); `previous` compares with the previous call and adds up since the last full call (TeaCache, Liu et
            al. 2024, arXiv 2411.19108).
        polynomial: coefficients, highest power first, applied to the metric; the default is the metric itself.
    """

    tensor: str
    threshold: float
    max_run: int
    reference: GateReference = "last_full"
    polynomial: tuple[float, ...] = (1.0, 0.0)


@dataclass(frozen=True)
class Step:
    """One network call and the linear update after it.

        x[k+1] = sum_i x[i] * latent[k-i]  +  sum_j m[j] * output[k-j]  +  noise * z[k]  +  initial * x[0]

    Attributes:
        t: the timestep value the denoiser is called with.
        input_scale: the latent is multiplied by this before the call.
        x, m: coefficients by lag (0 = the current call) over latents and guided network outputs.
        noise: coefficient of the fresh standard-normal noise of this row; 0.0 draws none.
        path: the key in `StepPlan.paths` that runs.
        write: slots filled by this call.
        read: slot -> forecast coefficients over its history, newest first.
        guidance: how the network output is formed; `cfg` is `uncond + guidance_scale * (cond - uncond)` with both
            halves in one batch, `cfg_sequential` the same with one half after the other (half the memory).
        signal, sigma: this row's latent is `signal * clean + sigma * noise` (where image-to-image starts,
            what inpainting blends with, and how the latent of a larger level begins).
        initial: coefficient of the first latent of the run (prior noise injection of Faster Diffusion, Li et al.
            2023, arXiv 2312.09608).
        span: this row and the following `span - 1` rows make their network calls as one batch; 1 in those rows.
        gated: `StepPlan.gate` decides per sample between this row and the full path.
        level: height and width of the latent at this row, as a share of those of the run; it may only rise. Where
            it rises, the row before hands over a clean estimate, and this row begins with
            `signal * resampled estimate + sigma * fresh noise`.
    """

    t: float
    x: Mapping[int, float]
    m: Mapping[int, float]
    noise: float = 0.0
    input_scale: float = 1.0
    path: str = "full"
    write: tuple[str, ...] = ()
    read: Mapping[str, tuple[float, ...]] = field(default_factory=dict)
    guidance: GuidanceMode = "none"
    guidance_scale: float = 1.0
    signal: float = 1.0
    sigma: float = 0.0
    initial: float = 0.0
    span: int = 1
    gated: bool = False
    level: float = 1.0


@dataclass(frozen=True)
class Update:
    """The coefficients of one row when sampling begins late: a multistep sampler then has no history yet.

    The fields are those of `Step`.
    """

    x: Mapping[int, float]
    m: Mapping[int, float]
    noise: float = 0.0
    initial: float = 0.0
