"""A candidate: which sampler points are kept, which of them run in full, and how the others forecast."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Candidate:
    """One way to spend a latency budget.

    Attributes:
        full: per network call, whether it runs the full path.
        cut: where the denoiser is cut; None where every call is full.
        damping: factor on the slope of the linear forecast; 0 is reuse.
        points: the rows of the uncached run at whose timesteps the calls are made, the first of them 0; their updates
            are fitted. None leaves steps and updates to the scheduler.
    """

    full: tuple[bool, ...]
    cut: int | None = None
    damping: float = 1.0
    points: tuple[int, ...] | None = None

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
    """Every call full, at the scheduler's own steps."""
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
