"""The tables of the caching benchmark: all of them for results/caching.md, the short ones for README.md."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from itertools import pairwise
from typing import Any

from recipes.benchmarks.tables import README, RESULTS, newest, table

__all__ = ["BEGIN", "END", "README", "RESULTS", "TARGET", "document", "markdown", "short", "with_tables"]

BEGIN, END = "<!-- caching: begin -->", "<!-- caching: end -->"
TARGET = "openvino-cpu"
SHORT_HEADS = (
    "faster",
    "latent PSNR, dB (95 %)",
    "fewer steps at equal latency, dB",
    "Frechet (95 %)",
    "attributes right, %",
)
HEADS = (
    "ms (quartiles)",
    "faster",
    "faster, prompt to picture",
    "faster, by MACs",
    "latent PSNR, dB (95 %)",
    "pooled, dB",
    "fewer steps at equal latency, dB",
    "image PSNR, dB",
    "Frechet (95 %)",
    "attributes right, % (95 %)",
    "change, points (95 %)",
    "calls full + cached",
    "plan",
)
DEFAULTS = {"unet": "DPMSolverMultistepScheduler", "mmdit": "FlowMatchEulerDiscreteScheduler"}
SHORT_STEPS = 50
_NOTHING = "-"

Row = Mapping[str, Any]


def groups(report: Row) -> dict[tuple[str, str, int, str], list[Row]]:
    """(model, sampler, steps, target) -> its rows, in the order of the report."""
    found: dict[tuple[str, str, int, str], list[Row]] = {}
    for row in report["entries"]:
        name = row["model"], row["sampler"], row["steps"], row.get("target", report["target"])
        found.setdefault(name, []).append(row)
    return found


def shown(report: Row) -> Iterator[tuple[str, list[Row]]]:
    """What README.md shows: the models' own samplers at 50 steps, each with its title."""
    for (model, sampler, steps, target), rows in groups(report).items():
        if steps == SHORT_STEPS and DEFAULTS.get(model) == sampler and target == TARGET:
            yield f"{model}, {sampler}, {steps} steps", rows


def _few(rows: Sequence[Row]) -> list[tuple[float, float]]:
    """(ms, dB) of the runs with fewer steps, fastest first."""
    return sorted(
        (row["ms"], row["latent_psnr_db"]["value"])
        for row in rows
        if row["entry"].endswith(" steps") and "ms" in row and "latent_psnr_db" in row
    )


def fewer_steps_db(ms: float, rows: Sequence[Row]) -> float | None:
    """Decibels that fewer steps reach in `ms`, on the line between the two neighbours; None outside their range.

    Args:
        ms: of the denoising loop.
        rows: of one (model, sampler, steps).
    """
    for (low, under), (high, over) in pairwise(_few(rows)):
        if low <= ms <= high:
            return under if high == low else under + (over - under) * (ms - low) / (high - low)
    return None


def _equal(row: Row, rows: Sequence[Row]) -> str:
    """What fewer steps reach in the time of a preset, bounded by the nearest run where it lies outside them."""
    points = _few(rows)
    if row["entry"] == "full" or row["entry"].endswith(" steps") or "ms" not in row or not points:
        return _NOTHING
    found = fewer_steps_db(row["ms"], rows)
    if found is not None:
        return f"{found:.1f}"
    return f"< {points[0][1]:.1f}" if row["ms"] < points[0][0] else f"> {points[-1][1]:.1f}"


def group_table(title: str, rows: Sequence[Row], short: bool = False) -> str:
    """One (model, sampler, steps): every entry; what was refused is left out of the short table."""
    heads = SHORT_HEADS if short else HEADS
    full = next((row for row in rows if row["entry"] == "full"), {})
    lines = []
    for row in rows:
        if "refused" not in row:
            lines.append([row["entry"], *(_brief(row, rows) if short else _whole(row, rows, full))])
        elif not short:
            lines.append([row["entry"], *[_NOTHING] * len(heads)])
    return table([title, *heads], lines)


