"""The manifest of an engine folder: what is in it, what it needs, and the hashes that prove it is whole."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Collection, Iterable, Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path, PurePosixPath
from typing import Any

from export.errors import EngineError

FILE = "manifest.json"
SCHEMA_VERSION = 1
STEP_PLAN = "step_plan.json"


@dataclass(frozen=True)
class FileEntry:
    """A file of the engine. `run`: it is needed to generate, so part of the engine's hash (a report is not)."""

    sha256: str
    bytes: int
    run: bool


@dataclass(frozen=True)
class TargetEntry:
    """How the engine runs on one target.

    Attributes:
        backend, dialect: as in the target table.
        graphs: function (segment or part) -> path of its graph in the folder.
        options: function -> options of the backend for it.
        evidence: how it is known to work, e.g. `ran (cpu model, date)`.
        measured: metric -> number, on the machine the evidence names.
        formats: part -> scheme -> how it runs here: `native`, `storage only` or `simulated`.
        build: where `graphs` are engines that were built from graphs: with what, for what, from what, see
            `compress.engine.build_tensorrt`; where a page runs them: its runtime, see `export.to_web`.
    """

    backend: str
    dialect: str
    graphs: Mapping[str, str]
    options: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    evidence: str = "built"
    measured: Mapping[str, float] = field(default_factory=dict)
    formats: Mapping[str, Mapping[str, str]] = field(default_factory=dict)
    build: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Golden:
    """Final latents of a few seeds, kept to tell whether the engine still computes what it did.

    Attributes:
        prompts, seeds, height, width: of the run.
        tolerance: allowed relative error (root mean square of the difference over that of the values).
        files: target -> path of a float32 `.npy`.
    """

    prompts: tuple[Any, ...]
    seeds: tuple[int, ...]
    height: int
    width: int
    tolerance: float
    files: Mapping[str, str]


@dataclass(frozen=True)
class Manifest:
    """What `manifest.json` says.

    Attributes:
        family: of the denoiser.
        latent: the fields of `export.runtime.LatentSpec`.
        conditioning: see `export.conditioning`.
        tokenizers: name -> folder with its `tokenizer.json`.
        shapes: `batch`, `height`, `width` (pixels), `prompt_tokens` -> [min, best, max].
        targets: name -> how it runs there.
        files: path -> hash; every file but the manifest itself.
        engine_hash: SHA-256 over the files needed to run and all of the above that says how.
        golden: None until recorded.
        provenance: model, recipe, versions, seeds: for people and reports.
    """

    family: str
    latent: Mapping[str, Any]
    conditioning: Mapping[str, Any]
    tokenizers: Mapping[str, str]
    shapes: Mapping[str, tuple[int, int, int]]
    targets: Mapping[str, TargetEntry]
    files: Mapping[str, FileEntry] = field(default_factory=dict)
    engine_hash: str = ""
    golden: Golden | None = None
    provenance: Mapping[str, Any] = field(default_factory=dict)

    def to_json(self) -> str:
        """Serialise, keys sorted but for the targets, which stay in the order they were asked for."""
        content = json.loads(json.dumps({"schema_version": SCHEMA_VERSION, **asdict(self)}, sort_keys=True))
        content["targets"] = {name: content["targets"][name] for name in self.targets}
        return json.dumps(content, indent=1) + "\n"

    @classmethod
    def from_json(cls, text: str) -> Manifest:
        """Read and check a manifest.

        Raises:
            EngineError: not JSON, another schema version, a missing or unknown key, a wrong type, an unsafe path.
        """
        try:
            raw = json.loads(text)
            version = raw.pop("schema_version")
            if version != SCHEMA_VERSION:
                raise EngineError(f"{FILE} has schema version {version!r}; this reads {SCHEMA_VERSION}")
            golden = raw.pop("golden")
            manifest = cls(
                targets={name: TargetEntry(**row) for name, row in raw.pop("targets").items()},
                files={path: FileEntry(**row) for path, row in raw.pop("files").items()},
                shapes={name: _three(name, sizes) for name, sizes in raw.pop("shapes").items()},
                golden=None if golden is None else _golden(golden),
                **raw,
            )
            manifest._check()
        except EngineError:
            raise
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise EngineError(f"{FILE} cannot be read: {type(error).__name__}: {error}") from error
        return manifest

    def paths(self) -> list[str]:
        """Every path the manifest names."""
        graphs = [path for target in self.targets.values() for path in target.graphs.values()]
        golden = list(self.golden.files.values()) if self.golden else []
        return [*self.files, *graphs, *golden, *self.tokenizers.values()]

    def sealed(self, folder: Path, run: Collection[str]) -> Manifest:
        """Hash every file of the folder; `run` names those needed to generate."""
        paths = sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())
        files = {
            path: FileEntry(sha256_of(folder / path), (folder / path).stat().st_size, path in run)
            for path in paths
            if path != FILE
        }
        manifest = replace(self, files=files)
        return replace(manifest, engine_hash=manifest.digest())

    def digest(self) -> str:
        """The engine's hash, computed anew."""
        content = {
            "schema_version": SCHEMA_VERSION,
            "files": {path: entry.sha256 for path, entry in self.files.items() if entry.run},
            "family": self.family,
            "latent": self.latent,
            "conditioning": self.conditioning,
            "tokenizers": self.tokenizers,
            "shapes": self.shapes,
            "targets": {
                name: [row.backend, row.dialect, row.graphs, row.options] for name, row in self.targets.items()
            },
        }
        return hashlib.sha256(json.dumps(content, sort_keys=True, separators=(",", ":")).encode()).hexdigest()

    def write(self, folder: Path) -> None:
        """Put `manifest.json` into the folder in one step."""
        temporary = folder / f"{FILE}.tmp"
        with temporary.open("w", encoding="utf-8") as file:
            file.write(self.to_json())
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(folder / FILE)

    def _check(self) -> None:
        rows = self.targets.items()
        texts: Iterable[tuple[str, Any]] = [
            ("family", self.family),
            ("engine_hash", self.engine_hash),
            *((f"targets.{name}.{key}", getattr(row, key)) for name, row in rows for key in _TEXTS),
        ]
        mappings: Iterable[tuple[str, Any]] = [
            *((key, getattr(self, key)) for key in ("latent", "conditioning", "tokenizers", "provenance")),
            *((f"targets.{name}.{key}", getattr(row, key)) for name, row in rows for key in _MAPS),
        ]
        for key, value in texts:
            if not isinstance(value, str):
                raise EngineError(f"{FILE}: {key} is not text")
        for key, value in mappings:
            if not isinstance(value, dict):
                raise EngineError(f"{FILE}: {key} is not a mapping")
        for name, row in rows:
            if not all(type(value) in (int, float) for value in row.measured.values()):
                raise EngineError(f"{FILE}: targets.{name}.measured holds what is no number")
        for key in ("batch", "height", "width", "prompt_tokens"):
            if key not in self.shapes:
                raise EngineError(f"{FILE}: shapes lacks {key!r}")
        if not self.targets:
            raise EngineError(f"{FILE} names no target")
        for path in self.paths():
            _check_path(path)
        named = {path for target in self.targets.values() for path in target.graphs.values()} | {STEP_PLAN}
        for path in sorted(named):
            if path not in self.files:
                raise EngineError(f"{FILE} names {path}, but does not list it among the files")
        for path, entry in self.files.items():
            if not (isinstance(entry.sha256, str) and isinstance(entry.bytes, int) and isinstance(entry.run, bool)):
                raise EngineError(f"{FILE}: the entry of {path} is malformed")


