"""Measures every preset of the `cache` pass on exported engines, against the same sampler with fewer steps."""

from __future__ import annotations

import argparse
import time
import traceback
from collections.abc import Sequence
from pathlib import Path

from compress.errors import PassError, RefusedError
from recipes.benchmarks import caching_tables
from recipes.benchmarks.caching.bench import ROOT, Bench, sources
from recipes.benchmarks.caching.measure import CHECKED, completed, measure, timed, untimed
from recipes.benchmarks.caching.presets import SAMPLERS, Run, runs
from recipes.benchmarks.caching.results import Kept, Row, Verdict, aggregate, newest, verdict

BUILD = ROOT / "build" / "caching"


class Work:
    """What is left, by network calls, and how long it will take.

    Attributes:
        failed: entries that broke; they are tried again by the next run.
    """

    def __init__(self, bench: Bench, wanted: Sequence[tuple[Run, Sequence[str]]]) -> None:
        """Measure how fast this machine is, and say how long what is left will take."""
        self.bench = bench
        self.failed: list[str] = []
        speeds = {name: bench.speed(name) for name in bench.models}
        self._seconds: dict[tuple[Run, str], float] = {}
        for run, entries in wanted:
            network, rest = speeds[run.model]
            samples = len(bench.prompts)
            for entry in entries:
                made = {"measure": samples, "complete": CHECKED}.get(self.state(run, entry), 0)
                if made:
                    self._seconds[run, entry] = made * (run.work(entry) * network + rest) / 1e3
            left = [seconds for (one, _), seconds in self._seconds.items() if one == run]
            print(
                f"{run}: {len(left)} of {len(entries)} entries to measure, about {sum(left) / 60:.0f} min", flush=True
            )
        said = ", ".join(f"{name} {network:.2f} + {rest:.2f}" for name, (network, rest) in speeds.items())
        print(f"ms a sample (a full network call + decoding and scoring): {said}", flush=True)
        print(f"about {sum(self._seconds.values()) / 60:.0f} min in all, without exports and timing", flush=True)
        self._expected = self._spent = 0.0

    def state(self, run: Run, entry: str) -> Verdict:
        """See `verdict`; a full run also needs its arrays."""
        if entry == "full":
            found = verdict(self.bench.kept.row(run, entry), self.bench.inputs(run, entry, None), sources())
            needed = ("latents",) if found == "complete" else ("latents", "pictures", "features", "hits")
            there = all(self.bench.kept.file(run, kind, entry, ".npy").exists() for kind in needed)
            return found if there else "measure"
        if self.state(run, "full") == "measure":
            return "measure"
        against = (self.bench.kept.row(run, "full") or {})["plan"]
        return verdict(self.bench.kept.row(run, entry), self.bench.inputs(run, entry, against), sources())

    def do(self, run: Run, entry: str) -> None:
        """Measure an entry unless its result stands."""
        state = self.state(run, entry)
        if state == "keep" or (state == "compare" and self._same(run, entry)):
            self._seconds.pop((run, entry), None)
            return
        against = None if entry == "full" else (self.bench.kept.row(run, "full") or {})["plan"]
        began = time.perf_counter()
        try:
            row = self._complete(run, entry) if state == "complete" else None
            row = row or measure(self.bench, run, entry, self.bench.inputs(run, entry, against))
        except Exception:
            if entry == "full":
                raise
            self.failed.append(f"{run} {entry}")
            self._seconds.pop((run, entry), None)
            print(f"{self.failed[-1]}: {traceback.format_exc()}", flush=True)
            return
        self.bench.kept.put(run, row)
        took = time.perf_counter() - began
        self._expected += self._seconds.pop((run, entry), took)
        self._spent += took
        rest = sum(self._seconds.values()) * self._spent / self._expected / 60
        psnr = row.get("latent_psnr_db")
        said = row.get("refused") or ("done" if psnr is None else f"{psnr['value']:.2f} dB")
        print(f"{run} {entry}: {said}, {took:.1f} s, {len(self._seconds)} left, {rest:.0f} min", flush=True)

    def _complete(self, run: Run, entry: str) -> Row | None:
        """The result of PyTorch with its engine; None where that gives something else."""
        row = self.bench.kept.row(run, entry)
        try:
            return None if row is None else completed(self.bench, run, row)
        except PassError as error:
            print(f"{run} {entry}: {error}; it is measured on the engine", flush=True)
            return None

    def _same(self, run: Run, entry: str) -> bool:
        """Whether the changed code still makes the plan that was measured."""
        row = self.bench.kept.row(run, entry)
        try:
            same = row is not None and self.bench.made_again(run, entry)
        except (RefusedError, PassError):
            return False
        if same and row is not None:
            self.bench.kept.put(run, row | {"sources": sources()})
        return same


def main(words: Sequence[str] | None = None) -> None:
    """Measure what is not measured yet, then aggregate."""
    parser = argparse.ArgumentParser(prog="python -m recipes.benchmarks.caching", description=__doc__)
    parser.add_argument("--models", nargs="+", choices=list(SAMPLERS), default=list(SAMPLERS))
    parser.add_argument("--samplers", nargs="+", default=["default"], help="default, all, or names of schedulers")
    parser.add_argument("--steps", nargs="+", type=int, default=[50])
    parser.add_argument("--samples", type=int, default=1024)
    parser.add_argument("--budgets", nargs="*", type=float, default=[0.4, 0.2], help="latency ratios of optimised runs")
    parser.add_argument("--only", nargs="+", default=None, help="names of entries; full is always measured")
    parser.add_argument("--target", default=caching_tables.TARGET, choices=[caching_tables.TARGET, "onnxruntime-cpu"])
    parser.add_argument("--build", type=Path, default=BUILD, help="what is kept on the way")
    parser.add_argument("--results", type=Path, default=caching_tables.RESULTS, help="the dated reports")
    told = parser.parse_args(words)
    wanted = [
        (run, run.entries(told.budgets, told.only))
        for run in runs(told.models, told.samplers, sorted(set(told.steps))[::-1])
    ]
    if not wanted:
        raise SystemExit(f"no such sampler: {', '.join(told.samplers)}; there are {SAMPLERS}")
    root = told.build if told.target == caching_tables.TARGET else told.build / told.target
    bench = Bench.of(Kept(root), told.target, told.models, told.samples)
    older = newest(told.results)
    for run, _ in wanted:
        bench.kept.restore(run, bench.target, older)
    work = Work(bench, wanted)
    for run, entries in wanted:
        for entry in entries:
            work.do(run, entry)
        if untimed(bench.kept, run):
            began = time.perf_counter()
            timed(bench, run)
            print(f"{run}: timed in {time.perf_counter() - began:.0f} s", flush=True)
        bench.engines.clear()
        aggregate(told.results, [root])
    if work.failed:
        raise SystemExit(f"not measured, and tried again by the next run: {', '.join(work.failed)}")


if __name__ == "__main__":
    main()
