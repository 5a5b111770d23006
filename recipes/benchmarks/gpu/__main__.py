"""Measures the kernels on a GPU: correctness first, then every operation and whole runs, as one dated JSON.

`python -m recipes.benchmarks.gpu --out gpu.json` needs torch, Triton and NumPy alone. Every section is a process of its
own with a time limit, and its rows are written as they come: a run that is killed keeps what it has, and goes on with
`--sections`. Two calls of ten minutes hold everything: `--part 1`, then `--part 2`, into the same file. `--warm` only
compiles the kernels of sections, all at a time: with many processors that saves minutes of the GPU.
"""

from __future__ import annotations

import argparse
import gzip
import json
import logging
import os
import platform
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime
from importlib import import_module, metadata
from pathlib import Path
from typing import Any, NamedTuple

_HERE = "recipes.benchmarks.gpu"
_ROOT = Path(__file__).parents[3]


class Section(NamedTuple):
    """A part of the measurement.

    Attributes:
        function: `module:name` of what yields its rows.
        seconds: that it may take.
        part: of which ten minutes, or `TUNING`.
    """

    function: str
    seconds: int
    part: int


SECTIONS = {
    "ceilings": Section("ceilings:run", 40, 1),
    "correctness": Section("correctness:run", 120, 1),
    "steps": Section("steps:run", 60, 1),
    "heads": Section("heads:run", 140, 1),
    "rows": Section("rows:run", 120, 1),
    "products": Section("products:run", 110, 1),
    "unet": Section("whole:unet", 340, 2),
    "mmdit": Section("whole:mmdit", 230, 2),
    "tune-heads": Section("tune:heads", 120, 3),
    "tune-products": Section("tune:products", 120, 3),
    "tune-rows": Section("tune:rows", 120, 3),
}
TUNING = 3
"""The part of sections that run only when they are named: they try what the others use."""


def main(words: list[str] | None = None) -> int:
    """Run the sections asked for; 0 where every one of them ran to its end."""
    parser = argparse.ArgumentParser(prog=f"python -m {_HERE}", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--out", type=Path, required=True, help="the JSON file; its other sections are kept")
    parser.add_argument("--device", default="cuda", help="cuda, or cpu: plain torch, in reference mode")
    parser.add_argument("--tiny", action="store_true", help="tiny shapes, no torch.compile: shows that everything runs")
    parser.add_argument("--no-compile", action="store_true", help="leave torch.compile out")
    parser.add_argument("--sections", nargs="+", choices=SECTIONS, help="by name; all by default")
    parser.add_argument(
        "--part", type=int, choices=(1, 2, TUNING), help="of the first or second ten minutes, or tuning"
    )
    parser.add_argument("--limit", type=float, default=1.0, metavar="X", help="multiplies the sections' time limits")
    parser.add_argument("--warm", action="store_true", help="only compile kernels, of all these sections at once")
    parser.add_argument("--compiled", type=Path, help="folder for what torch.compile makes, for the next run")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    arguments = parser.parse_args(words)
    if arguments.child is not None:
        _child(arguments)
        return 0
    parts = (1, 2) if arguments.part is None else (arguments.part,)
    names = arguments.sections or [name for name, row in SECTIONS.items() if row.part in parts]
    if arguments.warm:
        return _warmed(names, arguments)
    result = _opened(arguments)
    complete = True
    for name in names:
        began = time.monotonic()
        state = _run(name, arguments)
        rows = _rows(arguments.out.with_suffix(f".{name}.jsonl"))
        seconds = round(time.monotonic() - began, 1)
        result["sections"][name] = {"state": state, "seconds": seconds, "date": _now(), **rows}
        _write(arguments.out, result)
        complete &= state == "complete"
        print(f"{name}: {state}, {len(rows['rows'])} rows, {seconds} s", flush=True)
    return 0 if complete else 1


def _warmed(names: list[str], arguments: argparse.Namespace) -> int:
    """Run sections at the same time, and keep nothing but what Triton kept of them; 0 where all ran to their ends."""
    states: list[str] = []
    with tempfile.TemporaryDirectory() as folder:
        apart = argparse.Namespace(**vars(arguments) | {"out": Path(folder) / "warm.json", "no_compile": True})
        with ThreadPoolExecutor(len(names)) as pool:
            for name, state in zip(names, pool.map(lambda name: _run(name, apart), names), strict=True):
                print(f"{name}: {state}", flush=True)
                states.append(state)
    return int(any(state != "complete" for state in states))


def _run(name: str, arguments: argparse.Namespace) -> str:
    """One section in a process of its own: `complete`, `stopped` at its limit, or how it failed."""
    log = arguments.out.with_suffix(f".{name}.jsonl")
    log.unlink(missing_ok=True)
    words = [sys.executable, "-m", _HERE, "--child", name, "--out", str(arguments.out), "--device", arguments.device]
    flags = {"--tiny": arguments.tiny, "--no-compile": arguments.no_compile, "--warm": arguments.warm}
    words += [flag for flag, given in flags.items() if given]
    words += [] if arguments.compiled is None else ["--compiled", str(arguments.compiled)]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(_ROOT), os.environ.get("PYTHONPATH", "")])}
    limit = SECTIONS[name].seconds * arguments.limit
    try:
        done = subprocess.run(
            words, env=environment, cwd=_ROOT, timeout=limit, capture_output=True, text=True, check=False
        )
    except subprocess.TimeoutExpired:
        return f"stopped after {limit:.0f} s"
    said = " ".join(done.stderr.split())[-300:]
    return "complete" if done.returncode == 0 else f"failed: {said}"


