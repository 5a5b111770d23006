"""The tables of the caching benchmark: all of them for results/caching.md, the short ones for README.md."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any

from recipes.benchmarks.tables import README, RESULTS, newest, table

__all__ = ["BEGIN", "END", "README", "RESULTS", "document", "markdown", "short", "with_tables"]

BEGIN, END = "<!-- caching: begin -->", "<!-- caching: end -->"
HEADS = (
    "ms",
    "ratio",
    "latent PSNR, dB",
    "fewer steps at equal latency, dB",
    "Frechet (95 %)",
    "attributes right, %",
    "change, points",
)
DEFAULTS = {"unet": "DPMSolverMultistepScheduler", "mmdit": "FlowMatchEulerDiscreteScheduler"}
SHORT_STEPS = 50
_NOTHING = "-"


def groups(report: Mapping[str, Any]) -> dict[tuple[str, str, int], list[Mapping[str, Any]]]:
    """(model, sampler, steps) -> its rows, in the order of the report."""
    found: dict[tuple[str, str, int], list[Mapping[str, Any]]] = {}
    for row in report["entries"]:
        found.setdefault((row["model"], row["sampler"], row["steps"]), []).append(row)
    return found


def fewer_steps_db(ms: float, rows: Sequence[Mapping[str, Any]]) -> float | None:
    """Decibels that fewer steps reach in `ms`, on the line between the two neighbours; None outside their range.

    Args:
        ms: of the network loop.
        rows: of one (model, sampler, steps).
    """
    points = sorted(
        (row["ms"], row["latent_psnr_db"]["value"])
        for row in rows
        if row["entry"].endswith(" steps") and "ms" in row and "latent_psnr_db" in row
    )
    for (low, under), (high, over) in pairwise(points):
        if low <= ms <= high:
            return under if high == low else under + (over - under) * (ms - low) / (high - low)
    return None


def group_table(title: str, rows: Sequence[Mapping[str, Any]], short: bool = False) -> str:
    """One (model, sampler, steps): every entry; what was refused is left out of the short table."""
    lines = []
    for row in rows:
        if "refused" in row:
            if not short:
                lines.append([row["entry"], *[_NOTHING] * len(HEADS)])
            continue
        preset = not (row["entry"] == "full" or row["entry"].endswith(" steps"))
        equal = fewer_steps_db(row["ms"], rows) if preset and "ms" in row else None
        lines.append(
            [
                row["entry"],
                f"{row['ms']:.1f}" if "ms" in row else _NOTHING,
                f"{row['ratio']:.1f}x" if "ratio" in row else _NOTHING,
                _value(row, "latent_psnr_db", "{:.1f}"),
                _NOTHING if equal is None else f"{equal:.1f}",
                _value(row, "frechet", "{:.2f}", interval=True),
                _value(row, "attributes", "{:.1f}", factor=100.0),
                _value(row, "change_points", "{:+.1f}", interval=True),
            ]
        )
    return table([title, *HEADS], lines)


def _value(row: Mapping[str, Any], key: str, form: str, *, interval: bool = False, factor: float = 1.0) -> str:
    """A number, perhaps with its interval; `-` where it was not measured."""
    found = row.get(key)
    if found is None:
        return _NOTHING
    said = form.format(factor * found["value"])
    if not interval or found["interval"] is None:
        return said
    low, high = (form.format(factor * bound) for bound in found["interval"])
    return f"{said} ({low} to {high})"


def markdown(report: Mapping[str, Any]) -> str:
    """A table per model, sampler and number of steps, and below it why presets were refused."""
    parts = []
    for (model, sampler, steps), rows in groups(report).items():
        parts.append(f"## {model}, {sampler}, {steps} steps")
        parts.append(group_table("preset", rows))
        refused = [f"- {row['entry']}: {row['refused']}" for row in rows if "refused" in row]
        if refused:
            parts.append("Refused:\n\n" + "\n".join(refused))
    return "\n\n".join(parts)


def short(report: Mapping[str, Any]) -> str:
    """The tables of README.md: the models' own samplers at 50 steps."""
    parts = [
        group_table(f"{model}, {sampler}, {steps} steps", rows, short=True)
        for (model, sampler, steps), rows in groups(report).items()
        if steps == SHORT_STEPS and DEFAULTS.get(model) == sampler
    ]
    return "\n\n".join([*parts, evidence(report)])


def evidence(report: Mapping[str, Any]) -> str:
    """How, where and when the numbers were measured."""
    dates = sorted({row["date"] for row in report["entries"]})
    samples = sorted({row["samples"] for row in report["entries"]})
    when = " to ".join(dict.fromkeys([dates[0], dates[-1]])) if dates else report["date"]
    count = " or ".join(map(str, samples))
    return (
        f"Measured on {report['environment']['processor']}, {when}, {report['target']}. Times are those of the "
        "denoising loop alone: one picture, one thread, medians of interleaved runs. Quality is that of "
        f"{count} held-out prompts, against the full run from the same noise. Fewer steps at equal latency: what the "
        "same sampler reaches in as many milliseconds with fewer steps, interpolated between the two nearest."
    )


def document(report: Mapping[str, Any]) -> str:
    """The whole of results/caching.md."""
    return f"# Caching against fewer steps\n\n{evidence(report)}\n\n{markdown(report)}\n"


def with_tables(text: str, report: Mapping[str, Any] | None = None) -> str:
    """The text with the tables between its marks replaced; a text without marks stays as it is.

    Args:
        text: of README.md.
        report: None takes the newest results.
    """
    before, begin, rest = text.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        return text
    return f"{before}{BEGIN}\n{short(newest('caching') if report is None else report)}\n{END}{after}"


def main() -> None:
    """Rewrite README.md."""
    README.write_text(with_tables(README.read_text(encoding="utf-8")), encoding="utf-8")


if __name__ == "__main__":
    main()
