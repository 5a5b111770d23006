"""Peak memory of a fresh process that opens a model and makes one picture."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from compress.errors import PassError

_ENGINE = """
import sys
from export.engine import Engine
folder, target, threads, prompt, height, width = sys.argv[1:7]
engine = Engine.open(folder, target=target, threads=int(threads), trusted=True)
engine.generate(prompts=[int(prompt) if prompt.isdigit() else prompt], seeds=[0], height=int(height), width=int(width))
"""

_PIPELINE = """
import json, sys
import torch
from compress.measure.original import open_pipeline
folder, threads, prompt, call = sys.argv[1:5]
torch.set_num_threads(int(threads))
open_pipeline(folder, json.loads(call)).generate(int(prompt) if prompt.isdigit() else prompt)
"""

_REPORT = """
def _peak():
    try:
        with open("/proc/self/status") as status:
            return int(next(line.split()[1] for line in status if line.startswith("VmHWM:"))) / 1024
    except (OSError, StopIteration):
        import resource
        scale = 1 / 1024**2 if sys.platform == "darwin" else 1 / 1024
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * scale
print(f"peak_rss_mib={_peak():.3f}")
"""
# VmHWM belongs to the address space, so it starts anew at exec; ru_maxrss on Linux also remembers the parent's.


def engine_peak_mib(folder: Path, target: str, prompt: str | int, height: int, width: int, threads: int = 1) -> float:
    """Peak resident memory, in MiB, of opening an engine and generating one picture.

    Raises:
        PassError: the process fails; gives its last line.
    """
    return _peak(_ENGINE, [str(folder), target, str(threads), str(prompt), str(height), str(width)])


def pipeline_peak_mib(folder: Path, call: str, prompt: str | int, threads: int = 1) -> float:
    """Peak resident memory, in MiB, of opening the original diffusers pipeline and generating one picture.

    Args:
        folder: of the model.
        call: what `compress.measure.original.PipelineCall.to_json` gives.
        prompt: text or class.
        threads: of PyTorch.

    Raises:
        PassError: the process fails; gives its last line.
    """
    return _peak(_PIPELINE, [str(folder), str(threads), str(prompt), call])


def _peak(script: str, arguments: list[str]) -> float:
    root = str(Path(__file__).parents[2])
    paths = [root, *filter(None, [os.environ.get("PYTHONPATH")])]
    threads = {name: arguments[2 if script is _ENGINE else 1] for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS")}
    done = subprocess.run(
        [sys.executable, "-c", script + _REPORT, *arguments],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, **threads, "PYTHONPATH": os.pathsep.join(paths)},
    )
    found = [line for line in done.stdout.splitlines() if line.startswith("peak_rss_mib=")]
    if done.returncode or not found:
        last = (done.stderr.strip().splitlines() or ["no message"])[-1]
        raise PassError(f"the process that measures peak memory failed: {last}")
    return float(found[-1].partition("=")[2])
