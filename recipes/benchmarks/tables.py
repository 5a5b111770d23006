"""The tables of README.md, made from the newest results; the two lines between which they stand are in README.md."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results"
README = Path(__file__).parent.parent.parent / "README.md"
BEGIN, END = "<!-- measured: begin -->", "<!-- measured: end -->"
TITLES = {"quickstart": "UNet, `recipes/quickstart.yaml`", "mmdit": "MMDiT, `recipes/mmdit.yaml`"}
NETWORKS = {
    "unet": "UNet, random weights",
    "mmdit": "MMDiT, random weights",
    "reference-unet": "`recipes/reference/unet`",
    "reference-mmdit": "`recipes/reference/mmdit`",
}


def newest(name: str) -> dict[str, Any]:
    """The latest of the dated results of one measurement.

    Raises:
        FileNotFoundError: there is none.
    """
    dated = sorted(RESULTS.glob(f"{name}-????-??-??.json"))
    if not dated:
        raise FileNotFoundError(f"no results of {name} in {RESULTS}")
    found: dict[str, Any] = json.loads(dated[-1].read_text(encoding="utf-8"))
    return found


def table(heads: Sequence[str], lines: Iterable[Sequence[str]]) -> str:
    """A Markdown table."""
    rows = [heads, ["---"] * len(heads), *lines]
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def recipe_table(report: Mapping[str, Any], title: str) -> str:
    """One recipe: every contestant's time, quality and size."""
    threads = sorted({row["threads"] for row in report["latency"]})
    contestants = {(row["role"], row["name"]): row["steps"] for row in report["latency"]}
    order = ["original", "plain runtime", "fewer steps", "engine"]
    original = {row["threads"]: row["median"] for row in report["latency"] if row["role"] == "original"}
    lines = []
    for role, name in sorted(contestants, key=lambda key: order.index(key[0])):
        times = {row["threads"]: row["median"] for row in report["latency"] if row["name"] == name}
        point = next((one for one in report["baselines"] if one["name"] == name), None)
        mark = "**" if role == "engine" else ""
        said = name.split(",")[0] if role == "fewer steps" else name.removesuffix(", float32")
        lines.append(
            [
                f"{mark}{said.replace('original', 'diffusers pipeline') if role == 'fewer steps' else said}{mark}",
                str(contestants[role, name]),
                *(f"{times[n]:.0f} ({original[n] / times[n]:.1f}x)" if n in times else "" for n in threads),
                _quality(point, "image_psnr_db", "{:.1f}"),
                _quality(point, "attribute_accuracy", "{:.1f} %", 100),
                _size(report, role, name),
            ]
        )
    heads = [
        f"{title}",
        "steps",
        *(f"ms, {n} thread{'s' * (n > 1)}" for n in threads),
        "image PSNR, dB",
        "attributes right (95 %)",
        "MiB",
    ]
    return table(heads, lines)


def _quality(point: Mapping[str, Any] | None, metric: str, form: str, factor: float = 1.0) -> str:
    """A value and, for shares, its interval; empty where it was not measured."""
    if point is None or metric not in point["quality"]:
        return ""
    value = form.format(factor * point["quality"][metric])
    bounds = point["interval"].get(metric)
    if factor == 1.0 or bounds is None:
        return value
    return f"{value} ({factor * bounds[0]:.1f} to {factor * bounds[1]:.1f})"


def _size(report: Mapping[str, Any], role: str, name: str) -> str:
    sizes = {row["role"]: row for row in report["sizes"]} | {row["name"]: row for row in report["sizes"]}
    row = sizes.get("original" if role == "original" else name if role == "engine" else "")
    return "" if row is None else f"{sum(row['parts'].values()):.1f}"


