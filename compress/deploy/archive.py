"""Writes files into one archive whose bytes depend on nothing but them: no times, no owners, a fixed order."""

from __future__ import annotations

import contextlib
import gzip
import hashlib
import io
import os
import tarfile
from collections.abc import Mapping
from pathlib import Path

from compress.errors import RefusedError

SUMS = "SHA256SUMS"


def write(files: Mapping[str, bytes], top: str, out: Path) -> str:
    """Write a .tar.gz in one step; `SHA256SUMS` in it lists every other file, for `sha256sum --check`.

    Args:
        files: path -> content.
        top: the folder that all of them lie in.
        out: the archive.

    Returns:
        The SHA-256 of the archive, in hex.

    Raises:
        RefusedError: it cannot be written.
    """
    sums = "".join(f"{hashlib.sha256(data).hexdigest()}  {path}\n" for path, data in sorted(files.items()))
    content = {**files, SUMS: sums.encode()}
    buffer = io.BytesIO()
    with (
        gzip.GzipFile(filename="", mode="wb", fileobj=buffer, mtime=0) as packed,
        tarfile.open(fileobj=packed, mode="w", format=tarfile.USTAR_FORMAT) as tar,
    ):
        for path, data in sorted(content.items()):
            entry = tarfile.TarInfo(f"{top}/{path}")
            entry.size, entry.mode = len(data), 0o644
            tar.addfile(entry, io.BytesIO(data))
    temporary = out.with_name(f".{out.name}.{os.getpid()}.tmp")
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        temporary.write_bytes(buffer.getvalue())
        temporary.replace(out)
    except OSError as error:
        with contextlib.suppress(OSError):
            temporary.unlink()
        raise RefusedError(f"{out} cannot be written: {error.strerror or error}") from error
    return hashlib.sha256(buffer.getvalue()).hexdigest()
