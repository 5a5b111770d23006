"""A candidate: which sampler points are kept, which of them run in full, and how the others forecast."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Candidate:
    """One way to spend a latency budget.

    Attributes:
        full: per network call, whether it runs the full path.
        cut: where the denoiser is cut; None where every call is full.
        damping: factor on the slope of the linear forecast; 0 is reuse.
        times: the timesteps of the calls; None leaves them to the scheduler, spaced as it spaces that many steps.
    """

    full: tuple[bool, ...]
    cut: int | None = None
    damping: float = 1.0
    times: tuple[float, ...] | None = None

    @property
    def calls(self) -> int:
        """Network calls in all."""
        return len(self.full)

    @property
    def full_calls(self) -> int:
        """Network calls that run the full path."""
        return sum(self.full)

    @property
    def strip(self) -> str:
        """A letter per call."""
        return "".join("F" if full else "c" for full in self.full)


def fewer_steps(calls: int) -> Candidate:
    """Every call full."""
    return Candidate((True,) * calls)


def spread(calls: int, full_calls: int, warmup: int, power: float = 1.0) -> tuple[bool, ...]:
    """The first `warmup` calls full, and the rest of the full calls spread over the others.

    Args:
        calls: in all.
        full_calls: at least `warmup`.
        warmup: full calls at the start.
        power: above 1 they are denser at the start.
    """
    left, room = full_calls - warmup, calls - warmup
    chosen = set(range(warmup))
    for k in range(left):
        place = warmup + round(((k + 1) / (left + 1)) ** power * room) if left < room else warmup + k
        while place in chosen or place >= calls:
            place = place + 1 if place + 1 < calls else min(row for row in range(calls) if row not in chosen)
        chosen.add(place)
    return tuple(row in chosen for row in range(calls))


def shifted(times: Sequence[float], at: int, share: float) -> tuple[float, ...] | None:
    """The timesteps with one moved by a share of the gap towards its later (share > 0) or earlier neighbour.

    None where it is the first, which the noise is made for, or nothing is left between its neighbours.
    """
    if not 0 < at < len(times):
        return None
    later = times[at + 1] if at + 1 < len(times) else 0.0
    towards = later if share > 0 else times[at - 1]
    moved = times[at] + abs(share) * (towards - times[at])
    if not times[at - 1] > moved > later:
        return None
    return (*times[:at], moved, *times[at + 1 :])
