"""`compress verify`: an engine is what its manifest says, and computes what it computed when it was built."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from compress.terminal import Terminal


def arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options."""
    parser.add_argument("engine", metavar="ENGINE", type=Path, help="an engine folder")
    parser.add_argument("--target", metavar="NAME", help="check this target only; all that run here by default")
    parser.add_argument("--threads", type=int, metavar="N", help="of the runtime")
    parser.add_argument("--trusted", action="store_true", help="run machine code of the engine: you know who built it")


def execute(arguments: argparse.Namespace, terminal: Terminal) -> dict[str, Any]:
    """Check every hash, then the golden latents on every target that runs here."""
    from export.backends import available
    from export.engine import Engine
    from export.errors import EngineError
    from export.manifest import read_manifest

    manifest = read_manifest(arguments.engine)
    lines = [f"{arguments.engine}: {len(manifest.files)} files are as they were written"]
    names = [arguments.target] if arguments.target is not None else list(manifest.targets)
    found: dict[str, Any] = {}
    for name in names:
        if arguments.target is None and not available(manifest.targets[name].backend):
            found[name] = {"here": False}
            lines.append(f"{name}: its runtime is not installed here")
            continue
        checked = Engine.open(
            arguments.engine, target=name, threads=arguments.threads, trusted=arguments.trusted
        ).verify()
        found[name] = {"here": True, **checked}
        if "relative_error" in checked:
            lines.append(
                f"{name}: golden latents agree, relative error {checked['relative_error']:.1e} "
                f"(allowed {checked['tolerance']:.1e})"
            )
        else:
            lines.append(f"{name}: opens; no golden latents were recorded for it")
    if not any(row["here"] for row in found.values()):
        raise EngineError(f"{arguments.engine}: none of its runtimes is installed here, so nothing could be computed")
    terminal.say("\n".join(lines))
    return {"engine_hash": manifest.engine_hash, "files": len(manifest.files), "targets": found}
