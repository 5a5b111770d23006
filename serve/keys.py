"""API keys: who may ask, read from a file with one key a line."""

from __future__ import annotations

import hashlib
import hmac
from pathlib import Path

from fastapi import Request
from fastapi.security import HTTPBearer
from fastapi.security.utils import get_authorization_scheme_param

from export.errors import EngineError
from serve.refusal import Refusal

SHORTEST = 16


class Keys(HTTPBearer):
    """A dependency of routes: lets pass who sends `Authorization: Bearer KEY` with one of the keys."""

    def __init__(self, keys: tuple[str, ...]) -> None:
        super().__init__(auto_error=False, description="One of the keys of this server.")
        self._digests = [hashlib.sha256(key.encode()).digest() for key in keys]

    async def __call__(self, request: Request) -> None:
        """Refuse whoever has no key; the time it takes does not tell how much of a key was right."""
        scheme, given = get_authorization_scheme_param(request.headers.get("authorization"))
        digest = hashlib.sha256(given.encode("utf-8", "surrogateescape")).digest()
        right = [hmac.compare_digest(digest, known) for known in self._digests]
        if scheme.lower() != "bearer" or not any(right):
            raise Refusal(401, "send one of this server's keys: Authorization: Bearer KEY", code="invalid_api_key")


def read_keys(path: Path) -> tuple[str, ...]:
    """Read a file of keys: one a line; empty lines and those that begin with # are left out.

    Raises:
        EngineError: the file cannot be read, holds no key, or one that could be guessed.
    """
    try:
        lines = [line.strip() for line in path.read_text(encoding="utf-8").splitlines()]
    except (OSError, UnicodeDecodeError) as error:
        raise EngineError(f"the keys {path} cannot be read: {getattr(error, 'strerror', None) or error}") from error
    keys = tuple(line for line in lines if line and not line.startswith("#"))
    if not keys:
        raise EngineError(f"{path} holds no key: write one a line, at least {SHORTEST} characters")
    short = next((number for number, line in enumerate(lines, 1) if line in keys and len(line) < SHORTEST), None)
    if short is not None:
        raise EngineError(f"{path}:{short}: this key is shorter than {SHORTEST} characters; take a longer one")
    return keys
