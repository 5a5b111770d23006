"""The search: candidates by formula, then local moves from the best of them, judged by the error of the last latent."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from itertools import pairwise

import numpy as np

from compress.errors import RefusedError
from compress.optimise.candidate import Candidate, fewer_steps, spread
from compress.optimise.lab import HELD_OUT, Lab

FINALISTS = 4
FIRST = 0.6
PATIENCE = 200
"""Moves in a row that gain nothing before the search ends."""
DAMPINGS = (0.0, 0.5, 0.7, 0.85, 1.0, 1.15)


@dataclass(frozen=True)
class Judged:
    """A candidate with its quality (mean of per-sample latent PSNR, dB) and its latency (ms)."""

    candidate: Candidate
    decibels: float
    latency: float


@dataclass
class Search:
    """One search at one latency budget.

    Attributes:
        lab: judges.
        budget: ms of network calls.
        seconds: the search ends after so many; the first candidates may take `FIRST` of them.
        progress: receives (evaluations done, seconds left).
    """

    lab: Lab
    budget: float
    seconds: float
    progress: Callable[[int, float], None] = lambda done, left: None
    evaluations: int = 0
    _known: dict[tuple[Candidate, int], float] = field(default_factory=dict)

    def run(self) -> list[Judged]:
        """The finalists, best first, judged on all calibration noises.

        Raises:
            RefusedError: not even one full call fits the budget.
        """
        began = time.perf_counter()
        rng = np.random.default_rng(0)
        pool: dict[Candidate, float] = {}
        for one in self._affordable([*self.seeds()]):
            if pool and time.perf_counter() - began > FIRST * self.seconds:
                break
            value = self.judge(one, self.lab.few)
            if value >= 0.0:
                pool[one] = value
        if not pool:
            raise RefusedError("not even one network call fits the budget: allow more latency")
        best = sorted(pool, key=pool.__getitem__, reverse=True)[:FINALISTS]
        final = {one: self.judge(one, self.lab.samples) for one in best}
        stale = 0
        while time.perf_counter() - began < self.seconds and stale < PATIENCE:
            self.progress(self.evaluations, self.seconds - (time.perf_counter() - began))
            ranked = sorted(final, key=final.__getitem__, reverse=True)
            base = ranked[0] if rng.random() < 0.7 else ranked[int(rng.integers(min(FINALISTS, len(ranked))))]
            move = self._move(base, rng)
            if move is None or move in final:
                stale += 1
                continue
            # A move must not lose on few samples before it is tried on many.
            if self.judge(move, self.lab.few) <= self.judge(base, self.lab.few) - 0.1:
                stale += 1
                continue
            value = self.judge(move, self.lab.samples)
            if value > final[base]:
                final[move] = value
                stale = 0
            else:
                stale += 1
        order = sorted(final, key=final.__getitem__, reverse=True)
        return [Judged(one, final[one], self.lab.latency(one)) for one in order]

    def judge(self, candidate: Candidate, samples: int) -> float:
        """The quality of a candidate on so many calibration noises, dB; -1 where the scheduler refuses its calls."""
        key = (candidate, samples)
        if key not in self._known:
            self.evaluations += 1
            try:
                self._known[key] = float(self.lab.calibrated(candidate, samples).mean())
            except RefusedError:
                self._known[key] = -1.0
        return self._known[key]

    def _affordable(self, candidates: Sequence[Candidate]) -> list[Candidate]:
        return [one for one in dict.fromkeys(candidates) if self.lab.latency(one) <= self.budget * (1 + 1e-9)]

    def steps_in_budget(self) -> int:
        """The most full calls of the sampler that fit; 0 where none do."""
        most = min(self.lab.plan.network_calls, int(self.budget / self.lab.benches[None].times.full + 1e-9))
        for calls in range(most, 0, -1):
            with contextlib.suppress(RefusedError):
                self.lab.sampler(calls)
                return calls
        return 0

    def seeds(self) -> Iterator[Candidate]:
        """Where the search begins, the most promising first."""
        yield from self._simple()
        yield from self._formulas()

    def _simple(self) -> Iterator[Candidate]:
        """Fewer steps, at the scheduler's points and at the best ones, and uniform caching: what a search must beat."""
        base = self.steps_in_budget()
        if base >= 1:
            yield fewer_steps(base)
            yield from self._thinned(fewer_steps(base))
        yield from uniform_caching(self)

    def _formulas(self) -> Iterator[Candidate]:
        """For some numbers of calls, every cut with as many full calls as the budget leaves."""
        base, most = self.steps_in_budget(), self.lab.plan.network_calls
        for cut, bench in self.lab.benches.items():
            if cut is None:
                continue
            longest = min(most, int(self.budget / bench.times.cached))
            for calls in sorted({round(c) for c in np.geomspace(max(3, base + 1), max(3, longest), 6)}):
                for one in self._filled(calls, cut):
                    yield from (*self._thinned(one), one)

    def _thinned(self, base: Candidate) -> Iterator[Candidate]:
        """The same calls at the points of the uncached run that a fitted sampler misses least."""
        if self.lab.fitting:
            for kept in self.lab.kept_points:
                if base.calls <= len(kept):
                    yield replace(base, points=kept[base.calls - 1])

    def _filled(self, calls: int, cut: int, powers: Sequence[float] = (1.0,)) -> Iterator[Candidate]:
        full = self._full_calls(calls, cut)
        if 2 <= full < calls:
            for power in powers:
                yield Candidate(spread(calls, full, 2, power), cut)

    def _full_calls(self, calls: int, cut: int) -> int:
        times = self.lab.benches[cut].times
        if times.full <= times.cached:
            return 0
        return min(calls, int((self.budget - calls * times.cached) / (times.full - times.cached) + 1e-9))

    def _move(self, base: Candidate, rng: np.random.Generator) -> Candidate | None:
        """A neighbour within the budget, or None."""
        moves: list[Callable[[Candidate, np.random.Generator], Candidate | None]] = [self._other_calls]
        if base.cut is not None and not all(base.full):
            moves += [_moved_full, _moved_full, _other_damping, self._other_cut]
        if base.points is not None:
            moves += [_other_point, _other_point]
        found = moves[int(rng.integers(len(moves)))](base, rng)
        return found if found is not None and self._possible(found) and self._affordable([found]) else None

    def _possible(self, candidate: Candidate) -> bool:
        """Whether its points are rows of the uncached run with states of their own, in order."""
        points = candidate.points
        if points is None:
            return True
        ascending = all(before < after for before, after in pairwise((*points, self.lab.plan.network_calls)))
        return ascending and not any(point % self.lab.every for point in points)

    def _other_calls(self, base: Candidate, rng: np.random.Generator) -> Candidate | None:
        """One call more or less, the full ones as the budget allows, at points chosen anew."""
        calls = base.calls + (1 if rng.random() < 0.5 else -1)
        if base.cut is None or not 3 <= calls <= self.lab.plan.network_calls:
            return None
        options = [*self._filled(calls, base.cut, (1.0, 1.2, 1.4))]
        if base.points is not None:
            options = [one for option in options for one in self._thinned(option)]
        if not options:
            return None
        return replace(options[int(rng.integers(len(options)))], damping=base.damping)

    def _other_cut(self, base: Candidate, rng: np.random.Generator) -> Candidate | None:
        cuts = [cut for cut in self.lab.benches if cut not in (None, base.cut)]
        if not cuts:
            return None
        cut = cuts[int(rng.integers(len(cuts)))]
        options = [] if cut is None else list(self._filled(base.calls, cut))
        return replace(options[0], damping=base.damping, points=base.points) if options else None


