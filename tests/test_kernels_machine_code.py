"""The machine code of every kernel: tensor-core instructions, no spills, wide loads; and that each gate can close."""

from __future__ import annotations

import importlib
import importlib.util
import json
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch

from kernels import matrix, probe
from kernels.capability import ARCHITECTURES, CAPABILITIES
from kernels.errors import KernelError
from kernels.launch import Configuration, Launch
from kernels.machine_code import Case, MachineCode, assemble

CASES = matrix.cases()
CONSTRAINTS = Path(__file__).parents[1] / "constraints.txt"
INSTALLED = importlib.util.find_spec("triton") is not None
compiles = pytest.mark.skipif(not INSTALLED, reason="Triton is not installed")


def turns() -> list[tuple[str, str]]:
    """Every case on one architecture that it has machine code for, each on another by turns."""
    chosen = []
    for at, (name, case) in enumerate(CASES.items()):
        able = [architecture for architecture in ARCHITECTURES if case.refusal(architecture) is None]
        chosen.append((name, able[at % len(able)]))
    return chosen


@compiles
@pytest.mark.parametrize(("name", "architecture"), turns())
def test_machine_code_is_without_fault(name: str, architecture: str) -> None:
    row = matrix.look(name, CASES[name], architecture)
    assert row.code is not None
    assert not row.faults, str(row)


@compiles
def test_every_kernel_is_among_the_cases() -> None:
    """A name with an underscore is launched; the others are called by kernels."""
    looked_at = {case.launch("sm_90").kernel.__name__ for case in CASES.values()}
    for path in matrix.FOLDER.glob("*.py"):
        module = importlib.import_module(f"kernels.{path.stem}")
        if module is not probe:
            made = {name for name, value in vars(module).items() if type(value).__name__ == "JITFunction"}
            assert {name for name in made if name.startswith("_")} <= looked_at


def cast_launch(length: int, warps: int, offset: int = 0) -> Launch:
    """A kernel that keeps `length` values in registers."""
    values, wide = (torch.empty(length + offset, device="meta")[offset:] for _ in range(2))
    narrow = torch.empty(length, dtype=torch.float16, device="meta")
    arguments = {"values": values, "narrow": narrow, "wide": wide, "LENGTH": length}
    return Launch(probe._cast, (1,), arguments, Configuration(warps))


@compiles
def test_faults_are_found_in_real_machine_code() -> None:
    def faults(launch: Launch, **case: object) -> str:
        return "; ".join(assemble(launch, "sm_90").faults("sm_90", Case(lambda _: launch, **case)))  # type: ignore[arg-type]

    assert faults(cast_launch(1024, 4)) == ""
    assert "local memory" in faults(cast_launch(32768, 1))
    assert "no 16-byte load" in faults(cast_launch(1024, 4, offset=1))
    assert faults(cast_launch(1024, 4, offset=1), wide=False) == ""
    assert "no HGMMA instruction" in faults(cast_launch(1024, 4), products=("float",))


def test_limits_are_those_of_the_architecture() -> None:
    code = MachineCode(registers=160, shared_memory=120_000, spills=0, wide_loads=1, products={}, warps=8)
    case = Case(lambda _: cast_launch(1, 1))
    assert code.faults("sm_90", case) == []
    assert "bytes of shared memory, 101376 are there" in "; ".join(code.faults("sm_89", case))
    assert "160 registers a thread, 128 are there" in "; ".join(replace(code, warps=16).faults("sm_90", case))


def test_a_grid_that_no_gpu_takes_is_refused() -> None:
    launch = cast_launch(16, 1)
    assert replace(launch, grid=(70_000, 65_535)).grid == (70_000, 65_535)
    with pytest.raises(KernelError, match="longer than 65535"):
        replace(launch, grid=(1, 65_536))


def test_what_an_architecture_lacks_is_refused_with_the_reason() -> None:
    integer, small = Case(lambda _: cast_launch(1, 1), ("int8",)), Case(lambda _: cast_launch(1, 1), needs=("fp8",))
    assert [name for name in ARCHITECTURES if integer.refusal(name)] == ["sm_100"]
    assert str(integer.refusal("sm_100")).endswith("use fp8")
    assert [name for name in ARCHITECTURES if small.refusal(name)] == ["sm_80", "sm_86"]
    assert matrix.look("small", small, "sm_80").code is None


@compiles
def test_what_does_not_compile_is_said_in_one_sentence() -> None:
    launch = cast_launch(1000, 4)
    with pytest.raises(KernelError, match=r"_cast does not compile for sm_90: .*power of 2") as caught:
        assemble(launch, "sm_90")
    assert "\n" not in str(caught.value)


def test_the_table_is_that_of_all_kernels() -> None:
    """Names alone are compared: `make kernels` writes both files anew."""
    record = json.loads(matrix.RECORD.read_text())
    rows = record["rows"]
    assert f"triton=={record['triton']}" in CONSTRAINTS.read_text().splitlines(), "assembled by another Triton"
    assert [(row["case"], row["architecture"]) for row in rows] == [
        (name, architecture) for name in CASES for architecture in ARCHITECTURES
    ]
    assert not [row for row in rows if row["faults"]]
    made = [matrix.Row(**{**row, "code": None if row["code"] is None else MachineCode(**row["code"])}) for row in rows]
    assert [asdict(row) for row in made] == [{**row, "faults": row["faults"]} for row in rows]
    assert matrix.as_table(made, record["date"], record["triton"]) == matrix.TABLE.read_text()
    assert set(ARCHITECTURES) == set(CAPABILITIES)
