"""`compress inspect`: what an engine or a model is made of."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from compress.terminal import Terminal


def arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options."""
    parser.add_argument("folder", metavar="FOLDER", type=Path, help="an engine folder or a diffusers model folder")


def execute(arguments: argparse.Namespace, terminal: Terminal) -> dict[str, Any]:
    """Print parts, parameters, multiply-accumulates and cuts of a model; targets, files and loop of an engine."""
    from compress import inspect

    found = inspect.take_stock(arguments.folder)
    (_show_engine if found["kind"] == "engine" else _show_model)(found, arguments.folder, terminal)
    return found


def _show_model(found: dict[str, Any], folder: Path, terminal: Terminal) -> None:
    from rich.table import Table

    latent = found["latent"]
    terminal.say(
        f"{folder}: a model of the family {found['family']}, {latent['channels']} latent channels, "
        f"{latent['downscale']} pixels per latent pixel, {found['scheduler']}"
    )
    parts = Table("part", "class", "parameters", "MiB", "MACs", title="parts", title_justify="left", box=None)
    for name, part in found["parts"].items():
        parts.add_row(
            name, part["class"], f"{part['parameters']:,}", f"{part['mib']:.2f}", f"{part['macs'] / 1e6:,.1f} M"
        )
    terminal.say(parts)
    side = found["latent_side"] * latent["downscale"]
    terminal.say(f"MACs: one picture of {side}x{side} pixels; one network call of the denoiser")
    cuts = Table(
        "cut", "at", "MACs", "parameters", title="cuts: share of the shallow path", title_justify="left", box=None
    )
    for cut in found["cuts"]:
        cuts.add_row(str(cut["index"]), cut["module"], f"{cut['macs_share']:.1%}", f"{cut['parameter_share']:.1%}")
    terminal.say(cuts)


def _span(shapes: list[list[int]]) -> str:
    """The least and the greatest shape of an input, e.g. `1..16x4x16x16`."""
    least, _, greatest = shapes
    return "x".join(str(low) if low == high else f"{low}..{high}" for low, high in zip(least, greatest, strict=True))


def _show_engine(found: dict[str, Any], folder: Path, terminal: Terminal) -> None:
    from rich.table import Table

    terminal.say(f"{folder}: an engine of the family {found['family']}, {found['mib']:.2f} MiB, {found['engine_hash']}")
    targets = Table("target", "backend", "evidence", title="targets", title_justify="left", box=None)
    for name, target in found["targets"].items():
        targets.add_row(name, target["backend"], target["evidence"])
    terminal.say(targets)
    for name, target in found["targets"].items():
        build = target["build"]
        if "runtime" in build:
            terminal.say(f"{name}: a page that runs on {build['runtime']} ({build['licence']}), latency not measured")
        elif build:
            devices = ", ".join(build["architectures"]) or "the GPU it was built on"
            terminal.say(f"{name}: built by {build['builder']} for {devices}, latency not measured")
            for function, sizes in build["profiles"].items():
                shown = "; ".join(f"{tensor} {_span(shapes)}" for tensor, shapes in sizes.items())
                terminal.say(f"  {function}: {shown}")
    plan = found["step_plan"]
    terminal.say(f"loop: {plan['network_calls']} network calls, {plan['strip']}")
    for path, segments in plan["paths"].items():
        terminal.say(f"  {path}: {' -> '.join(segments)} ({plan['calls'][path]} calls)")
    files = Table("file", "MiB", "SHA-256", title="files", title_justify="left", box=None)
    for name, file in found["files"].items():
        files.add_row(name, f"{file['bytes'] / 2**20:.3f}", file["sha256"][:16])
    terminal.say(files)
