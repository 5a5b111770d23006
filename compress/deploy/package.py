"""Puts together what a packaged engine consists of: the engine, our runtime, and how to start it."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

from compress.deploy import archive, texts
from compress.deploy.closure import sources
from export.backends import BACKENDS, BUILT_ONLY, holds_machine_code
from export.errors import EngineError
from export.manifest import FILE, Golden, Manifest, read_manifest

RUNTIME = ("numpy", "pillow", "tokenizers")
SERVER = ("fastapi", "prometheus-client", "uvicorn")


@dataclass(frozen=True)
class Packaged:
    """An archive that was written.

    Attributes:
        sha256: of the archive.
        files: how many are in it.
        bytes: of the archive.
        engine_hash: of the engine in it; another than it was where targets were left out.
        targets: the engine's.
    """

    sha256: str
    files: int
    bytes: int
    engine_hash: str
    targets: tuple[str, ...]


def package(folder: Path, out: Path, target: str | None = None) -> Packaged:
    """Write an engine and all it needs but Python and the packages of `requirements.txt` into one archive.

    Args:
        folder: of the engine.
        out: the archive, .tar.gz.
        target: take this target alone along; None takes all that can be taken to another machine.

    Raises:
        EngineError: no engine, a damaged one, an unknown target, or one that runs where it was built alone.
        RefusedError: the archive cannot be written.
    """
    manifest = kept(read_manifest(folder), target)
    backends = {row.backend for row in manifest.targets.values()}
    code = sources(["export.engine", "serve.__main__", *(BACKENDS[name].module for name in backends)])
    packages = (*RUNTIME, *SERVER, *(BACKENDS[name].package for name in backends))
    files = {f"engine/{path}": (folder / path).read_bytes() for path in manifest.files}
    files |= {path: file.read_bytes() for path, file in code.items()}
    files |= {
        path: text.encode()
        for path, text in {
            f"engine/{FILE}": manifest.to_json(),
            "run.py": texts.RUN,
            "requirements.txt": texts.requirements(packages),
            "Dockerfile": texts.dockerfile(),
            "engine.service": texts.service(),
        }.items()
    }
    sha256 = archive.write(files, f"engine-{manifest.engine_hash[:12]}", out)
    return Packaged(sha256, len(files) + 1, out.stat().st_size, manifest.engine_hash, tuple(manifest.targets))


def kept(manifest: Manifest, target: str | None) -> Manifest:
    """The manifest of the files that are needed to run and to verify, for one target or all that can be taken along.

    Raises:
        EngineError: an unknown target, or none that runs anywhere but where it was built.
    """
    if target is not None and target not in manifest.targets:
        raise EngineError(f"the engine was not built for {target!r}, but for {', '.join(manifest.targets)}")
    targets = {
        name: row
        for name, row in manifest.targets.items()
        if target in (None, name) and row.backend not in BUILT_ONLY and not holds_machine_code(row.backend)
    }
    if not targets:
        raise EngineError("no target of this engine runs anywhere but where it was built; build it for a CPU target")
    golden = manifest.golden and replace(
        manifest.golden, files={name: path for name, path in manifest.golden.files.items() if name in targets}
    )
    others = {path for name, row in manifest.targets.items() if name not in targets for path in row.graphs.values()}
    dropped = others - {path for row in targets.values() for path in row.graphs.values()}
    wanted = set(_paths(golden))
    files = {
        path: entry for path, entry in manifest.files.items() if (entry.run and path not in dropped) or path in wanted
    }
    kept = replace(manifest, targets=targets, files=files, golden=golden)
    return replace(kept, engine_hash=kept.digest())


def _paths(golden: Golden | None) -> list[str]:
    return [] if golden is None else list(golden.files.values())
