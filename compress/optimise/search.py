"""The search: candidates by formula, then local moves from the best of them, judged by the error of the last latent."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace

import numpy as np

from compress.errors import RefusedError
from compress.optimise.candidate import Candidate, fewer_steps, shifted, spread
from compress.optimise.lab import HELD_OUT, Lab

FEW, MANY = 8, 32
"""Samples that seeds and finalists are judged on."""
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
        seed: of the noises.
        progress: receives (evaluations done, seconds left).
    """

    lab: Lab
    budget: float
    seconds: float
    seed: int
    progress: Callable[[int, float], None] = lambda done, left: None
    evaluations: int = 0
    _known: dict[tuple[Candidate, int], float] = field(default_factory=dict)

    def run(self) -> list[Judged]:
        """The finalists, best first, judged on `MANY` calibration samples.

        Raises:
            RefusedError: not even one full call fits the budget.
        """
        began = time.perf_counter()
        rng = np.random.default_rng(0)
        pool: dict[Candidate, float] = {}
        for one in self._affordable([*self._simple(), *self._formulas()]):
            if pool and time.perf_counter() - began > FIRST * self.seconds:
                break
            pool[one] = self._judge(one, FEW)
        if not pool:
            raise RefusedError("not even one network call fits the budget: allow more latency")
        best = sorted(pool, key=pool.__getitem__, reverse=True)[:FINALISTS]
        final = {one: self._judge(one, MANY) for one in best}
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
            if self._judge(move, FEW) <= self._judge(base, FEW) - 0.1:
                stale += 1
                continue
            value = self._judge(move, MANY)
            if value > final[base]:
                final[move] = value
                stale = 0
            else:
                stale += 1
        order = sorted(final, key=final.__getitem__, reverse=True)
        return [Judged(one, final[one], self.lab.latency(one)) for one in order]

    def _judge(self, candidate: Candidate, samples: int) -> float:
        key = (candidate, samples)
        if key not in self._known:
            self.evaluations += 1
            try:
                self._known[key] = float(self.lab.decibels(candidate, self.seed, samples).mean())
            except RefusedError:
                self._known[key] = -1.0
        return self._known[key]

    def _affordable(self, candidates: Sequence[Candidate]) -> list[Candidate]:
        return [one for one in dict.fromkeys(candidates) if self.lab.latency(one) <= self.budget * (1 + 1e-9)]

    def steps_in_budget(self) -> int:
        """How many full calls fit."""
        return min(self.lab.plan.network_calls, int(self.budget / self.lab.benches[None].times.full + 1e-9))

    def _simple(self) -> Iterator[Candidate]:
        """Fewer steps, at the scheduler's points and at others, and uniform caching: what a search must beat."""
        base = self.steps_in_budget()
        if base >= 1:
            yield fewer_steps(base)
            yield from self._respaced(fewer_steps(base))
        yield from uniform_caching(self)

    def _formulas(self) -> Iterator[Candidate]:
        """For some numbers of calls, every cut with as many full calls as the budget leaves."""
        base, most = self.steps_in_budget(), self.lab.plan.network_calls
        for cut, bench in self.lab.benches.items():
            if cut is None:
                continue
            times = bench.times
            longest = min(most, int(self.budget / times.cached))
            for calls in sorted({round(c) for c in np.geomspace(max(3, base + 1), max(3, longest), 6)}):
                for one in self._filled(calls, cut):
                    yield one
                    yield from self._respaced(one)

    def _respaced(self, base: Candidate) -> Iterator[Candidate]:
        """The same calls at timesteps that end where the whole run ends, even or denser towards the end."""
        if not self.lab.exact_times or not 3 <= base.calls < self.lab.plan.network_calls:
            return
        first, last = self.lab.plan.steps[0].t, self.lab.plan.steps[-1].t
        for power in (1.0, 0.9):
            shares = np.linspace(0.0, 1.0, base.calls) ** power
            yield replace(base, times=tuple(float(first + share * (last - first)) for share in shares))

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
        if self.lab.exact_times:
            moves += [self._other_times, self._other_times]
        found = moves[int(rng.integers(len(moves)))](base, rng)
        return found if found is not None and self._affordable([found]) else None

    def _other_calls(self, base: Candidate, rng: np.random.Generator) -> Candidate | None:
        """One call more or less, the full ones as the budget allows; timesteps are the scheduler's own again."""
        calls = base.calls + (1 if rng.random() < 0.5 else -1)
        if base.cut is None or not 3 <= calls <= self.lab.plan.network_calls:
            return None
        options = list(self._filled(calls, base.cut, (1.0, 1.2, 1.4)))
        if not options:
            return None
        return replace(options[int(rng.integers(len(options)))], damping=base.damping)

    def _other_cut(self, base: Candidate, rng: np.random.Generator) -> Candidate | None:
        cuts = [cut for cut in self.lab.benches if cut not in (None, base.cut)]
        if not cuts:
            return None
        cut = cuts[int(rng.integers(len(cuts)))]
        options = [] if cut is None else list(self._filled(base.calls, cut))
        return replace(options[0], damping=base.damping, times=base.times) if options else None

    def _other_times(self, base: Candidate, rng: np.random.Generator) -> Candidate | None:
        """One sampler point earlier or later: between the points of the fine run, whole ones skipped."""
        times = base.times or tuple(step.t for step in self.lab.sampler(base.calls, None).steps)
        share = float(rng.choice([-0.5, -0.25, 0.25, 0.5]))
        moved = shifted(times, int(rng.integers(1, max(2, base.calls))), share)
        return None if moved is None else replace(base, times=moved)


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


def settle(search: Search, finalists: Sequence[Judged], samples: int = MANY) -> Finding:
    """Judge finalists, fewer steps and uniform caching on held-out noises; the search must beat both to be chosen."""
    lab, seed = search.lab, search.seed + HELD_OUT

    def held_out(candidate: Candidate) -> Judged:
        return Judged(candidate, float(lab.decibels(candidate, seed, samples).mean()), lab.latency(candidate))

    fewer = held_out(fewer_steps(max(1, search.steps_in_budget())))
    uniform = max((held_out(one) for one in uniform_caching(search)), key=lambda j: j.decibels, default=None)
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
