"""From measured numbers to a verdict: the rows of the report, the gates, and the errors that are never silent."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal, NamedTuple

from compress.errors import PassError, RecipeError
from compress.measure.metrics import Estimate
from compress.report.report import LABELS, Gate, Latency, Row, Verdict, shown, shown_gate, signed


class _Kind(NamedTuple):
    unit: str
    better: Literal["lower", "higher"]
    cost: bool = False
    against_original: bool = False
    note: str = ""


METRICS: Mapping[str, _Kind] = {
    "latency_ms": _Kind("ms", "lower", cost=True, note="One picture end to end, median of interleaved runs."),
    "size_mib": _Kind(
        "MiB", "lower", cost=True, note="Original: float32 weights of the parts used; engine: every file it reads."
    ),
    "peak_rss_mib": _Kind(
        "MiB", "lower", cost=True, note="A fresh process that opens the model and makes one picture."
    ),
    "latent_psnr_db": _Kind(
        "dB", "higher", against_original=True, note="Against the original from the same noise; peak is 4 sigma."
    ),
    "image_psnr_db": _Kind(
        "dB", "higher", against_original=True, note="Against the original's pictures from the same noise."
    ),
    "ssim": _Kind("", "higher", against_original=True, note="Against the original's pictures from the same noise."),
    "frechet_distance": _Kind(
        "",
        "lower",
        against_original=True,
        note="Scorer features, on at most 32 principal components, against the original's pictures; biased upwards by "
        "about 1/n, so compare at equal n only.",
    ),
    "attribute_accuracy": _Kind("", "higher", note="Attributes of the prompt that the scorer reads off the picture."),
    "clip_score": _Kind("", "higher", note="100 x cosine of picture and prompt in the CLIP model."),
}
"""Metric -> its unit and direction; whether it is a cost (judged on the target that is picked, while quality is judged
on the worst target); whether it is a comparison with the original, so that the original itself has no value."""


@dataclass(frozen=True)
class Findings:
    """Everything measured, as metric -> estimate, stage by stage.

    Attributes:
        original: the diffusers pipeline.
        targets: engine target -> its numbers.
        target: the one that `Engine.open` picks.
        compressed: after all passes, in PyTorch.
        exported: the lowered graphs.
        per_pass: after each pass, in PyTorch.
        changes: target -> metric -> engine minus original, over pairs.
    """

    original: Mapping[str, Estimate]
    targets: Mapping[str, Mapping[str, Estimate]]
    target: str
    compressed: Mapping[str, Estimate] = field(default_factory=dict)
    exported: Mapping[str, Estimate] = field(default_factory=dict)
    per_pass: Mapping[str, Mapping[str, Estimate]] = field(default_factory=dict)
    changes: Mapping[str, Mapping[str, Estimate]] = field(default_factory=dict)


Gates = Mapping[str, Mapping[str, float]]
"""Metric -> bound -> limit, as in the recipe."""


def refuse_gates(gates: Gates, measured: Sequence[str]) -> None:
    """Refuse, before anything is computed, gates that could never be judged.

    Args:
        gates: of the recipe.
        measured: metrics that will be measured.

    Raises:
        RecipeError: a gate on a metric that is not measured, or a bound relative to an original that has no value.
    """
    for metric, bounds in gates.items():
        if metric not in METRICS:
            raise RecipeError(f"gates.{metric}: there is no such metric; known: {', '.join(METRICS)}")
        if metric not in measured:
            raise RecipeError(f"gates.{metric}: this recipe does not measure it; it measures {', '.join(measured)}")
        for bound in bounds:
            if METRICS[metric].against_original and bound not in ("min", "max"):
                raise RecipeError(
                    f"gates.{metric}.{bound}: {metric} compares with the original, which has no value of its own; "
                    "bound it with min or max"
                )


def rows(findings: Findings, gates: Gates) -> list[Row]:
    """Lay the numbers out, one row per metric that was measured, and judge the gates.

    A cost (latency, size, memory) is judged on the target that `Engine.open` picks; a quality is judged on the worst
    target, since an engine folder may be opened with any.

    Raises:
        RecipeError: a gate bounds what was not measured (a prompt file without attributes, for one).
    """
    present = [m for m in METRICS if any(m in stage for stage in (findings.original, *findings.targets.values()))]
    for metric in gates:
        if not any(metric in stage for stage in findings.targets.values()):
            raise RecipeError(f"gates.{metric}: nothing was measured that it could bound")
    return [_row(metric, findings, gates.get(metric, {})) for metric in present]


def _row(metric: str, findings: Findings, bounds: Mapping[str, float]) -> Row:
    kind = METRICS[metric]
    columns: dict[str, Estimate] = {}
    stages = {"original": findings.original, "compressed": findings.compressed, "exported": findings.exported}
    for name, stage in {**stages, **findings.per_pass, **findings.targets}.items():
        if metric in stage:
            columns[name] = stage[metric]
    targets = {name: columns[name].value for name in findings.targets if name in columns}
    original = columns["original"].value if "original" in columns else None
    judged = [_judge(bound, limit, original, targets, findings.target, kind) for bound, limit in bounds.items()]
    change = findings.changes.get(findings.target, {}).get(metric)
    value = {name: estimate.value for name, estimate in columns.items()}
    return Row(
        metric=metric,
        unit=kind.unit,
        better=kind.better,
        original=original,
        compressed=value.get("compressed"),
        exported=value.get("exported"),
        engine=value.get(findings.target),
        targets=targets,
        per_pass={name: value[name] for name in findings.per_pass if name in value},
        interval={name: estimate.interval for name, estimate in columns.items() if estimate.interval is not None},
        samples={name: estimate.n for name, estimate in columns.items()},
        change=None if change is None else change.value,
        change_interval=None if change is None else change.interval,
        gate=tuple(judged),
        ok=all(gate.ok for gate in judged) if judged else None,
        note=kind.note,
    )


def _judge(
    bound: str, limit: float, original: float | None, targets: Mapping[str, float], target: str, kind: _Kind
) -> Gate:
    sense = 1.0 if kind.better == "higher" else -1.0
    name = target if kind.cost else min(targets, key=lambda name: sense * targets[name])
    engine = targets[name]
    if bound in ("min", "max"):
        found = engine
    elif original is None:
        raise RecipeError(f"a gate with {bound} needs the original's value, and it has none")
    elif bound == "max_loss":
        found = sense * (original - engine)
    else:
        found = _ratio(original, engine) if bound == "min_ratio" else _ratio(engine, original)
    ok = found >= limit if bound.startswith("min") else found <= limit
    return Gate(bound=bound, limit=limit, found=found, target=name, ok=ok)


def _ratio(above: float, below: float) -> float:
    if below <= 0:
        raise PassError("a ratio gate needs positive numbers, but one measured value is zero")
    return above / below


def verdict(table: Sequence[Row], notes: Sequence[str] = ()) -> Verdict:
    """Sum the rows up in one sentence, and list the gates that are not met."""
    failed = tuple(
        f"{LABELS[row.metric]}: {shown_gate(row.metric, gate)} on {gate.target}"
        for row in table
        for gate in row.gate
        if not gate.ok
    )
    gated = sum(len(row.gate) for row in table)
    found = {row.metric: _gain(row) for row in table}
    gains = [found[metric] for metric in _HEADLINE if found.get(metric)]
    end = f"{len(failed)} of {gated} gates not met" if failed else "all gates met" if gated else "no gates set"
    return Verdict(ok=not failed, headline=f"{', '.join(gains)}: {end}", failed=failed, notes=tuple(notes))


_HEADLINE = ("latency_ms", "size_mib", "attribute_accuracy", "image_psnr_db")


def _gain(row: Row) -> str:
    if row.engine is None:
        return ""
    if row.metric == "latency_ms" and row.original:
        ratio = row.original / row.engine
        return f"{ratio:.2g}× faster" if ratio >= 1 else f"{1 / ratio:.2g}× slower"
    if row.metric == "size_mib" and row.original:
        return f"{100 * row.engine / row.original:.0f} % of the size"
    if row.metric == "attribute_accuracy" and row.original is not None:
        return f"attribute accuracy {signed(100 * (row.engine - row.original), 1)} points"
    if row.metric == "image_psnr_db":
        return f"image PSNR {shown(row.metric, row.engine)} dB"
    return ""


def check_speed(latencies: Sequence[Latency], target: str, allow_slower: bool = False) -> None:
    """Refuse an engine that is slower than what it replaces.

    Args:
        latencies: all the timed contestants.
        target: the engine target that is picked.
        allow_slower: the recipe says that this is fine.

    Raises:
        PassError: at some thread count the engine takes longer than the original pipeline.
    """
    originals = {row.threads: row.median for row in latencies if row.role == "original"}
    for row in latencies:
        if row.role != "engine" or row.name != target or row.threads not in originals or allow_slower:
            continue
        if row.median > originals[row.threads]:
            raise PassError(
                f"the engine is slower than the original pipeline ({row.median:.0f} ms against "
                f"{originals[row.threads]:.0f} ms on {row.threads} thread(s) with {target}); choose another target or "
                "fewer passes, or set evaluate.allow_slower: true"
            )
