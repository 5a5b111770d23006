"""A content-addressed store on disk: a result is kept under the hash of everything it depends on."""

from __future__ import annotations

import contextlib
import fcntl
import functools
import hashlib
import json
import os
import secrets
import shutil
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any, TypeVar

from compress.flush import flush, flush_folder

SCHEMA_VERSION = 1
_ENTRY = "entry.json"
_PACKAGES = ("torch", "diffusers", "transformers", "onnx", "onnxscript", "numpy")

T = TypeVar("T")


def cache_folder() -> Path:
    """Return where results are kept: $COMPRESS_CACHE, else $XDG_CACHE_HOME/compress, else ~/.cache/compress."""
    own = os.environ.get("COMPRESS_CACHE")
    if own:
        return Path(own).expanduser()
    shared = os.environ.get("XDG_CACHE_HOME")
    return (Path(shared) if shared else Path.home() / ".cache") / "compress"


@functools.cache
def versions() -> Mapping[str, str]:
    """Return what a result depends on besides its inputs: package versions, and a hash of our own sources."""
    found = {}
    for name in _PACKAGES:
        with contextlib.suppress(metadata.PackageNotFoundError):
            found[name] = metadata.version(name)
    digest = hashlib.sha256()
    root = Path(__file__).parent.parent
    for package in ("compress", "export"):
        for source in sorted((root / package).rglob("*.py")):
            digest.update(f"{source.relative_to(root).as_posix()}\0".encode() + source.read_bytes() + b"\0")
    return {**found, "sources": digest.hexdigest()}


def key_of(inputs: Mapping[str, Any]) -> str:
    """Return the SHA-256 (64 hex digits) of inputs and versions as canonical JSON.

    Raises:
        TypeError, ValueError: an input is not plain finite data.
    """
    return hashlib.sha256(_canonical({"inputs": inputs, "versions": dict(versions())})).hexdigest()


def _canonical(value: Any) -> bytes:
    return json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False).encode()


@dataclass(frozen=True)
class Usage:
    """How much a store holds."""

    entries: int
    bytes: int


def _say(sentence: str) -> None:
    """Report a damaged entry on stderr."""
    print(sentence, file=sys.stderr, flush=True)


