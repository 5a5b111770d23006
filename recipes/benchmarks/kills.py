"""Kills a quickstart run at random moments and resumes it: every run must end with the same engine, bit for bit."""

from __future__ import annotations

import argparse
import datetime
import json
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from compress.measure.environment import environment
from export.manifest import read_manifest, verify_files

ROOT = Path(__file__).parent.parent.parent
SMALLER = ("evaluate.samples=8", "evaluate.threads=[1]", "evaluate.against=[]", "gates={}", "calibration.samples=16")
"""What does not change how a run can be interrupted, only how long it takes."""


def start(out: Path, cache: Path) -> subprocess.Popen[str]:
    """Run the quickstart recipe into `out`, with the store in `cache`."""
    words = [sys.executable, "-m", "compress", "recipes/quickstart.yaml", "--cache", str(cache)]
    for change in (*SMALLER, f"out={out}"):
        words += ["--set", change]
    return subprocess.Popen(words, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)


def whole(folder: Path) -> str | None:
    """The hash of an engine whose every file is as its manifest says; None where there is no engine.

    Raises:
        EngineError: half an engine.
    """
    if not folder.exists():
        return None
    manifest = read_manifest(folder)
    verify_files(folder, manifest)
    return manifest.engine_hash


def interrupted(folder: Path, kills: int, dice: random.Random) -> dict[str, Any]:
    """Run from an empty cache, killed at random moments until it ends or `kills` are used up, then to its end."""
    folder.mkdir()
    out, cache = folder / "engine", folder / "cache"
    moments = []
    while True:
        run = start(out, cache)
        began, wait = time.monotonic(), dice.uniform(1, 30)
        if len(moments) == kills:
            wait = 3600.0
        try:
            _, said = run.communicate(timeout=wait)
        except subprocess.TimeoutExpired:
            run.send_signal(signal.SIGKILL)
            _, said = run.communicate()
            last = said.strip().splitlines()[-1:] or ["(nothing yet)"]
            moments.append({"after_s": round(time.monotonic() - began, 1), "last_line": last[0]})
            print(f"  killed after {moments[-1]['after_s']} s: {last[0]}", flush=True)
            whole(out)
            continue
        if run.returncode:
            raise SystemExit(f"the resumed run failed: {said[-2000:]}")
        return {"kills": moments, "engine_hash": whole(out), "left": sorted(path.name for path in folder.iterdir())}


def main(words: Sequence[str] | None = None) -> None:
    """Kill, resume, compare; write JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, help="the JSON file; default kills-DATE.json in results/")
    options = parser.parse_args(words)
    dice = random.Random(options.seed)
    with tempfile.TemporaryDirectory() as folder:
        runs = [interrupted(Path(folder) / "undisturbed", 0, dice)]
        print(f"undisturbed: {runs[0]['engine_hash']}", flush=True)
        left = options.kills
        while left:
            runs.append(interrupted(Path(folder) / f"run-{len(runs)}", min(left, 7), dice))
            left -= len(runs[-1]["kills"])
            print(f"run {len(runs) - 1}: {runs[-1]['engine_hash']}, {left} kills left", flush=True)
    same = len({run["engine_hash"] for run in runs}) == 1
    tidy = all(run["left"] == ["cache", "engine"] for run in runs)
    today = datetime.date.today().isoformat()
    report = {
        "what": __doc__,
        "date": today,
        "environment": environment(),
        "settings": list(SMALLER),
        "same_engine": same,
        "nothing_left_behind": tidy,
        "runs": runs,
    }
    out = options.out or Path(__file__).parent / "results" / f"kills-{today}.json"
    out.parent.mkdir(exist_ok=True)
    out.write_text(json.dumps(report, indent=1) + "\n")
    print(f"{options.kills} kills, same engine: {same}, nothing left behind: {tidy}")
    if not (same and tidy):
        raise SystemExit(1)


if __name__ == "__main__":
    main()