def _brief(row: Row, rows: Sequence[Row]) -> list[str]:
    return [
        _plain(row, "ratio", "{:.2f}x"),
        _value(row, "latent_psnr_db", "{:.1f}"),
        _equal(row, rows),
        _value(row, "frechet", "{:.2f}"),
        _value(row, "attributes", "{:.1f}", factor=100.0, interval=False),
    ]


def _whole(row: Row, rows: Sequence[Row], full: Row) -> list[str]:
    spread = "" if "ms_quartiles" not in row else " ({:.1f} to {:.1f})".format(*row["ms_quartiles"])
    return [
        _plain(row, "ms", "{:.1f}") + spread,
        _plain(row, "ratio", "{:.2f}x"),
        _plain(row, "whole_ratio", "{:.2f}x"),
        f"{full['cost'] / row['cost']:.2f}x" if "cost" in row and "cost" in full else _NOTHING,
        _value(row, "latent_psnr_db", "{:.1f}"),
        _plain(row, "pooled_psnr_db", "{:.1f}"),
        _equal(row, rows),
        _value(row, "image_psnr_db", "{:.1f}", interval=False),
        _value(row, "frechet", "{:.2f}"),
        _value(row, "attributes", "{:.1f}", factor=100.0),
        _value(row, "change_points", "{:+.1f}"),
        f"{row['full_calls']} + {row['cached_calls']}" if "cached_calls" in row else _NOTHING,
        f"`{row['strip']}`" if "strip" in row else _NOTHING,
    ]


def _plain(row: Row, key: str, form: str) -> str:
    return form.format(row[key]) if key in row else _NOTHING


def _value(row: Row, key: str, form: str, *, interval: bool = True, factor: float = 1.0) -> str:
    """A number, perhaps with its interval; `-` where it was not measured."""
    found = row.get(key)
    if found is None:
        return _NOTHING
    said = form.format(factor * found["value"])
    if not interval or found["interval"] is None:
        return said
    low, high = (form.format(factor * bound) for bound in found["interval"])
    return f"{said} ({low} to {high})"


def markdown(report: Row) -> str:
    """A table per model, sampler and number of steps, and below it why presets were refused."""
    parts = []
    for (model, sampler, steps, target), rows in groups(report).items():
        parts.append(f"## {model}, {sampler}, {steps} steps" + (f", {target}" if target != TARGET else ""))
        parts.append(group_table("preset", rows))
        refused = [f"- {row['entry']}: {row['refused']}" for row in rows if "refused" in row]
        if refused:
            parts.append("Refused:\n\n" + "\n".join(refused))
    return "\n\n".join(parts)


def interaction(report: Row) -> str:
    """The table of int8 with caching: each alone, both, and what the two alone promise; empty where not measured."""
    lines = []
    for found in report.get("interaction", []):
        title = f"{found['model']}, {found['steps']} steps"
        for name, row in found["rows"].items():
            lines.append([title, f"{found['scheme']} and {found['entry']}" if name == "both" else name, *_four(row)])
        promised = found["expected"]
        row = {key: {"value": promised[key], "interval": None} for key in ("latent_psnr_db", "change_points")}
        lines.append([title, "both, as promised by each alone", *_four({**promised, **row})])
    heads = [
        "model",
        "passes",
        "faster",
        "faster, prompt to picture",
        "latent PSNR, dB (95 %)",
        "change, points (95 %)",
    ]
    return table(heads, lines) if lines else ""


def _four(row: Row) -> list[str]:
    return [
        _plain(row, "ratio", "{:.2f}x"),
        _plain(row, "whole_ratio", "{:.2f}x"),
        _value(row, "latent_psnr_db", "{:.1f}"),
        _value(row, "change_points", "{:+.1f}"),
    ]