class Store:
    """Folders by key. Every entry appears whole or not at all, is verified when read, and may be deleted at any time.

    Writers put files into a temporary folder, flush them to the disk, and rename it. One lock a key (released by the
    kernel when its process dies) keeps two processes from doing the same work and `prune` from deleting what is
    being read.

    Args:
        folder: of the store; made when first written to.
        report: receives one sentence for each damaged entry that was removed.
    """

    def __init__(self, folder: str | Path | None = None, report: Callable[[str], None] = _say) -> None:
        self.folder = cache_folder() / "store" if folder is None else Path(folder)
        self.report = report

    def has(self, inputs: Mapping[str, Any]) -> bool:
        """Say whether a result is there; it is verified only when fetched."""
        return (self._entry(key_of(inputs)) / _ENTRY).is_file()

    def fetch(self, inputs: Mapping[str, Any], make: Callable[[Path], None], load: Callable[[Path], T]) -> T:
        """Return `load(entry folder)`, after `make(empty folder)` where the entry is not there or damaged.

        Args:
            inputs: plain data that the result depends on; versions are added.
            make: writes the result's files; what it raises is passed on, and leaves nothing behind.
            load: reads them; the folder must not be used after it returns.
        """
        key = key_of(inputs)
        with self._lock(key):
            self._sweep(key)
            entry = self._entry(key)
            if entry.exists():
                damage = _damage(entry, key)
                if damage is None:
                    os.utime(entry / _ENTRY)
                    return load(entry)
                self.report(f"the stored result {key[:12]} is damaged ({damage}); it is computed again")
                self._remove(entry)
            self._write(key, inputs, make)
            return load(entry)

    @contextlib.contextmanager
    def workspace(self, inputs: Mapping[str, Any]) -> Iterator[Path]:
        """A folder for work that can go on after its process was killed; deleted once the block ends without an error.

        Args:
            inputs: plain data that the work depends on; versions are added. One process at a time has the folder.
        """
        key = key_of(inputs)
        with self._lock(key):
            folder = self.folder / "work" / key
            folder.mkdir(parents=True, exist_ok=True)
            yield folder
            shutil.rmtree(folder, ignore_errors=True)

    def usage(self) -> Usage:
        """Count entries and their bytes."""
        sizes = [_bytes(entry) for entry in self._entries()]
        return Usage(len(sizes), sum(sizes))

    def prune(self, keep_bytes: int = 0) -> Usage:
        """Delete the entries used longest ago until at most `keep_bytes` are left; returns what was deleted.

        An entry in use by another process stays. Leftovers of killed processes go too, unfinished work included.
        """
        for leftover in (*(self.folder / "tmp").glob("*"), *(self.folder / "work").glob("*")):
            with self._lock(leftover.name.partition(".")[0], wait=False) as mine:
                if mine:
                    shutil.rmtree(leftover, ignore_errors=True)
        entries = sorted(self._entries(), key=_last_used)
        left = sum(_bytes(entry) for entry in entries)
        gone = freed = 0
        for entry in entries:
            if left <= keep_bytes:
                break
            with self._lock(entry.name, wait=False, keep_file=False) as mine:
                if mine and entry.exists():
                    size = _bytes(entry)
                    self._remove(entry)
                    gone, freed, left = gone + 1, freed + size, left - size
        return Usage(gone, freed)

    def _entry(self, key: str) -> Path:
        return self.folder / key[:2] / key

    def _entries(self) -> list[Path]:
        return [entry for entry in self.folder.glob("??/*") if len(entry.name) == 64]

    def _write(self, key: str, inputs: Mapping[str, Any], make: Callable[[Path], None]) -> None:
        temporary = self.folder / "tmp" / f"{key}.{secrets.token_hex(8)}"
        temporary.mkdir(parents=True)
        try:
            make(temporary)
            files = {path: _facts(temporary / path) for path in _files(temporary)}
            record = {"schema_version": SCHEMA_VERSION, "key": key, "inputs": inputs, "versions": dict(versions())}
            record["files"] = files
            (temporary / _ENTRY).write_bytes(_canonical({**record, "sha256": _digest(record)}))
            flush(temporary)
            entry = self._entry(key)
            entry.parent.mkdir(parents=True, exist_ok=True)
            temporary.rename(entry)
            flush_folder(entry.parent)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)

    def _remove(self, entry: Path) -> None:
        """Take an entry away in one step, so that a kill in the middle leaves no half entry under its key."""
        trash = self.folder / "tmp" / f"{entry.name}.{secrets.token_hex(8)}"
        trash.parent.mkdir(parents=True, exist_ok=True)
        entry.rename(trash)
        shutil.rmtree(trash, ignore_errors=True)

    def _sweep(self, key: str) -> None:
        """Delete what killed writers of this key left; the lock is held, so none is alive."""
        for leftover in (self.folder / "tmp").glob(f"{key}.*"):
            shutil.rmtree(leftover, ignore_errors=True)

    @contextlib.contextmanager
    def _lock(self, key: str, wait: bool = True, keep_file: bool = True) -> Iterator[bool]:
        """Hold the lock of a key; yields whether it was got, which only `wait=False` can fail."""
        path = self.folder / "locks" / key
        path.parent.mkdir(parents=True, exist_ok=True)
        while True:
            handle = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
            except BlockingIOError:
                os.close(handle)
                yield False
                return
            except BaseException:
                os.close(handle)
                raise
            # Its file may have been deleted by a prune between the open and the lock.
            with contextlib.suppress(FileNotFoundError):
                if os.stat(path).st_ino == os.fstat(handle).st_ino:
                    break
            os.close(handle)
        try:
            yield True
            if not keep_file:
                path.unlink(missing_ok=True)
        finally:
            os.close(handle)


def _files(folder: Path) -> list[str]:
    """List the regular files below a folder.

    Raises:
        ValueError: it holds a link or something else that is not a file.
    """
    found = []
    for path in sorted(folder.rglob("*")):
        if path.is_symlink() or not (path.is_file() or path.is_dir()):
            raise ValueError(f"{path.name} is not a regular file")
        if path.is_file():
            found.append(path.relative_to(folder).as_posix())
    return found


def _facts(path: Path) -> dict[str, Any]:
    with path.open("rb") as file:
        return {"sha256": hashlib.file_digest(file, "sha256").hexdigest(), "bytes": path.stat().st_size}


def _digest(record: Mapping[str, Any]) -> str:
    return hashlib.sha256(_canonical(record)).hexdigest()


def _damage(entry: Path, key: str) -> str | None:
    """Say what is wrong with an entry, or None."""
    try:
        record = json.loads((entry / _ENTRY).read_bytes())
        if record.pop("sha256") != _digest(record) or record["key"] != key:
            return f"{_ENTRY} is not the one that was written"
        if record["schema_version"] != SCHEMA_VERSION:
            return f"schema version {record['schema_version']}"
        expected = record["files"]
        found = [path for path in _files(entry) if path != _ENTRY]
        if sorted(expected) != found:
            return f"it holds {len(found)} files of {len(expected)}"
        changed = [path for path in found if _facts(entry / path) != expected[path]]
        return f"{changed[0]} has changed" if changed else None
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        return f"{type(error).__name__}: {error}"


def _bytes(entry: Path) -> int:
    total = 0
    for path in entry.rglob("*"):
        with contextlib.suppress(FileNotFoundError):
            total += path.lstat().st_size if not path.is_dir() else 0
    return total


def _last_used(entry: Path) -> float:
    with contextlib.suppress(FileNotFoundError):
        return (entry / _ENTRY).stat().st_mtime
    return time.time()
