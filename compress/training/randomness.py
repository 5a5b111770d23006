"""Random numbers without a state: a pure function of seed, update and process, so that nothing of them is saved."""

from __future__ import annotations

import hashlib

import torch


def generator(seed: int, step: int, rank: int = 0) -> torch.Generator:
    """The generator of one update in one process; on the CPU, so that every device is given the same numbers."""
    digest = hashlib.sha256(f"{seed}/{step}/{rank}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "big") >> 1)
