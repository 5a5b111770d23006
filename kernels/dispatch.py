"""Chooses, for one call of an operation, between plain torch, our Triton kernel and the vendor's library."""

from __future__ import annotations

import functools
import logging
import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import torch

from kernels.capability import CAPABILITIES, INTERPRETER, Capability, Format, architecture_of, lacking
from kernels.errors import KernelError
from kernels.language import INSTALLED, INTERPRETED

Mode = Literal["auto", "reference", "triton"]
Implementation = Literal["reference", "triton", "vendor"]

VARIABLE = "LATENT_KERNELS"
"""The environment variable that holds the mode of calls that name none."""

_LOG = logging.getLogger("kernels")


@dataclass(frozen=True)
class Choice:
    """What runs, and why.

    Attributes:
        implementation: plain torch, our kernel, or the vendor's library.
        reason: for people.
        architecture: whose launch configuration a kernel takes; `interpreter` on a CPU.
    """

    implementation: Implementation
    reason: str
    architecture: str


def choose(
    operation: str,
    device: torch.device,
    dtype: torch.dtype,
    shape: Sequence[int],
    *,
    needs: Sequence[Format] = (),
    unfit: str | None = None,
    vendor: bool = False,
    work: int = 0,
    mode: Mode | None = None,
) -> Choice:
    """Choose how one call runs; the choice is logged once, with its reason.

    Args:
        operation: its name, a key of `Capability.vendor` where the vendor has it.
        device: of the tensors.
        dtype: of the main input.
        shape: of the main input.
        needs: number formats that the architecture must have.
        unfit: why this call does not fit the kernel whatever the architecture; None where it does.
        vendor: whether the vendor's library can do this very call.
        work: of this call, in the unit of `Capability.vendor_below`; read where that has the operation.
        mode: `auto` takes the vendor's library where `Capability.vendor` or `vendor_below` says so, else the kernel;
            where a GPU cannot run the kernel, the vendor's library if it can do this call; else plain torch. The
            others insist. None asks the environment variable LATENT_KERNELS, or else is `auto`.

    Raises:
        KernelError: the mode is unknown, or is `triton` where the kernel cannot run.
    """
    wanted = mode or os.environ.get(VARIABLE) or "auto"
    if wanted not in get_args(Mode):
        raise KernelError(f"{VARIABLE} must be one of {', '.join(get_args(Mode))}, not {wanted!r}")
    architecture, obstacle = _architecture(device)
    obstacle = obstacle or unfit or lacking(architecture, needs)
    if wanted == "reference":
        choice = Choice("reference", "plain torch was asked for", architecture)
    elif wanted == "triton":
        if obstacle is not None:
            raise KernelError(f"the Triton kernel of {operation} cannot run: {obstacle}")
        choice = Choice("triton", "the kernel was asked for", architecture)
    elif obstacle is not None:
        choice = Choice("vendor" if vendor and device.type == "cuda" else "reference", obstacle, architecture)
    elif architecture == INTERPRETER:
        choice = Choice("reference", "the interpreter only runs what is asked to be a kernel", architecture)
    elif vendor and (faster := _faster_vendor(CAPABILITIES[architecture], operation, work)) is not None:
        choice = Choice("vendor", faster, architecture)
    else:
        choice = Choice("triton", f"{architecture} runs the kernel", architecture)
    _log(operation, str(device), str(dtype), tuple(shape), choice)
    return choice


def _faster_vendor(row: Capability, operation: str, work: int) -> str | None:
    """Why the vendor's library is faster at this call; None where it is not known to be."""
    below, reason = row.vendor_below.get(operation, (0, ""))
    return reason if work < below else row.vendor.get(operation)


def _architecture(device: torch.device) -> tuple[str, str | None]:
    """The architecture of a device, and why no kernel runs there, if so."""
    if not INSTALLED:
        return INTERPRETER, "Triton is not installed; install the extra `gpu`"
    if device.type == "cpu":
        return INTERPRETER, None if INTERPRETED else "the tensors are on the CPU"
    if device.type != "cuda":
        return INTERPRETER, f"there are no kernels for {device.type} devices"
    major, minor = torch.cuda.get_device_capability(device)
    architecture = architecture_of(major, minor)
    if architecture is None:
        return INTERPRETER, f"compute capability {major}.{minor} is not among {', '.join(CAPABILITIES)}"
    return architecture, None


@functools.lru_cache(maxsize=4096)
def _log(operation: str, device: str, dtype: str, shape: tuple[int, ...], choice: Choice) -> None:
    _LOG.debug("%s %s %s on %s: %s, because %s", operation, dtype, shape, device, choice.implementation, choice.reason)
