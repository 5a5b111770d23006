"""Writing a folder through to the disk, before anything relies on it being there."""

from __future__ import annotations

import os
from pathlib import Path


def flush(folder: Path) -> None:
    """Write a folder and all below it through to the disk."""
    for path in folder.rglob("*"):
        if path.is_file():
            with path.open("rb") as file:
                os.fsync(file.fileno())
        elif path.is_dir():
            flush_folder(path)
    flush_folder(folder)


def flush_folder(folder: Path) -> None:
    """Write the entries of one folder through to the disk."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