def _other_point(base: Candidate, rng: np.random.Generator) -> Candidate | None:
    """One point of the uncached run instead of its neighbour."""
    points = list(base.points or ())
    if len(points) < 2:
        return None
    at = int(rng.integers(1, len(points)))
    points[at] += int(rng.choice([-2, -1, 1, 2]))
    return replace(base, points=tuple(points))


def _moved_full(base: Candidate, rng: np.random.Generator) -> Candidate | None:
    """One full call trades places with a cached one, a neighbour more often than not."""
    full = [row for row in range(1, base.calls) if base.full[row]]
    cached = [row for row in range(1, base.calls) if not base.full[row]]
    if not full or not cached:
        return None
    row = full[int(rng.integers(len(full)))]
    near = [other for other in cached if abs(other - row) == 1]
    pick = near if near and rng.random() < 0.7 else cached
    other = pick[int(rng.integers(len(pick)))]
    flags = list(base.full)
    flags[row], flags[other] = False, True
    return replace(base, full=tuple(flags))


def _other_damping(base: Candidate, rng: np.random.Generator) -> Candidate | None:
    at = DAMPINGS.index(min(DAMPINGS, key=lambda d: abs(d - base.damping))) + (1 if rng.random() < 0.5 else -1)
    return replace(base, damping=DAMPINGS[at]) if 0 <= at < len(DAMPINGS) else None


@dataclass(frozen=True)
class Finding:
    """What a search found, on noises it has not seen.

    Attributes:
        chosen: what to run.
        fewer, uniform: the best of the simpler ways at equal latency; uniform is None where none fits.
        searched: the best of the search; the chosen one unless a simpler one is as good.
    """

    chosen: Judged
    fewer: Judged
    uniform: Judged | None
    searched: Judged


def settle(search: Search, finalists: Sequence[Judged], samples: int | None = None) -> Finding:
    """Judge finalists, fewer steps and uniform caching on held-out noises; the search must beat both to be chosen."""
    lab, seed = search.lab, search.lab.seed + HELD_OUT

    def held_out(candidate: Candidate) -> Judged:
        return Judged(
            candidate, float(lab.decibels(candidate, seed, samples or lab.samples).mean()), lab.latency(candidate)
        )

    fewer = held_out(fewer_steps(max(1, search.steps_in_budget())))
    likely = max(uniform_caching(search), key=lambda one: search.judge(one, lab.few), default=None)
    uniform = None if likely is None else held_out(likely)
    searched = max((held_out(one.candidate) for one in finalists[:2]), key=lambda j: j.decibels)
    simple = fewer if uniform is None or fewer.decibels >= uniform.decibels else uniform
    return Finding(searched if searched.decibels > simple.decibels else simple, fewer, uniform, searched)


def uniform_caching(search: Search) -> list[Candidate]:
    """At the sampler's own number of steps, every cut with the shortest uniform interval that fits, and its Taylor."""
    lab, calls = search.lab, search.lab.plan.network_calls
    found = []
    for cut in lab.benches:
        for damping, warmup in ((0.0, 1), (1.0, 2)) if cut is not None else ():
            for interval in range(2, calls):
                full = tuple(row < warmup or (row - warmup + 1) % interval == 0 for row in range(calls))
                one = Candidate(full, cut, damping)
                if lab.latency(one) <= search.budget:
                    found.append(one)
                    break
    return found
