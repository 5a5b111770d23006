"""Compiles a launch for an architecture without its GPU, and reads from the machine code what it will cost there."""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from kernels.capability import CAPABILITIES, Format, lacking
from kernels.errors import KernelError
from kernels.language import INSTALLED, INTERPRETED, triton
from kernels.launch import Argument, Launch

_TYPES = {
    torch.float32: "fp32",
    torch.float16: "fp16",
    torch.bfloat16: "bf16",
    torch.float8_e4m3fn: "fp8e4nv",
    torch.float8_e5m2: "fp8e5",
    torch.int8: "i8",
    torch.uint8: "u8",
    torch.int32: "i32",
    torch.int64: "i64",
}
_REGISTER_FILE = 65536
_MOST_REGISTERS = 255
_PRODUCTS = frozenset(name for row in CAPABILITIES.values() for name in row.products.values())
_OPCODE = re.compile(r"^\s+/\*[0-9a-f]+\*/\s+(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9_.]*)", re.MULTILINE)
_WIDE_LOAD = re.compile(r"(LDG|LDGSTS)\b.*\.128\b|UTMALDG|UBLKCP")


@dataclass(frozen=True)
class Case:
    """One kernel in one form whose machine code is looked at.

    Attributes:
        launch: architecture -> what would be launched there, on tensors of the `meta` device.
        products: operand formats whose tensor-core instruction must be in the machine code.
        needs: number formats used otherwise (stored as fp8).
        wide: whether there must be a load of 16 bytes; not where a program reads a few scattered numbers alone.
    """

    launch: Callable[[str], Launch]
    products: tuple[Format, ...] = ()
    needs: tuple[Format, ...] = ()
    wide: bool = True

    def refusal(self, architecture: str) -> str | None:
        """Why this case has no machine code on an architecture; None where it has."""
        return lacking(architecture, (*self.products, *self.needs))


@dataclass(frozen=True)
class MachineCode:
    """What the machine code of one kernel says.

    Attributes:
        registers: per thread.
        shared_memory: per program, bytes.
        spills: instructions that read or write local memory.
        wide_loads: instructions that load 16 bytes a thread, or a whole tile, from global memory.
        products: tensor-core instruction -> how often it occurs.
        warps: of 32 threads, per program.
    """

    registers: int
    shared_memory: int
    spills: int
    wide_loads: int
    products: Mapping[str, int]
    warps: int

    def faults(self, architecture: str, case: Case) -> list[str]:
        """What is wrong with it, one phrase each."""
        row, found = CAPABILITIES[architecture], []
        found += [
            f"no {row.products[kind]} instruction" for kind in case.products if row.products[kind] not in self.products
        ]
        if self.spills:
            found.append(f"{self.spills} instructions on local memory")
        most = min(_MOST_REGISTERS, _REGISTER_FILE // (32 * self.warps))
        if self.registers > most:
            found.append(f"{self.registers} registers a thread, {most} are there")
        if self.shared_memory > row.shared_memory:
            found.append(f"{self.shared_memory} bytes of shared memory, {row.shared_memory} are there")
        if case.wide and not self.wide_loads:
            found.append("no 16-byte load")
        return found


def assemble(launch: Launch, architecture: str) -> MachineCode:
    """Compile a launch as Triton would when it is started on this architecture, and read the machine code.

    Raises:
        KernelError: Triton is absent or interprets, or its compiler refuses the kernel.
    """
    if not INSTALLED or INTERPRETED:
        raise KernelError("machine code needs Triton installed and TRITON_INTERPRET unset")
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    signature, constants, attributes = _specialized(launch)
    source = ASTSource(fn=launch.kernel, signature=signature, constexprs=constants, attrs=attributes)
    options = {
        "num_warps": launch.configuration.warps,
        "num_stages": launch.configuration.stages,
        "enable_fp_fusion": True,
    }
    target = GPUTarget("cuda", int(architecture.removeprefix("sm_")), 32)
    try:
        compiled = triton.compile(source, target=target, options=options)
    except Exception as error:
        cause = " ".join(str(error).split()) or type(error).__name__
        raise KernelError(f"{launch.kernel.__name__} does not compile for {architecture}: {cause}") from error
    listing, usage = _disassemble(compiled.asm["cubin"])
    opcodes = _OPCODE.findall(listing)
    products = Counter(name for name in (code.partition(".")[0] for code in opcodes) if name in _PRODUCTS)
    return MachineCode(
        registers=int(_found(r"REG:(\d+)", usage)),
        shared_memory=int(compiled.metadata.shared),
        spills=sum(code.partition(".")[0] in ("LDL", "STL") for code in opcodes),
        wide_loads=sum(bool(_WIDE_LOAD.match(code)) for code in opcodes),
        products=dict(sorted(products.items())),
        warps=int(compiled.metadata.num_warps),
    )


def _specialized(launch: Launch) -> tuple[dict[str, Any], dict[tuple[int, ...], Any], dict[tuple[int, ...], Any]]:
    """Types, compile-time values and divisibilities of a launch's arguments, by Triton's rules at launch.

    A number that is 1 becomes a compile-time value, and so does None; numbers and addresses are marked where 16
    divides them, without which no load is 16 bytes wide. Values and marks are kept by position: of the parameter and,
    where it is a tuple, of the number in it.
    """
    given: dict[str, Argument] = {**launch.arguments, **launch.configuration.blocks}
    constants: dict[tuple[int, ...], Any] = {}
    attributes: dict[tuple[int, ...], Any] = {}

    def described(value: Any, place: tuple[int, ...], name: str, constant: bool) -> Any:
        is_number = isinstance(value, int) and not isinstance(value, bool)
        if constant or value is None or (is_number and value == 1):
            constants[place] = value
            return "constexpr"
        if isinstance(value, tuple):
            return tuple(described(part, (*place, at), name, False) for at, part in enumerate(value))
        if isinstance(value, float):
            return "fp32"
        if hasattr(value, "block_shape"):
            return f"tensordesc<{_TYPES[value.base.dtype]}[{', '.join(map(str, value.block_shape))}]>"
        if isinstance(value, torch.Tensor):
            kind = "*" + _TYPES[value.dtype]
            divisible = value.storage_offset() * value.element_size() % 16 == 0
        elif is_number:
            kind = "i32" if -(2**31) <= value < 2**31 else "i64"
            divisible = value % 16 == 0
        else:
            raise KernelError(f"{name} of {launch.kernel.__name__} is a {type(value).__name__}, no kernel takes that")
        if divisible:
            attributes[place] = [["tt.divisibility", 16]]
        return kind

    signature = {
        parameter.name: described(given[parameter.name], (parameter.num,), parameter.name, parameter.is_constexpr)
        for parameter in launch.kernel.params
    }
    return signature, constants, attributes


def _disassemble(binary: bytes) -> tuple[str, str]:
    """The instructions of a binary, and what its header says of registers and memory."""
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.cubin"
        path.write_bytes(binary)
        return _told(tool, "-sass", path), _told(tool, "-res-usage", path)


def _told(tool: Path, option: str, path: Path) -> str:
    done = subprocess.run([tool, option, path], capture_output=True, text=True, check=False)
    if done.returncode:
        raise KernelError(f"{tool.name} {option} failed: {' '.join(done.stderr.split())}")
    return done.stdout + done.stderr


def _found(pattern: str, text: str) -> str:
    match = re.search(pattern, text)
    if match is None:
        raise KernelError(f"cuobjdump says nothing that matches {pattern!r}")
    return match.group(1)
