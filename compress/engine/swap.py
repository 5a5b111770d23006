"""Puts a finished folder in its place in one step, so that no half-written folder is ever seen."""

from __future__ import annotations

import ctypes
import os
import secrets
import shutil
from pathlib import Path

from compress.flush import flush, flush_folder

_AT_FDCWD = -100
_RENAME_EXCHANGE = 2


def temporary_beside(out: Path) -> Path:
    """Make an empty folder next to `out`, on the same file system; leftovers of killed runs are removed first."""
    out.parent.mkdir(parents=True, exist_ok=True)
    for leftover in out.parent.glob(f".{out.name}.*.tmp"):
        owner = leftover.name.split(".")[-3]
        if not (owner.isdecimal() and _alive(int(owner))):
            shutil.rmtree(leftover, ignore_errors=True)
    folder = _free_name(out)
    folder.mkdir()
    return folder


def swap_in(folder: Path, out: Path) -> None:
    """Move a finished folder to `out`; what was there before is deleted after.

    Everything is on the disk before the move. Where `out` exists, the two are exchanged in one step (Linux), or else
    the old one is moved aside first.

    Raises:
        OSError: `out` is a file, or the file system refuses.
    """
    flush(folder)
    if not out.exists():
        folder.rename(out)
    elif _exchange(folder, out):
        shutil.rmtree(folder)
    else:
        aside = _free_name(out)
        out.rename(aside)
        folder.rename(out)
        shutil.rmtree(aside)
    flush_folder(out.parent)


def _free_name(out: Path) -> Path:
    """Next to `out`; the next `temporary_beside` sweeps it away."""
    return out.parent / f".{out.name}.{os.getpid()}.{secrets.token_hex(4)}.tmp"


def _alive(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


def _exchange(first: Path, second: Path) -> bool:
    """Exchange two folders atomically; False where the system cannot."""
    library = ctypes.CDLL(None, use_errno=True)
    if not hasattr(library, "renameat2"):
        return False
    done = library.renameat2(_AT_FDCWD, os.fsencode(first), _AT_FDCWD, os.fsencode(second), _RENAME_EXCHANGE)
    return bool(done == 0)