def int8_table(results: Mapping[str, Any]) -> str:
    """Denoisers alone, one thread: int8 against float in the same runtime."""
    lines = []
    for name, network in results["networks"].items():
        for target, row in network["targets"].items():
            times = row["cpu_ms"]
            faster = {form: f"{times['float32'] / taken:.2f}x" for form, taken in times.items()}
            lines.append(
                [
                    f"{NETWORKS[name.partition(',')[0]]}, {'x'.join(map(str, network['latent']))} latents",
                    f"{network['parameters'] / 1e6:.1f} M",
                    target.removesuffix("-cpu"),
                    f"{times['float32']:.1f}",
                    f"{times['int8']:.1f}",
                    *(faster.get(form, "") for form in ("int8", "int4", "int8, everything", "nncf")),
                ]
            )
    heads = [
        "denoiser alone (openvino: and int8-qk), 1 thread",
        "weights",
        "runtime",
        "float ms",
        "int8 ms",
        "int8",
        "int4-w4a8",
        "int8, every layer",
        "NNCF",
    ]
    return table(heads, lines)


SHOWN = (
    ("steps", "denoise_step", "SDXL 1024", "ours", "eager"),
    ("heads", "attention", "video 49 x 480 x 720", "ours fp8", "sdpa cudnn"),
    ("heads", "attention", "Flux 1024", "ours fp8", "sdpa cudnn"),
    ("heads", "attention_two_segments", "SD3 1024", "ours", "joined"),
    ("heads", "linear_attention", "SD3 1024", "ours", "eager"),
    ("rows", "group_norm_silu fp8", "SDXL 1024", "ours", "eager"),
    ("rows", "geglu fp8", "SDXL 1024", "ours", "eager"),
    ("rows", "adaln fp8", "Flux 1024", "ours", "eager"),
    ("products", "gemm_int8", "Flux 1024", "ours", "_int_mm + dequantize"),
    ("products", "gemm_int8", "Flux 1024", "ours", "bf16"),
    ("products", "gemm_int8 of unrounded inputs, rank 32", "video 49 x 480 x 720", "ours", "bf16"),
    ("products", "gemm_w4a16", "Flux", "ours", "bf16"),
)
"""Contests on a GPU: section, operation, model (the first of its shapes), our entry, the peer."""


def gpu_table(results: Mapping[str, Any]) -> str:
    """Kernels on a GPU, the ones that lose among them; everything is in `results/gpu.md`."""
    lines = []
    for section, operation, model, own, peer in SHOWN:
        row = next(
            row
            for row in results["sections"][section]["rows"]
            if row["operation"] == operation and row["model"] == model
        )
        ours, theirs = row["ms"][own], row["ms"][peer]
        said = f"{operation}{' in fp8' if own == 'ours fp8' else ''}"
        floor = f"{1e3 * row['floor_ms']:.1f}{' in bf16' if own == 'ours fp8' else ''}"
        times = (f"{1e3 * ours:.1f}", peer, f"{1e3 * theirs:.1f}", f"{theirs / ours:.2f}x", floor)
        lines.append([said, f"{model}, {row['shape']}", *times])
    heads = [f"kernel, {results['device']}", "shape", "us", "peer", "us", "faster", "floor, us"]
    return table(heads, lines)


def markdown() -> str:
    """What stands between the two marks in README.md."""
    reports = {name: newest(name) for name in TITLES}
    tables = [recipe_table(report, TITLES[name]) for name, report in reports.items()]
    int8, gpu = newest("int8_speed"), newest("gpu")
    evidence = {reports[name]["evidence"]["original"] for name in TITLES}
    return "\n\n".join(
        [
            *tables,
            int8_table(int8),
            gpu_table(gpu),
            f"Evidence: {'; '.join(sorted(evidence))}; the last table ran ({gpu['device']}, {gpu['created'][:10]}), "
            "median times of single calls as CUDA graphs on cold caches, rounding of inputs included in attention; "
            "`torch.compile` took no part, and the floor of int8 is by `_int_mm`, which does not reach the card's. "
            "Times are medians of interleaved runs, from prompt to picture, one picture. "
            "Quality is that of 512 held-out prompts; PSNR is against the original's pictures of the same seeds. "
            "Denoisers alone: times of the processor; NNCF, too, computes every layer in int8.",
        ]
    )


def with_tables(readme: str) -> str:
    """The text with the tables between its marks replaced."""
    before, _, rest = readme.partition(BEGIN)
    _, _, after = rest.partition(END)
    return f"{before}{BEGIN}\n{markdown()}\n{END}{after}"


def main() -> None:
    """Rewrite README.md."""
    README.write_text(with_tables(README.read_text(encoding="utf-8")), encoding="utf-8")


if __name__ == "__main__":
    main()
