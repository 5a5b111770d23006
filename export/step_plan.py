"""The StepPlan: the denoising loop as plain data, one row per network call."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from export import contract as contracts
from export import plan_json
from export.contract import Contract
from export.plan_checks import check
from export.plan_rows import (
    Gate,
    GateReference,
    GuidanceMode,
    Segment,
    Slot,
    SlotHalves,
    SlotKind,
    Step,
    StepPlanError,
    Update,
)

__all__ = [
    "SCHEMA_VERSION",
    "Contract",
    "Gate",
    "GateReference",
    "GuidanceMode",
    "Segment",
    "Slot",
    "SlotHalves",
    "SlotKind",
    "Step",
    "StepPlan",
    "StepPlanError",
    "Update",
]

SCHEMA_VERSION = 1


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
        gate: what decides the gated rows.
        contract: what the weights were distilled for; None where any sampler will do.
        once: segments that run before the first row, in order, and belong to no path: those that take `timestep`, or
            what one of those gives, for all rows as one batch, the others once.
    """

    segments: Mapping[str, Segment]
    paths: Mapping[str, tuple[str, ...]]
    slots: Mapping[str, Slot]
    steps: tuple[Step, ...]
    starts: Mapping[int, tuple[Update, ...]] = field(default_factory=dict)
    init_noise_sigma: float = 1.0
    prediction: str = "epsilon"
    key: Mapping[str, Any] = field(default_factory=dict)
    gate: Gate | None = None
    contract: Contract | None = None
    once: tuple[str, ...] = ()

    @property
    def network_calls(self) -> int:
        """How many times the denoiser is called, whatever the path."""
        return len(self.steps)

    @property
    def output(self) -> str:
        """The name of the network output: the last output of the last segment of every path."""
        return self.segments[next(iter(self.paths.values()))[-1]].outputs[-1]

    @property
    def full_path(self) -> str:
        """The path that runs where a slot holds nothing usable, or a gate decides so: `full`, or else the first."""
        return "full" if "full" in self.paths else next(iter(self.paths))

    @property
    def latent_input(self) -> str:
        """The tensor that is the latent, if the caller names no other: `sample` where a segment takes it."""
        takes = any("sample" in segment.inputs for segment in self.segments.values())
        return "sample" if takes else "hidden_states"

    def history(self) -> tuple[int, int]:
        """How many latents and how many network outputs the runtime must keep, the current one included."""
        rows: list[Step | Update] = [*self.steps, *(update for updates in self.starts.values() for update in updates)]
        return (
            1 + max((lag for row in rows for lag in row.x), default=0),
            1 + max((lag for row in rows for lag in row.m), default=0),
        )

    def validate(self, conditioning: tuple[str, ...] | None = None, latent_input: str | None = None) -> None:
        """Check that every name resolves, every read was written before, and every number is finite.

        Args:
            conditioning: the tensors given from outside (`sample`, `timestep`, ...); None skips the check that
                each segment input is produced somewhere.
            latent_input: the tensor that is the latent; None is the property of that name.

        Raises:
            StepPlanError: one sentence with the row and the cause.
        """
        check(self, conditioning, latent_input or self.latent_input)

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
                segments={name: plan_json.segment(segment) for name, segment in raw.pop("segments").items()},
                paths={name: plan_json.names(path) for name, path in raw.pop("paths").items()},
                slots={name: plan_json.slot(slot) for name, slot in raw.pop("slots").items()},
                steps=tuple(plan_json.step(step) for step in raw.pop("steps")),
                starts={
                    int(row): tuple(plan_json.update(update) for update in updates)
                    for row, updates in raw.pop("starts", {}).items()
                },
                init_noise_sigma=plan_json.number(raw.pop("init_noise_sigma")),
                prediction=plan_json.name(raw.pop("prediction")),
                key=dict(raw.pop("key")),
                gate=plan_json.gate(raw.pop("gate", None)),
                contract=contracts.read(raw.pop("contract", None)),
                once=plan_json.names(raw.pop("once", [])),
                **raw,
            )
            plan.validate()
        except StepPlanError:
            raise
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            cause = f"{type(error).__name__}: {' '.join(str(error).split())}"
            raise StepPlanError(f"the step plan cannot be read: {cause}") from error
        return plan
