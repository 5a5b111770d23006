"""The StepPlan: the denoising loop as plain data, one row per network call."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, Literal, get_args

SCHEMA_VERSION = 1

SlotKind = Literal["feature", "residual", "output"]
GuidanceMode = Literal["none", "cfg"]


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
    """

    tensor: str
    kind: SlotKind = "feature"
    base: str | None = None
    history: int = 1


@dataclass(frozen=True)
class Step:
    """One network call and the linear update after it.

        x[k+1] = sum_i x[i] * latent[k-i]  +  sum_j m[j] * output[k-j]  +  noise * z[k]

    Attributes:
        t: the timestep value the denoiser is called with.
        input_scale: the latent is multiplied by this before the call.
        x, m: coefficients by lag (0 = the current call) over latents and guided network outputs.
        noise: coefficient of the fresh standard-normal noise of this row; 0.0 draws none.
        path: the key in `StepPlan.paths` that runs.
        write: slots filled by this call.
        read: slot -> forecast coefficients over its history, newest first.
        guidance: how the network output is formed; `cfg` is `uncond + guidance_scale * (cond - uncond)`.
        signal, sigma: this row's latent is `signal * clean + sigma * noise` (where image-to-image starts,
            and what inpainting blends with).
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


@dataclass(frozen=True)
class Update:
    """The coefficients of one row when sampling begins late: a multistep sampler then has no history yet.

    The fields are those of `Step`.
    """

    x: Mapping[int, float]
    m: Mapping[int, float]
    noise: float = 0.0


@dataclass(frozen=True)
class StepPlan:
    """A sampler run: the segments, the paths through them, the slots between calls, and one row per call.

    Attributes:
        segments: name -> inputs and outputs.
        paths: name -> segments in the order they run.
        slots: name -> what is kept.
        steps: one row per network call.
        starts: rows other than 0 where sampling may begin (image-to-image) -> the updates that replace those of the
            first rows from there on; empty where the rows keep no memory.
        init_noise_sigma: the first latent is this times standard-normal noise.
        prediction: what the network predicts (`epsilon`, `v_prediction`, `flow`, `sample`): for reports and oracles.
        key: what the plan was made for (model hash, sampler, network calls, guidance scale, ...).
    """

    segments: Mapping[str, Segment]
    paths: Mapping[str, tuple[str, ...]]
    slots: Mapping[str, Slot]
    steps: tuple[Step, ...]
    starts: Mapping[int, tuple[Update, ...]] = field(default_factory=dict)
    init_noise_sigma: float = 1.0
    prediction: str = "epsilon"
    key: Mapping[str, Any] = field(default_factory=dict)

    @property
    def network_calls(self) -> int:
        """How many times the denoiser is called, whatever the path."""
        return len(self.steps)

    @property
    def output(self) -> str:
        """The name of the network output: the last output of the last segment of every path."""
        return self.segments[next(iter(self.paths.values()))[-1]].outputs[-1]

    def history(self) -> tuple[int, int]:
        """How many latents and how many network outputs the runtime must keep, the current one included."""
        rows: list[Step | Update] = [*self.steps, *(update for updates in self.starts.values() for update in updates)]
        return (
            1 + max((lag for row in rows for lag in row.x), default=0),
            1 + max((lag for row in rows for lag in row.m), default=0),
        )

    def validate(self, conditioning: tuple[str, ...] | None = None) -> None:
        """Check that every name resolves, every read was written before, and every number is finite.

        Args:
            conditioning: the tensors given from outside (`sample`, `timestep`, ...); None skips the check that
                each segment input is produced somewhere.

        Raises:
            StepPlanError: one sentence with the row and the cause.
        """
        if not self.steps or not self.paths:
            raise StepPlanError(f"the plan has no {'steps' if self.paths else 'paths'}")
        if not math.isfinite(self.init_noise_sigma):
            raise StepPlanError("init_noise_sigma is not finite")
        for name, segment_io in self.segments.items():
            if not segment_io.outputs:
                raise StepPlanError(f"segment {name!r} computes nothing")
        for name, segments in self.paths.items():
            if not segments:
                raise StepPlanError(f"path {name!r} has no segments")
            for segment in segments:
                if segment not in self.segments:
                    raise StepPlanError(f"path {name!r} names the unknown segment {segment!r}")
        for name, segments in self.paths.items():
            if self.segments[segments[-1]].outputs[-1] != self.output:
                raise StepPlanError(f"path {name!r} does not end in the network output {self.output!r}")
        produced = {tensor for segment_io in self.segments.values() for tensor in segment_io.outputs}
        for name, slot in self.slots.items():
            if slot.tensor not in produced:
                raise StepPlanError(f"slot {name!r} keeps {slot.tensor!r}, which no segment computes")
            if slot.kind not in get_args(SlotKind):
                raise StepPlanError(f"slot {name!r} has the unknown kind {slot.kind!r}")
            if (slot.kind == "residual") != (slot.base is not None):
                raise StepPlanError(f"slot {name!r}: a residual slot needs a base tensor, and no other kind has one")
            if slot.history < 1:
                raise StepPlanError(f"slot {name!r} keeps no history")
        written = dict.fromkeys(self.slots, 0)
        for row, step in enumerate(self.steps):
            self._validate_step(row, step, written, conditioning)
        for row, updates in self.starts.items():
            self._validate_start(row, updates)

    def _validate_start(self, row: int, updates: tuple[Update, ...]) -> None:
        if not 0 < row < len(self.steps) or len(updates) > len(self.steps) - row:
            raise StepPlanError(f"start {row} lies outside the plan of {len(self.steps)} steps")
        rows: tuple[Step | Update, ...] = (*updates, *self.steps[row + len(updates) :])
        for after, update in enumerate(rows):
            if any(lag < 0 or lag > after for lag in (*update.x, *update.m)):
                raise StepPlanError(f"start {row}: step {row + after} reaches back before the start")
            if not all(math.isfinite(number) for number in (*update.x.values(), *update.m.values(), update.noise)):
                raise StepPlanError(f"start {row} holds a number that is not finite")

    def _validate_step(
        self, row: int, step: Step, written: dict[str, int], conditioning: tuple[str, ...] | None
    ) -> None:
        where = f"step {row}"
        if step.path not in self.paths:
            raise StepPlanError(f"{where} runs the unknown path {step.path!r}")
        if step.guidance not in get_args(GuidanceMode):
            raise StepPlanError(f"{where} has the unknown guidance {step.guidance!r}")
        numbers = [step.t, step.noise, step.input_scale, step.guidance_scale, step.signal, step.sigma]
        numbers += [*step.x.values(), *step.m.values(), *(a for read in step.read.values() for a in read)]
        if not all(math.isfinite(number) for number in numbers):
            raise StepPlanError(f"{where} holds a number that is not finite")
        if any(lag < 0 or lag > row for lag in (*step.x, *step.m)):
            raise StepPlanError(f"{where} reaches back before the first step")
        known = None if conditioning is None else set(conditioning)
        for name, alphas in step.read.items():
            if name not in self.slots:
                raise StepPlanError(f"{where} reads the unknown slot {name!r}")
            if not 1 <= len(alphas) <= min(written[name], self.slots[name].history):
                raise StepPlanError(
                    f"{where} reads {len(alphas)} values of slot {name!r}, which holds "
                    f"{min(written[name], self.slots[name].history)}"
                )
        skipped = any(self.slots[name].kind == "output" for name in step.read)
        if known is not None and not skipped:
            readable = {self.slots[name].tensor for name in step.read}
            for segment in self.paths[step.path]:
                for tensor in self.segments[segment].inputs:
                    if tensor not in known and tensor not in readable:
                        raise StepPlanError(f"{where}: nothing produces the input {tensor!r} of segment {segment!r}")
                known.update(self.segments[segment].outputs)
        produced = {tensor for segment in self.paths[step.path] for tensor in self.segments[segment].outputs}
        if step.write and skipped:
            raise StepPlanError(f"{where} takes its network output from a slot, so it computes nothing to write")
        for name in step.write:
            if name not in self.slots:
                raise StepPlanError(f"{where} writes the unknown slot {name!r}")
            if self.slots[name].tensor not in produced:
                raise StepPlanError(f"{where} writes slot {name!r}, but path {step.path!r} does not compute it")
            written[name] += 1

    def to_json(self) -> str:
        """Serialise; floats keep all their digits, so a round trip is exact."""
        return json.dumps({"schema_version": SCHEMA_VERSION, **asdict(self)}, indent=1, sort_keys=True)

    @classmethod
    def from_json(cls, text: str) -> StepPlan:
        """Read and validate a plan.

        Raises:
            StepPlanError: not JSON, another schema version, a missing or unknown key, or an inconsistent plan.
        """
        try:
            raw = json.loads(text)
            if not isinstance(raw, dict):
                raise StepPlanError("the step plan is not a JSON object")
            version = raw.pop("schema_version", None)
            if version != SCHEMA_VERSION:
                raise StepPlanError(f"the step plan has schema version {version!r}, this reads {SCHEMA_VERSION}")
            plan = cls(
                segments={
                    name: Segment(**{side: _names(tensors) for side, tensors in segment.items()})
                    for name, segment in raw.pop("segments").items()
                },
                paths={name: _names(path) for name, path in raw.pop("paths").items()},
                slots={name: _slot(slot) for name, slot in raw.pop("slots").items()},
                steps=tuple(_step(step) for step in raw.pop("steps")),
                starts={
                    int(row): tuple(_update(update) for update in updates)
                    for row, updates in raw.pop("starts", {}).items()
                },
                init_noise_sigma=_number(raw.pop("init_noise_sigma")),
                prediction=_name(raw.pop("prediction")),
                key=dict(raw.pop("key")),
                **raw,
            )
            plan.validate()
        except StepPlanError:
            raise
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            cause = f"{type(error).__name__}: {' '.join(str(error).split())}"
            raise StepPlanError(f"the step plan cannot be read: {cause}") from error
        return plan


def _name(raw: Any) -> str:
    if not isinstance(raw, str):
        raise TypeError(f"{raw!r} is not a name")
    return raw


def _names(raw: Any) -> tuple[str, ...]:
    if not isinstance(raw, list):
        raise TypeError(f"{raw!r} is not a list of names")
    return tuple(_name(name) for name in raw)


def _number(raw: Any) -> float:
    if isinstance(raw, bool) or not isinstance(raw, int | float):
        raise TypeError(f"{raw!r} is not a number")
    return float(raw)


def _slot(raw: dict[str, Any]) -> Slot:
    slot = Slot(**raw)
    if isinstance(slot.history, bool) or not isinstance(slot.history, int):
        raise TypeError(f"the history {slot.history!r} is not a whole number")
    _name(slot.tensor)
    return slot


def _lags(raw: Mapping[str, Any]) -> dict[int, float]:
    return {int(lag): _number(coefficient) for lag, coefficient in raw.items()}


def _update(raw: dict[str, Any]) -> Update:
    raw = dict(raw)
    return Update(x=_lags(raw.pop("x")), m=_lags(raw.pop("m")), noise=_number(raw.pop("noise")), **raw)


def _step(raw: dict[str, Any]) -> Step:
    raw = dict(raw)
    return Step(
        x=_lags(raw.pop("x")),
        m=_lags(raw.pop("m")),
        write=_names(raw.pop("write")),
        read={name: tuple(_number(alpha) for alpha in alphas) for name, alphas in raw.pop("read").items()},
        path=_name(raw.pop("path")),
        guidance=raw.pop("guidance"),
        **{name: _number(value) for name, value in raw.items()},
    )