_TEXTS = ("backend", "dialect", "evidence")
_MAPS = ("graphs", "options", "measured", "formats", "build")


def read_manifest(folder: Path) -> Manifest:
    """Read the manifest of a folder and verify every file it lists.

    Raises:
        EngineError: there is none, it is malformed, a file is missing, changed or outside the folder.
    """
    path = folder / FILE
    if not folder.is_dir():
        raise EngineError(f"there is no engine at {folder}: the folder does not exist")
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError as error:
        raise EngineError(f"{folder} is not an engine: it has no {FILE}") from error
    except (OSError, UnicodeDecodeError) as error:
        raise EngineError(f"{path} cannot be read: {type(error).__name__}") from error
    manifest = Manifest.from_json(text)
    verify_files(folder, manifest)
    return manifest


def verify_files(folder: Path, manifest: Manifest) -> None:
    """Compare every file with the manifest.

    Raises:
        EngineError: names the first file that is missing, changed, or a link.
    """
    for name, entry in manifest.files.items():
        path = folder
        for piece in PurePosixPath(name).parts:
            path = path / piece
            if path.is_symlink():
                raise EngineError(f"{name} of the engine is a link; an engine holds its files itself")
        if not path.is_file():
            raise EngineError(f"the engine is incomplete: {name} is missing")
        if path.stat().st_size != entry.bytes or sha256_of(path) != entry.sha256:
            raise EngineError(f"the engine is damaged: {name} is not the file that was written")
    if manifest.digest() != manifest.engine_hash:
        raise EngineError(f"the engine is damaged: {FILE} was changed after the engine was built")


def sha256_of(path: Path) -> str:
    """The SHA-256 of a file, in hex."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _check_path(path: Any) -> None:
    pure = PurePosixPath(path) if isinstance(path, str) else None
    if pure is None or not pure.parts or pure.is_absolute() or ".." in pure.parts or "\\" in path or "\0" in path:
        raise EngineError(f"{FILE} names the path {path!r}, which leads out of the engine")
    if path != pure.as_posix() or ":" in pure.parts[0]:
        raise EngineError(f"{FILE} names the path {path!r}, which is not in its plain form")


def _three(name: str, sizes: Any) -> tuple[int, int, int]:
    if not (isinstance(sizes, list) and len(sizes) == 3 and all(type(size) is int and size > 0 for size in sizes)):
        raise EngineError(f"{FILE}: shapes.{name} must be three positive integers, not {sizes!r}")
    return sizes[0], sizes[1], sizes[2]


def _golden(raw: dict[str, Any]) -> Golden:
    golden = Golden(**{**raw, "prompts": tuple(raw["prompts"]), "seeds": tuple(raw["seeds"])})
    numbers = (*golden.seeds, golden.height, golden.width)
    if not all(type(number) is int and number >= 0 for number in numbers) or not isinstance(golden.files, dict):
        raise EngineError(f"{FILE}: golden is malformed")
    if len(golden.prompts) != len(golden.seeds) or not 0.0 <= float(golden.tolerance) < 1.0:
        raise EngineError(f"{FILE}: golden is malformed")
    return golden
