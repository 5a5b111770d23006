"""Writes what the newest measurement on a GPU says as Markdown: `python -m recipes.benchmarks.gpu.report`."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent.parent / "results"
TABLE = RESULTS / "gpu.md"

Row = Mapping[str, Any]
_TITLES = {
    "steps": "The fused denoising step",
    "heads": "Attention",
    "rows": "Norms, activations, residuals, rounding",
    "products": "Products",
    "unet": "SDXL's UNet, random weights, 20 calls, guided, 1024 x 1024",
    "mmdit": "The MMDiT of Stable Diffusion 3 medium, random weights, 20 calls, guided, 1024 x 1024",
}


def newest() -> Path:
    """The latest dated results.

    Raises:
        FileNotFoundError: there are none.
    """
    dated = sorted(RESULTS.glob("gpu-????-??-??.json"))
    if not dated:
        raise FileNotFoundError(f"no results of a GPU in {RESULTS}")
    return dated[-1]


def document(result: Row) -> str:
    """All sections as tables."""
    sections: Mapping[str, Row] = result["sections"]
    versions = ", ".join(f"{name} {version}" for name, version in result["versions"].items())
    lines = [
        "# Kernels on a GPU",
        "",
        f"Written by `python -m recipes.benchmarks.gpu.report`. Everything here `ran ({result['device']}, "
        f"{result['created'][:10]})` with {versions}. Times are medians in microseconds of single calls as CUDA graphs "
        "on cold caches, if nothing else is said; the floor is what the measured ceilings allow (bf16 in attention; "
        "of int8 that of `_int_mm`, which ours can pass); "
        "ratio is the time of the fastest peer over that of the fastest of ours.",
        "",
        *_ceilings(sections["ceilings"]["rows"]),
        "",
        _correct(sections["correctness"]["rows"]),
    ]
    for name, title in _TITLES.items():
        if name in sections:
            state = sections[name]["state"]
            lines += ["", f"## {title}", "", *([] if state == "complete" else [f"The section was {state}.", ""])]
            lines += _runs(sections[name]["rows"]) if name in ("unet", "mmdit") else _contests(sections[name]["rows"])
    lines += ["", "## Promises that were not kept", "", *_missed(sections)]
    return "\n".join(lines) + "\n"


def _ceilings(rows: Iterable[Row]) -> list[str]:
    found = [f"{row['ceiling']} {row['value']:.0f} {row['unit']}" for row in rows if "value" in row]
    return [f"Ceilings that were reached: {', '.join(found)}."]


def _correct(rows: Sequence[Row]) -> str:
    passed = sum(row["passed"] for row in rows)
    failed = "; ".join(f"{row['check']}: {row.get('reason', row.get('error'))}" for row in rows if not row["passed"])
    return f"{passed} of {len(rows)} comparisons with float64 hold{': not ' + failed if failed else ''}."


def _contests(rows: Iterable[Row]) -> list[str]:
    lines = ["| operation | shape | ours | error | fastest peer | ratio | floor |", "|---" * 7 + "|"]
    for row in rows:
        times: Row = row["ms"]
        own = {name: ms for name, ms in times.items() if name.startswith("ours")}
        said = ", ".join(
            f"{name.removeprefix('ours').lstrip(', ') or 'ours'} {1e3 * ms:.1f}" for name, ms in own.items()
        )
        errors = row.get("error", {})
        wrong = ", ".join(f"{errors[name]:.1e}" for name in own if name in errors)
        best = row.get("best_peer")
        peer = "" if best is None else f"{best} {1e3 * times[best]:.1f}"
        if "copy_ms" in row:
            peer += f"; a copy of as many bytes {1e3 * row['copy_ms']:.1f}"
        if "launches" in row:
            launches, alone = row["launches"], row["ms_with_launches"]
            peer += f"; launched one by one {1e3 * alone['eager']:.0f} against {1e3 * alone['ours']:.0f}"
            said += f"; {launches['ours']} launch for {launches['eager']}"
        ratio = f"{row['ratio']:.2f}" if "ratio" in row else ""
        floor = f"{1e3 * row['floor_ms']:.1f}" if row.get("floor_ms") else ""
        lines.append(
            f"| {row['operation']} | {row['model']}, {row['shape']} | {said} | {wrong} | {peer} | {ratio} | {floor} |"
        )
    return lines


def _runs(rows: Sequence[Row]) -> list[str]:
    lines = ["| way | ms | launches | difference from eager |", "|---" * 4 + "|"]
    for row in rows:
        if row["way"] != "verdict":
            ms = f"{row['ms']:.0f}" if "ms" in row else row.get("reason", "")
            lines.append(f"| {row['way']} | {ms} | {row.get('launches', '')} | {row.get('error', 0.0):.3f} |")
    return lines


def _missed(sections: Mapping[str, Row]) -> Iterator[str]:
    for section in sections.values():
        for row in section["rows"]:
            bars = row.get("bars", {})
            judged = bars.items() if isinstance(bars, Mapping) else ((bar.get("bar", ""), bar) for bar in bars)
            for name, bar in [("ours", row), *judged]:
                if bar.get("passed") is False and "bar" in bar:
                    where = f"{row.get('operation', row.get('network'))}, {row.get('model', '')} {row.get('shape', '')}"
                    yield f"- {where.strip()}, {name}: {bar['bar']} was promised; {bar['reason']}."


def main() -> None:
    """Write the tables of the newest results."""
    TABLE.write_text(document(json.loads(newest().read_text(encoding="utf-8"))), encoding="utf-8")
    print(f"wrote {TABLE}")


if __name__ == "__main__":
    main()
