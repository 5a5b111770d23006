"""Examines a machine: its processor, its packages, and so which targets it can build for and run."""

from __future__ import annotations

import os
import platform
import re
import shutil
from dataclasses import asdict, dataclass, field
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from export.to_web import PageOptions

DISTRIBUTION = "latent-compress"

FLAGS = {
    "avx2": "fp32 kernels at full width of 256 bits",
    "avx512f": "fp32 kernels at full width of 512 bits",
    "avx512_vnni": "int8 dot products in one instruction (int8-w8a8 is fast)",
    "avx_vnni": "int8 dot products in one instruction (int8-w8a8 is fast)",
    "avx512_bf16": "bf16 dot products in one instruction",
    "amx_int8": "int8 matrix tiles (int8-w8a8 is fastest)",
    "amx_bf16": "bf16 matrix tiles",
    "asimddp": "int8 dot products in one instruction (int8-w8a8 is fast)",
    "i8mm": "int8 matrix products in one instruction",
}
"""Processor flag -> what it gives."""


@dataclass(frozen=True)
class Row:
    """One finding."""

    what: str
    found: str
    means: str = ""


@dataclass
class Findings:
    """All findings; `problems` are sentences with the way out, `targets` tells which engines run here."""

    rows: list[Row] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)
    packages: dict[str, str | None] = field(default_factory=dict)
    targets: dict[str, bool] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """Return plain data for JSON."""
        return asdict(self)


def examine() -> Findings:
    """Look at this machine; nothing is changed and no network is used."""
    found = Findings()
    _machine(found)
    _packages(found)
    _torch(found)
    _targets(found)
    return found


def _machine(found: Findings) -> None:
    flags = processor_flags()
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    found.rows.append(Row("system", f"{platform.system()} {platform.machine()}, Python {platform.python_version()}"))
    found.rows.append(Row("processor", f"{usable} cores, {memory:.1f} GiB memory", processor_name()))
    for flag, gives in FLAGS.items():
        if flag in flags:
            found.rows.append(Row(f"  {flag}", "yes", gives))
    if flags and not flags & {"avx512_vnni", "avx_vnni", "amx_int8", "asimddp", "i8mm"}:
        found.problems.append("the processor has no int8 dot product, so int8-w8a8 saves size here but little time")
    disk = shutil.disk_usage(Path.cwd()).free / 2**30
    found.rows.append(Row("free disk here", f"{disk:.1f} GiB"))
    if disk < 2.0:
        found.problems.append(f"only {disk:.1f} GiB of disk are free here; an engine and its stored results need more")


def processor_flags() -> frozenset[str]:
    """Return the instruction-set flags that the kernel reports, empty where it reports none."""
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return frozenset()
    line = re.search(r"^(?:flags|Features)\s*:(.*)$", text, re.MULTILINE)
    return frozenset(line.group(1).split()) if line is not None else frozenset()


def processor_name() -> str:
    """Return the processor's name as the kernel reports it, or its architecture."""
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace")
    except OSError:
        text = ""
    line = re.search(r"^model name\s*:(.*)$", text, re.MULTILINE)
    return line.group(1).strip() if line is not None else platform.processor() or platform.machine()


def _packages(found: Findings) -> None:
    """Compare what is installed with what the distribution asks for, extra by extra."""
    from packaging.requirements import Requirement

    try:
        requirements = [Requirement(text) for text in metadata.requires(DISTRIBUTION) or ()]
    except metadata.PackageNotFoundError:
        found.problems.append("the project is not installed; run: pip install -e . (or make demo)")
        return
    extras: dict[str, list[str]] = {}
    for requirement in requirements:
        extra = _extra(requirement)
        if requirement.marker is not None and not requirement.marker.evaluate({"extra": extra or ""}):
            continue
        installed = _version(requirement.name)
        found.packages[requirement.name] = installed
        wanted = str(requirement.specifier)
        if installed is None:
            extras.setdefault(extra or "", []).append(requirement.name)
        elif not requirement.specifier.contains(installed, prereleases=True):
            found.problems.append(
                f"{requirement.name} {installed} does not fit {wanted}; run: pip install '{requirement.name}{wanted}'"
            )
        found.rows.append(Row(requirement.name, installed or "missing", f"extra {extra}" if extra else ""))
    for extra, names in extras.items():
        if extra == "":
            found.problems.append(f"missing: {', '.join(names)}; run: pip install {' '.join(names)}")
        elif extra != "dev":
            line = f"pip install '{DISTRIBUTION}[{extra}]'"
            found.rows.append(Row(f"extra {extra}", "not installed", f"for it run: {line}"))
    for name, why in {
        "onnxruntime-gpu": "it owns the same import name as onnxruntime and hides it",
        "torchvision": "it may have replaced the torch build",
    }.items():
        if _version(name) is not None and (name != "onnxruntime-gpu" or _version("onnxruntime") is not None):
            found.problems.append(f"{name} is installed beside us: {why}; run: pip uninstall {name}")


def _extra(requirement: Any) -> str | None:
    """Return the extra that a requirement belongs to."""
    match = re.search(r"extra == ['\"]([^'\"]+)['\"]", str(requirement.marker or ""))
    return match.group(1) if match is not None else None


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def _torch(found: Findings) -> None:
    try:
        import torch
    except Exception as error:
        found.problems.append(f"torch cannot be imported ({type(error).__name__}: {error}); nothing can be built here")
        return
    if torch.cuda.is_available():
        name = torch.cuda.get_device_name(0)
        found.rows.append(Row("torch", f"{torch.__version__}, {name}", "calibrates and measures on the GPU"))
    else:
        found.rows.append(Row("torch", f"{torch.__version__}, no GPU", "calibrates and measures on the processor"))


def _targets(found: Findings) -> None:
    """Say of every row of the target table whether its runtime is here."""
    from export.target import TARGETS

    for name, target in TARGETS.items():
        if target.library:
            found.targets[name] = False
            found.rows.append(Row(f"target {name}", "builds only", library_here(target.library)))
            continue
        if target.page is not None:
            found.targets[name] = False
            found.rows.append(Row(f"target {name}", "builds only", package_here(target.page)))
            continue
        here, why = runtime_here(target.backend)
        found.targets[name] = here
        without = "builds only" if not target.machine_code else "neither builds nor runs"
        found.rows.append(Row(f"target {name}", "builds and runs" if here else without, why))


def library_here(name: str) -> str:
    """Tell the version of a library that builds engines, or what is wrong."""
    from export.errors import EngineError
    from export.to_tensorrt import library, version

    try:
        return version(library(name))
    except EngineError as error:
        return str(error)


def package_here(page: PageOptions) -> str:
    """Tell the version of the package that a page takes its runtime from, or what is missing."""
    from export.errors import EngineError
    from export.to_web import PACKAGE, find_package

    try:
        return f"{PACKAGE} {find_package(page).version}"
    except EngineError as error:
        return str(error)


def runtime_here(backend: str) -> tuple[bool, str]:
    """Say whether a backend's runtime can be imported, and its version or what is wrong."""
    import importlib

    from export.backends import BACKENDS, available

    package = BACKENDS[backend].package
    try:
        module = importlib.import_module(package)
    except ImportError as error:
        return False, f"{error}; run: {BACKENDS[backend].install}"
    except Exception as error:
        return False, f"importing {package} fails: {type(error).__name__}: {error}"
    if not available(backend):
        return False, "there is no NVIDIA GPU here"
    return True, f"{package} {getattr(module, '__version__', '')}".strip()
