"""`compress bench`: an engine against the original diffusers pipeline, timed in turns."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from compress.errors import RecipeError, RefusedError
from compress.terminal import Terminal

ORIGINAL = "diffusers float32"


def arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options."""
    parser.add_argument("engine", metavar="ENGINE", type=Path, help="an engine folder")
    parser.add_argument("--model", type=Path, metavar="FOLDER", help="the original; that of the recipe by default")
    parser.add_argument("--target", metavar="NAME", help="time this target only; all that run here by default")
    parser.add_argument("--threads", type=int, nargs="+", default=[1], metavar="N", help="thread counts (default: 1)")
    parser.add_argument("--trusted", action="store_true", help="run machine code of the engine: you know who built it")
    parser.add_argument("--rounds", type=int, default=10, metavar="N", help="timed runs of each (default: %(default)s)")
    parser.add_argument("--prompt", metavar="TEXT", help="what to draw, or a class")


def execute(arguments: argparse.Namespace, terminal: Terminal) -> dict[str, Any]:
    """Print the median time from prompt to picture, batch 1, of the original and of every target."""
    from rich.table import Table

    if not 1 <= arguments.rounds <= 100_000:
        raise RecipeError(f"--rounds must be from 1 to 100000, not {arguments.rounds}")
    if not all(1 <= count <= 4096 for count in arguments.threads):
        raise RecipeError(f"--threads must be from 1 to 4096, not {' '.join(map(str, arguments.threads))}")

    from export.backends import available
    from export.manifest import read_manifest

    manifest = read_manifest(arguments.engine)
    names = [name for name, row in manifest.targets.items() if available(row.backend)]
    if arguments.target is not None:
        names = [arguments.target]
    model = _original(arguments)
    rows = [row for count in arguments.threads for row in _race(arguments, terminal, names, model, count)]
    terminal.close()
    table = Table("threads", "what", "median ms", "quartiles", "times as fast", box=None)
    for row in rows:
        low, high = row["quartiles_ms"]
        table.add_row(
            str(row["threads"]),
            row["name"],
            f"{row['median_ms']:.1f}",
            f"{low:.1f} to {high:.1f}",
            f"{row['ratio']:.2f}",
        )
    terminal.say(table)
    return {"engine_hash": manifest.engine_hash, "model": str(model), "rounds": arguments.rounds, "rows": rows}


def _race(
    arguments: argparse.Namespace, terminal: Terminal, names: list[str], model: Path, threads: int
) -> list[dict[str, Any]]:
    """Time the original and every target in turns."""
    from compress.measure.latency import Contestant, interleave, torch_threads
    from compress.measure.original import PipelineCall, open_pipeline
    from export.engine import Engine
    from export.target import device_of

    engines = {
        name: Engine.open(arguments.engine, target=name, threads=threads, trusted=arguments.trusted) for name in names
    }
    first = next(iter(engines.values()))
    height, width = (first.manifest.shapes[side][1] for side in ("height", "width"))
    golden = first.manifest.golden
    prompt = arguments.prompt if arguments.prompt is not None else golden.prompts[0] if golden is not None else ""
    call = PipelineCall.of(first.plan, first.manifest.conditioning, height, width)
    pipeline = open_pipeline(model, call, device_of(engines))
    contestants = [Contestant(ORIGINAL, lambda: pipeline.generate(prompt))]
    for name, engine in engines.items():
        contestants.append(
            Contestant(name, lambda engine=engine: engine.generate([prompt], [0], height, width))  # type: ignore[misc]
        )
    with torch_threads(threads):
        timings = interleave(
            contestants, arguments.rounds, progress=terminal.progress, what=f"{threads} thread{'s' * (threads > 1)}"
        )
    return [
        {
            "threads": threads,
            "name": name,
            "median_ms": timing.median,
            "quartiles_ms": list(timing.quartiles),
            "ratio": timings[ORIGINAL].median / timing.median,
        }
        for name, timing in timings.items()
    ]


def _original(arguments: argparse.Namespace) -> Path:
    """Find the folder of the original model."""
    if arguments.model is not None:
        model = Path(arguments.model)
    else:
        from compress.recipe import yaml_lines

        recipe = arguments.engine / "recipe.yaml"
        said = yaml_lines.read(recipe)[0] if recipe.is_file() else None
        model = Path(str(said.get("model"))) if isinstance(said, dict) else Path()
    if not (model / "model_index.json").is_file():
        raise RefusedError(f"{model} is not the folder of a diffusers model; give the original as --model FOLDER")
    return model