def _child(arguments: argparse.Namespace) -> None:
    """Write the rows of a section, one line of JSON each, and why each implementation was chosen."""
    import torch

    from recipes.benchmarks.gpu.bench import Bench
    from recipes.benchmarks.gpu.clock import Clock

    chosen: list[str] = []
    logger = logging.getLogger("kernels")
    logger.setLevel(logging.DEBUG)
    logger.addHandler(_Listing(chosen))
    device = torch.device(arguments.device)
    many = SECTIONS[arguments.child].part == TUNING
    clock = Clock(device, *((0.0, 1, 1) if arguments.tiny or arguments.warm else (0.1, 30) if many else ()))
    ceilings = {
        row["ceiling"]: row["value"]
        for row in _opened(arguments)["sections"].get("ceilings", {}).get("rows", ())
        if "value" in row
    }
    bench = Bench(device, arguments.tiny, not (arguments.tiny or arguments.no_compile), clock, ceilings)
    module, _, function = SECTIONS[arguments.child].function.partition(":")
    run: Callable[[Bench], Iterator[dict[str, Any]]] = getattr(import_module(f"{_HERE}.{module}"), function)
    kept = None if arguments.compiled is None else arguments.compiled / f"{arguments.child}.gz"
    if kept is not None and kept.exists():
        torch.compiler.load_cache_artifacts(gzip.decompress(kept.read_bytes()))
    with arguments.out.with_suffix(f".{arguments.child}.jsonl").open("w", encoding="utf-8") as file:
        for row in run(bench):
            for entry in (row, *({"chosen": line} for line in chosen)):
                file.write(json.dumps(entry) + "\n")
            chosen.clear()
            file.flush()
            made = None if kept is None else torch.compiler.save_cache_artifacts()
            if kept is not None and made is not None:
                kept.parent.mkdir(parents=True, exist_ok=True)
                kept.write_bytes(gzip.compress(made[0], 1))


class _Listing(logging.Handler):
    """Appends messages to a list."""

    def __init__(self, lines: list[str]) -> None:
        super().__init__()
        self._lines = lines

    def emit(self, record: logging.LogRecord) -> None:
        """Append."""
        self._lines.append(record.getMessage())


def _rows(log: Path) -> dict[str, list[Any]]:
    """What a section wrote, the last line left out where it was cut off."""
    rows: list[Any] = []
    chosen: list[Any] = []
    for line in log.read_text(encoding="utf-8").splitlines(keepends=True) if log.exists() else ():
        if line.endswith("\n"):
            entry = json.loads(line)
            (chosen if "chosen" in entry else rows).append(entry.get("chosen", entry))
    log.unlink(missing_ok=True)
    return {"rows": rows, "chosen": chosen}


def _opened(arguments: argparse.Namespace) -> dict[str, Any]:
    """The results so far; those of another machine or other shapes are not mixed with ours.

    Raises:
        SystemExit: the file has such results.
    """
    machine = _machine(arguments)
    if not arguments.out.exists():
        return {"schema_version": 1, "created": _now(), **machine, "sections": {}}
    result: dict[str, Any] = json.loads(arguments.out.read_text(encoding="utf-8"))
    differing = [key for key, value in machine.items() if result.get(key) != value]
    if differing:
        raise SystemExit(f"{arguments.out} has results with another {', '.join(differing)}; name another file")
    return result


def _machine(arguments: argparse.Namespace) -> dict[str, Any]:
    import torch

    cuda = arguments.device.startswith("cuda")
    if cuda and not torch.cuda.is_available():
        raise SystemExit("there is no GPU here that torch could use; --device cpu --tiny shows that everything runs")
    versions = {"python": platform.python_version(), "torch": torch.__version__, "cuda": torch.version.cuda}
    versions["triton"] = next(
        (row.version for row in metadata.distributions() if row.metadata["Name"] == "triton"), None
    )
    capability = ".".join(map(str, torch.cuda.get_device_capability())) if cuda else None
    name = torch.cuda.get_device_name() if cuda else platform.processor() or platform.machine()
    return {"device": name, "capability": capability, "versions": versions, "tiny": arguments.tiny}


def _write(path: Path, result: dict[str, Any]) -> None:
    temporary = path.with_suffix(".tmp")
    temporary.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    temporary.replace(path)


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")


if __name__ == "__main__":
    raise SystemExit(main())
