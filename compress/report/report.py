"""The report of a run as typed plain data, and as a table for the terminal."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from compress.errors import PassError

if TYPE_CHECKING:
    from rich.table import Table

    from export.step_plan import StepPlan

SCHEMA_VERSION = 1

Number = Annotated[float, Field(allow_inf_nan=False)]
Interval = tuple[Number, Number]
Role = Literal["original", "engine", "plain runtime", "fewer steps"]


class _Plain(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Gate(_Plain):
    """One bound of the recipe and the number it was held against.

    Attributes:
        bound: `max_loss`, `min_ratio`, `max_ratio`, `min` or `max`.
        limit: what the recipe says.
        found: what was measured, in the sense of the bound: a loss, a ratio, or the value itself.
        target: whose number was judged.
        ok: whether the bound is met.
    """

    bound: str
    limit: Number
    found: Number
    target: str
    ok: bool


class Row(_Plain):
    """One metric at every stage; None where it has no meaning there.

    Attributes:
        metric: its fixed name.
        unit: of all its numbers; "" where it has none.
        better: which direction is better.
        original: the diffusers pipeline in float32.
        compressed: after all passes, in PyTorch.
        exported: the lowered graphs.
        engine: the target that `Engine.open` picks.
        targets: every target of the engine folder.
        per_pass: after each pass, in PyTorch.
        interval: 95 % interval by column (`original`, `compressed`, `exported`, a target, a pass).
        samples: how many pictures (or timed runs) are behind a number, by column.
        change: engine minus original over the same prompts and seeds, and its 95 % interval.
        gate: every bound the recipe sets on this metric.
        ok: whether all are met; None where there are none.
        note: one sentence on how to read the number.
    """

    metric: str
    unit: str
    better: Literal["lower", "higher"]
    original: Number | None = None
    compressed: Number | None = None
    exported: Number | None = None
    engine: Number | None = None
    targets: dict[str, Number] = {}
    per_pass: dict[str, Number] = {}
    interval: dict[str, Interval] = {}
    samples: dict[str, int] = {}
    change: Number | None = None
    change_interval: Interval | None = None
    gate: tuple[Gate, ...] = ()
    ok: bool | None = None
    note: str = ""


class Latency(_Plain):
    """One contestant of the interleaved timing, for one thread count; milliseconds, batch 1, whole pictures.

    Attributes:
        name: e.g. `openvino-cpu`.
        role: what it stands for.
        threads: of the computation.
        steps: sampling steps.
        median: of the timed runs.
        quartiles: 25 % and 75 % of the timed runs.
        runs: how many were timed.
        evidence: its label.
    """

    name: str
    role: Role
    threads: int
    steps: int
    median: Number
    quartiles: Interval
    runs: int
    evidence: str


class Size(_Plain):
    """Bytes needed to run, by part, in MiB."""

    name: str
    role: Role
    parts: dict[str, Number]

    @property
    def mib(self) -> float:
        """The sum of the parts."""
        return sum(self.parts.values())


class Baseline(_Plain):
    """A contestant's quality beside its latency: one point of the trade-off.

    Attributes:
        name: e.g. `9 steps, plain onnxruntime-cpu`.
        role: what it stands for.
        steps: sampling steps.
        threads: of the latency.
        latency_ms: median.
        quality: metric -> value.
        interval: metric -> 95 % interval.
        samples: how many pictures the quality comes from.
    """

    name: str
    role: Role
    steps: int
    threads: int
    latency_ms: Number
    quality: dict[str, Number] = {}
    interval: dict[str, Interval] = {}
    samples: int = 0


class Curve(_Plain):
    """Error against the original at every network call, from the same noise.

    Attributes:
        stage: whose error.
        relative_l2: of the latents after each call, both runs left to themselves.
        psnr_db: likewise, in dB.
        one_step: relative error of the guided network output at each call, given the original's latents.
    """

    stage: str
    relative_l2: tuple[Number, ...]
    psnr_db: tuple[Number, ...]
    one_step: tuple[Number, ...] = ()


class Handover(_Plain):
    """Agreement of one stage with the stage before it, on final latents from the same noise."""

    before: str
    after: str
    psnr_db: Number


class Layer(_Plain):
    """Agreement of one layer (or graph output) of two versions of a network.

    Attributes:
        name: of the layer in its part, or of a graph and its output.
        local_db: SQNR of its output when both versions are given the same input.
        cumulative_db: SQNR of its output when each version runs by itself up to there; None where not measured.
    """

    name: str
    local_db: Number
    cumulative_db: Number | None = None


class Localisation(_Plain):
    """Where error enters.

    Attributes:
        handovers: stage by stage.
        stage: the stage that loses most.
        layer: the layer, or graph output, of that stage that is worst by itself.
        first_below: the first layer, in the order of execution, below `threshold_db`.
        largest_drop: the layer at which the cumulative SQNR falls most.
        threshold_db: of `first_below`.
        layers: the worst ones, worst first.
        graphs: outputs of the exported graphs against PyTorch, and of the engine's against the exported ones.
    """

    handovers: tuple[Handover, ...]
    stage: str | None
    layer: str | None = None
    first_below: str | None = None
    largest_drop: str | None = None
    threshold_db: Number | None = None
    layers: tuple[Layer, ...] = ()
    graphs: dict[str, tuple[Layer, ...]] = {}


class PlanRow(_Plain):
    """One network call as the report draws it."""

    t: Number
    path: str
    reads: dict[str, tuple[Number, ...]] = {}
    writes: tuple[str, ...] = ()
    guidance: str = "none"


class Plan(_Plain):
    """The step plan in brief: what was compiled for which sampler, and what runs at each call."""

    sampler: str
    steps: int
    guidance_scale: Number | None
    prediction: str
    paths: dict[str, tuple[str, ...]]
    rows: tuple[PlanRow, ...]

    @classmethod
    def of(cls, plan: StepPlan) -> Plan:
        """Take from a step plan what the report draws."""
        scale = plan.key.get("guidance_scale")
        guided = any(step.guidance != "none" for step in plan.steps)
        return cls(
            sampler=str(plan.key.get("scheduler", "")),
            steps=int(plan.key.get("steps", plan.network_calls)),
            guidance_scale=float(scale) if scale is not None and guided else None,
            prediction=plan.prediction,
            paths={name: tuple(path) for name, path in plan.paths.items()},
            rows=tuple(
                PlanRow(t=step.t, path=step.path, reads=dict(step.read), writes=step.write, guidance=step.guidance)
                for step in plan.steps
            ),
        )


class Verdict(_Plain):
    """What the run comes to.

    Attributes:
        ok: every gate is met.
        headline: one sentence with the gains and what they cost.
        failed: one sentence per gate that is not met.
        notes: what a reader has to know to judge the numbers.
    """

    ok: bool
    headline: str
    failed: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()


class Report(_Plain):
    """All of it; `report.json` is this and nothing else."""

    schema_version: Literal[1] = 1
    name: str
    created: str
    verdict: Verdict
    recipe: dict[str, Any]
    environment: dict[str, str]
    evidence: dict[str, str]
    plan: Plan
    folded: str = ""
    rows: tuple[Row, ...]
    target: str
    latency: tuple[Latency, ...] = ()
    sizes: tuple[Size, ...] = ()
    baselines: tuple[Baseline, ...] = ()
    curves: tuple[Curve, ...] = ()
    localisation: Localisation | None = None
    edits: dict[str, dict[str, int]] = {}

    def to_json(self) -> str:
        """Serialise; no number is infinite or not-a-number, by validation."""
        return self.model_dump_json(indent=1) + "\n"

    @classmethod
    def from_json(cls, text: str) -> Report:
        """Read a report.

        Raises:
            PassError: it is not a report of this schema version.
        """
        try:
            return cls.model_validate_json(text)
        except ValidationError as error:
            first = error.errors()[0]
            where = ".".join(map(str, first["loc"])) or "the text"
            raise PassError(
                f"this is not a report of schema version {SCHEMA_VERSION}: {where}: {first['msg']}"
            ) from error

    def row(self, metric: str) -> Row | None:
        """Return the row of a metric, or None where it was not measured."""
        return next((row for row in self.rows if row.metric == metric), None)


LABELS = {
    "latency_ms": "latency",
    "size_mib": "size",
    "peak_rss_mib": "peak memory",
    "latent_psnr_db": "latent PSNR",
    "image_psnr_db": "image PSNR",
    "ssim": "SSIM",
    "frechet_distance": "Fréchet distance",
    "attribute_accuracy": "attribute accuracy",
    "clip_score": "CLIP score",
}
"""Metric -> its name in prose."""

_DIGITS = {"ssim": 4, "latent_psnr_db": 1, "image_psnr_db": 1, "size_mib": 2, "peak_rss_mib": 0, "clip_score": 2}


def shown(metric: str, value: float | None) -> str:
    """Write a value of a metric for people; accuracy in percent, latency with three digits."""
    if value is None:
        return ""
    if metric == "attribute_accuracy":
        return f"{100 * value:.1f} %"
    if metric in _DIGITS:
        return f"{value:,.{_DIGITS[metric]}f}"
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}" if abs(value) < 100 else f"{value:.0f}"


def signed(value: float, digits: int) -> str:
    """Write a difference with its sign, e.g. `−0.3`; no sign where it rounds to zero."""
    text = f"{value:+.{digits}f}"
    return text[1:] if float(text) == 0 else text.replace("-", "−")


def shown_interval(metric: str, interval: Interval | None) -> str:
    """Write an interval for people, e.g. `94.1 % to 96.0 %`; empty where there is none."""
    if interval is None:
        return ""
    low, high = (shown(metric, bound) for bound in interval)
    return f"{low.removesuffix(' %')}–{high}"


BOUNDS = {
    "max_loss": "loss at most",
    "min_ratio": "original / engine at least",
    "max_ratio": "engine / original at most",
    "min": "at least",
    "max": "at most",
}
"""Bound of a gate -> how it reads."""


def shown_gate(metric: str, gate: Gate) -> str:
    """Write a gate for people, e.g. `original / engine at least 5 (found 5.8)`."""
    if gate.bound.endswith("ratio"):
        limit, found = f"{gate.limit:.3g}", f"{gate.found:.3g}"
    elif metric == "attribute_accuracy" and gate.bound == "max_loss":
        limit, found = f"{100 * gate.limit:.3g} points", f"{100 * gate.found:.2g} points"
    else:
        limit, found = shown(metric, gate.limit), shown(metric, gate.found)
    return f"{BOUNDS[gate.bound]} {limit} (found {found})"


def table(report: Report) -> Table:
    """Lay the rows out for the terminal."""
    from rich.table import Table
    from rich.text import Text

    passes = list(dict.fromkeys(name for row in report.rows for name in row.per_pass))
    others = [name for name in dict.fromkeys(t for row in report.rows for t in row.targets) if name != report.target]
    style = "green" if report.verdict.ok else "red"
    result = Table(title=Text(report.verdict.headline, style), title_justify="left", header_style="bold")
    result.add_column("metric")
    result.add_column("original", justify="right")
    for name in passes:
        result.add_column(f"after {name}", justify="right")
    # What the last pass left is the compressed model.
    stages = ("exported",) if passes else ("compressed", "exported")
    for name in (*stages, report.target, *others):
        result.add_column(name, justify="right")
    result.add_column("gate")
    for row in report.rows:
        gates = Text("\n").join(
            Text(("✓ " if gate.ok else "✗ ") + shown_gate(row.metric, gate), "green" if gate.ok else "bold red")
            for gate in row.gate
        )
        cells: list[tuple[str, float | None]] = [
            ("original", row.original),
            *((name, row.per_pass.get(name)) for name in passes),
            *((name, getattr(row, name)) for name in stages),
            (report.target, row.engine),
            *((name, row.targets.get(name)) for name in others),
        ]
        unit = f" ({row.unit})" if row.unit else ""
        result.add_row(LABELS.get(row.metric, row.metric) + unit, *(_cell(row, *cell) for cell in cells), gates)
    return result


def _cell(row: Row, column: str, value: float | None) -> str:
    interval = shown_interval(row.metric, row.interval.get(column))
    return shown(row.metric, value) + (f"\n{interval}" if interval else "")


def latency_table(report: Report) -> Table:
    """Lay the timed contestants out for the terminal, fastest first."""
    from rich.table import Table

    result = Table(title="latency, one picture, interleaved runs", title_justify="left", header_style="bold")
    for name in ("contestant", "threads", "steps", "median ms", "quartiles", "against original"):
        result.add_column(name, justify="left" if name == "contestant" else "right")
    original: Mapping[int, float] = {row.threads: row.median for row in report.latency if row.role == "original"}
    for row in sorted(report.latency, key=lambda row: (row.threads, row.median)):
        ratio = f"{original[row.threads] / row.median:.2f}x" if row.threads in original else ""
        quartiles = f"{shown('latency_ms', row.quartiles[0])}–{shown('latency_ms', row.quartiles[1])}"
        name = row.name if row.name == row.role else f"{row.name} ({row.role})"
        result.add_row(name, str(row.threads), str(row.steps), shown("latency_ms", row.median), quartiles, ratio)
    return result
