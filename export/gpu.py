"""Whether this machine has an NVIDIA GPU, found without PyTorch."""

from __future__ import annotations

import ctypes
import functools


@functools.cache
def gpu_here() -> bool:
    """Whether the CUDA driver is installed and counts at least one device that this process may use."""
    try:
        driver = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return False
    count = ctypes.c_int(0)
    return driver.cuInit(0) == 0 and driver.cuDeviceGetCount(ctypes.byref(count)) == 0 and count.value > 0
