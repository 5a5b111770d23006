"""`compress package`: an engine and the little that runs it, as one archive; also for Triton Inference Server."""

from __future__ import annotations

import argparse
import dataclasses
from pathlib import Path
from typing import Any

from compress.errors import RecipeError
from compress.terminal import Terminal

SUFFIX = ".tar.gz"


def arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options."""
    parser.add_argument("engine", metavar="ENGINE", type=Path, help="an engine folder")
    parser.add_argument("-o", "--out", type=Path, metavar="FILE", help=f"the archive (default: ENGINE{SUFFIX})")
    parser.add_argument("--target", metavar="NAME", help="take this target alone along; all by default")
    parser.add_argument(
        "--for",
        dest="server",
        choices=("triton-server",),
        help="a model repository of NVIDIA's Triton Inference Server, in place of our own server",
    )
    parser.add_argument(
        "--backends", action="store_true", help="let back ends of that server (onnxruntime, tensorrt) run the graphs"
    )
    parser.add_argument("--name", metavar="NAME", help="of the model there (default: pictures)")


def execute(arguments: argparse.Namespace, terminal: Terminal) -> dict[str, Any]:
    """Write the archive; equal engines give equal archives."""
    from compress.deploy.package import package
    from compress.deploy.triton import package_for_triton

    out = arguments.out or arguments.engine.resolve().with_name(arguments.engine.resolve().name + SUFFIX)
    if not out.name.endswith(SUFFIX) or out.name == SUFFIX:
        raise RecipeError(f"-o {out}: archives are written as NAME{SUFFIX}")
    if (arguments.name is not None or arguments.backends) and arguments.server is None:
        raise RecipeError("--name and --backends are about a model of Triton: say --for triton-server")
    if arguments.server is None:
        made = package(arguments.engine, out, arguments.target)
        use = "run.py, or python -m serve engine"
    else:
        name = "pictures" if arguments.name is None else arguments.name
        made = package_for_triton(arguments.engine, out, arguments.target, name, arguments.backends)
        use = "tritonserver --model-repository models"
    terminal.say(
        f"{out}: {made.files} files, {made.bytes / 2**20:.1f} MiB, for {', '.join(made.targets)}\n"
        f"sha256 {made.sha256}\n"
        f"to use it: unpack, pip install -r requirements.txt, then {use}"
    )
    return {"file": str(out), **dataclasses.asdict(made)}