def spans(report: Row) -> str:
    """The table of spans: what batching gains, what it needs, and what steps without an encoder of their own cost."""
    lines = []
    for found in report.get("spans", []):
        for row in found["rows"]:
            batched, alone = row["batched"], row["in turn"]
            few = [one for name, rows in groups(report).items() if name[:3] == _of(found) for one in rows]
            lines.append(
                [
                    f"{found['model']}, {found['steps']} steps, {row['length']}",
                    _plain(batched, "ratio", "{:.2f}x"),
                    _plain(alone, "ratio", "{:.2f}x"),
                    f"{batched['peak_mib']:.0f}",
                    f"{alone['peak_mib']:.0f}",
                    _value(row, "latent_psnr_db", "{:.1f}"),
                    _equal({"entry": "", **batched}, few),
                    _value(row, "attributes", "{:.1f}", factor=100.0),
                ]
            )
    heads = [
        "calls without an encoder after each full one",
        "faster, as one batch",
        "faster, in turn",
        "peak MiB, as one batch",
        "peak MiB, in turn",
        "latent PSNR, dB (95 %)",
        "fewer steps at equal latency, dB",
        "attributes right, % (95 %)",
    ]
    return table(heads, lines) if lines else ""


def _of(found: Row) -> tuple[str, str, int]:
    return found["model"], found["sampler"], found["steps"]


def short(report: Row) -> str:
    """The tables of README.md: the models' own samplers at 50 steps."""
    parts = [group_table(title, rows, short=True) for title, rows in shown(report)]
    return "\n\n".join([*parts, evidence(report)])


def evidence(report: Row) -> str:
    """How, where and when the numbers were measured."""
    rows = report["entries"]
    dates = sorted({row["date"] for row in rows} | {row["timed"] for row in rows if "timed" in row}) or [report["date"]]
    count = " or ".join(map(str, sorted({row["samples"] for row in rows})))
    machine = ", ".join(sorted({row.get("processor", report["environment"]["processor"]) for row in rows}))
    targets = ", ".join(sorted({row.get("target", report["target"]) for row in rows}))
    when = " to ".join(dict.fromkeys([dates[0], dates[-1]]))
    return (
        f"Measured on {machine}, {when}, {targets}. Times are those of the denoising loop: one picture, one thread, "
        f"medians of interleaved runs. Quality is that of {count} held-out prompts, against the full run from the same "
        "noise; PSNR is the mean over samples. Fewer steps at equal latency: what the same sampler reaches in as many "
        f"milliseconds with fewer steps, interpolated between the two nearest.{_computed(rows)}"
    )


def _computed(rows: Sequence[Row]) -> str:
    """What PyTorch computed in place of the engines, and how far these depart from it."""
    found = [row for row in rows if "computed" in row and "departure" in row]
    if not found:
        return ""
    where = " or ".join(sorted({row["computed"] for row in found}))
    most = max(row["departure"] for row in found)
    return (
        f" The quality of {len(found)} of {len(rows)} entries was computed by {where}, with the plan of the engine, "
        f"whose own latents of the first 8 prompts depart from those by at most {most:.0e} of their norm."
    )


def document(report: Row) -> str:
    """The whole of results/caching.md."""
    both = interaction(report)
    more = f"\n\n## With int8\n\n{both}" if both else ""
    parallel = spans(report)
    if parallel:
        more += (
            f"\n\n## Steps in parallel\n\nDecoders of following steps as one batch, from one encoder run.\n\n{parallel}"
        )
    legend = (
        "Plans: a letter a network call: F full, f full without guidance, c cached (1, 2, ... where there are several "
        "cached paths), s at a smaller size. Pooled: the PSNR of the mean squared error of all samples."
    )
    return f"# Caching against fewer steps\n\n{evidence(report)} {legend}\n\n{markdown(report)}{more}\n"


def with_tables(text: str, report: Row | None = None) -> str:
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
