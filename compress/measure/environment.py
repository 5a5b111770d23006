"""The machine and the packages a number was measured with, and the evidence label that says so."""

from __future__ import annotations

import os
import platform
from contextlib import suppress
from datetime import date
from importlib import metadata

from compress.doctor import processor_name

PACKAGES = ("torch", "diffusers", "transformers", "onnx", "onnxruntime", "openvino", "numpy")
BUILT = "built"
SIMULATED = "simulated"
STORAGE_ONLY = "storage only"


def environment() -> dict[str, str]:
    """Describe this machine: processor, cores, memory, system, Python, and the packages that compute."""
    found = {
        "processor": processor_name(),
        "cores": str(len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()),
        "memory": f"{os.sysconf('SC_PAGE_SIZE') * os.sysconf('SC_PHYS_PAGES') / 2**30:.1f} GiB",
        "system": f"{platform.system()} {platform.release()} {platform.machine()}",
        "python": platform.python_version(),
    }
    for name in PACKAGES:
        with suppress(metadata.PackageNotFoundError):
            found[name] = metadata.version(name)
    return found


def ran(device: str = "cpu") -> str:
    """Label what was executed here today, e.g. `ran (Intel(R) Xeon(R) Processor @ 2.50GHz, 2026-01-31)`.

    Args:
        device: `cpu`, or the name of the accelerator that computed.
    """
    name = processor_name() if device == "cpu" else device
    return f"ran ({name}, {date.today().isoformat()})"
