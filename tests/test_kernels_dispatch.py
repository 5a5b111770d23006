"""Which implementation a call gets and what it is told, the interpreter's cure, and files that need no Triton."""

from __future__ import annotations

import json
import logging
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch

from kernels import dispatch
from kernels.capability import architecture_of
from kernels.errors import KernelError
from kernels.heads import score_count
from kernels.interpreter import VERSIONS
from tests.interpreted import InterpretedError, Interpreter

ROOT = Path(__file__).parent.parent
CPU = torch.device("cpu")


def on(monkeypatch: pytest.MonkeyPatch, architecture: str) -> None:
    """Let the machine have a GPU, as far as the choice is concerned."""
    monkeypatch.setattr(dispatch, "_architecture", lambda device: (architecture, None))


def test_the_vendor_is_taken_where_its_library_is_faster(monkeypatch: pytest.MonkeyPatch) -> None:
    on(monkeypatch, "sm_90")
    choice = dispatch.choose("attention", CPU, torch.bfloat16, (1, 2), vendor=True)
    assert choice.implementation == "vendor"
    assert "cuDNN" in choice.reason
    assert dispatch.choose("attention", CPU, torch.bfloat16, (1, 2)).implementation == "triton"
    assert (
        dispatch.choose("attention", CPU, torch.bfloat16, (1, 2), vendor=True, mode="triton").implementation == "triton"
    )
    on(monkeypatch, "sm_89")
    assert dispatch.choose("attention", CPU, torch.bfloat16, (1, 2), vendor=True).implementation == "triton"


def test_the_vendor_is_taken_while_there_is_little_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    on(monkeypatch, "sm_90")
    taken = {}
    for shape in ((1, 24, 4608, 128), (2, 24, 4250, 64), (1, 24, 17550, 128)):
        query = torch.empty(shape, dtype=torch.bfloat16, device="meta")
        choice = dispatch.choose(
            "attention_fp8", CPU, query.dtype, shape, needs=("fp8",), vendor=True, work=score_count(query, query)
        )
        taken[shape[2]] = choice.implementation
    assert taken == {4608: "vendor", 4250: "triton", 17550: "triton"}
    assert dispatch.choose("attention_fp8", CPU, torch.bfloat16, shape, work=1).implementation == "triton"


def test_what_the_architecture_lacks_goes_to_the_reference(monkeypatch: pytest.MonkeyPatch) -> None:
    on(monkeypatch, "sm_100")
    choice = dispatch.choose("gemm", CPU, torch.int8, (1, 2), needs=("int8",))
    assert (choice.implementation, choice.architecture) == ("reference", "sm_100")
    with pytest.raises(KernelError, match=r"sm_100 has no int8 tensor-core instruction .*; use fp8"):
        dispatch.choose("gemm", CPU, torch.int8, (1, 2), needs=("int8",), mode="triton")
    with pytest.raises(KernelError, match="the rows are odd"):
        dispatch.choose("gemm", CPU, torch.float16, (1, 2), unfit="the rows are odd", mode="triton")


def test_what_a_gpu_cannot_run_goes_to_the_vendor_if_it_can(monkeypatch: pytest.MonkeyPatch) -> None:
    on(monkeypatch, "sm_100")
    for device, implementation in ((torch.device("cuda"), "vendor"), (CPU, "reference")):
        choice = dispatch.choose("gemm", device, torch.int8, (1, 2), needs=("int8",), vendor=True)
        assert choice.implementation == implementation
        assert "no int8" in choice.reason


def test_the_environment_holds_the_mode(monkeypatch: pytest.MonkeyPatch) -> None:
    on(monkeypatch, "sm_80")
    monkeypatch.setenv(dispatch.VARIABLE, "reference")
    assert dispatch.choose("gemm", CPU, torch.float16, (1, 2)).implementation == "reference"
    assert dispatch.choose("gemm", CPU, torch.float16, (1, 2), mode="auto").implementation == "triton"
    monkeypatch.setenv(dispatch.VARIABLE, "cuda")
    with pytest.raises(KernelError, match="LATENT_KERNELS must be one of auto, reference, triton, not 'cuda'"):
        dispatch.choose("gemm", CPU, torch.float16, (1, 2))


def test_without_a_gpu_plain_torch_runs(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.DEBUG, "kernels"):
        choices = [dispatch.choose("once", CPU, torch.float16, (3, 5)) for _ in range(3)]
    assert {choice.implementation for choice in choices} == {"reference"}
    assert [record.getMessage() for record in caplog.records] == [
        f"once torch.float16 (3, 5) on cpu: reference, because {choices[0].reason}"
    ]
    with pytest.raises(KernelError, match="cannot run"):
        dispatch.choose("once", CPU, torch.float16, (3, 5), mode="triton")
    assert dispatch.choose("once", torch.device("meta"), torch.float16, (3, 5)).implementation == "reference"


def test_later_minor_versions_take_the_row_before() -> None:
    known = {(8, 0): "sm_80", (8, 7): "sm_86", (8, 9): "sm_89", (9, 0): "sm_90", (10, 3): "sm_100", (12, 1): "sm_120"}
    assert {version: architecture_of(*version) for version in known} == known
    assert architecture_of(7, 5) is None
    assert architecture_of(11, 0) is None


def version(op: ModuleType) -> str:
    """Reaching the worker at all means that the cure was checked."""
    return str(op.triton.__version__)


def test_the_cured_interpreter_casts_as_torch_does(interpreter: Interpreter) -> None:
    assert interpreter.run(version, "interpreter") in VERSIONS


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("    interpreter._convert_float = convert\n", ""),
        ("builder.create_splat = cast, dot, splat", "builder.create_splat = stock_cast, dot, splat"),
        ("builder.create_splat = cast, dot, splat", "builder.create_splat = cast, stock_dot, splat"),
        ("builder.create_splat = cast, dot, splat", "builder.create_splat = cast, dot, stock_splat"),
        ("wide = wide.clamp(-limit, limit)", "wide = wide.clamp(-1.0, 1.0)"),
        ('VERSIONS = ("3.7.1", "3.9.0")', 'VERSIONS = ("3.8.0",)'),
    ],
)
def test_a_wrong_cast_or_version_is_noticed(interpreter: Interpreter, old: str, new: str) -> None:
    assert interpreter.sees("interpreter", old, new, cured, above=0.0)


def cured(op: ModuleType) -> float:
    """Apply the cure anew over the stock interpreter, and check it."""
    import importlib

    from triton.runtime import interpreter

    kept = dict(vars(interpreter))
    importlib.reload(interpreter)
    try:
        op.cure()
    finally:
        vars(interpreter).update(kept)
    return 0.0


def test_an_exception_and_a_write_outside_are_reported(interpreter: Interpreter) -> None:
    with pytest.raises(InterpretedError, match="ZeroDivisionError"):
        interpreter.run(divide, "probe")
    for side in ("wide", "values"):
        with pytest.raises(InterpretedError, match="outside of its tensors"):
            interpreter.run(go_outside, "probe", side=side)
    with pytest.raises(InterpretedError, match="wrote outside an allocation of 64 bytes"):
        interpreter.run(write_past, "probe")
    with pytest.raises(InterpretedError, match="exit code 3"):
        interpreter.run(leave, "probe")
    assert interpreter.run(poison, "probe") == [True, True]


def divide(op: ModuleType) -> float:
    return 1 / 0


def go_outside(op: ModuleType, side: str) -> None:
    launch, _, _ = op.cast_launch(torch.ones(64), torch.float16)
    arguments = {**launch.arguments, side: torch.empty(64)[:63]}
    op.Launch(launch.kernel, (1,), arguments, launch.configuration).run()


def write_past(op: ModuleType) -> None:
    made = torch.empty(16)
    torch.as_strided(made, (1,), (1,), made.storage_offset() + 16).zero_()


def leave(op: ModuleType) -> None:
    import os

    os._exit(3)


def poison(op: ModuleType) -> list[bool]:
    made = torch.empty(3, 5), torch.empty_like(torch.ones(4, dtype=torch.float8_e4m3fn))
    return [bool(tensor.float().isnan().all()) for tensor in made]


def test_every_file_is_imported_without_triton() -> None:
    names = sorted(f"kernels.{path.stem}" for path in (ROOT / "kernels").glob("*.py"))
    code = f"import importlib, json, sys; sys.modules['triton'] = None; [importlib.import_module(n) for n in {names}]; "
    code += "from kernels.matrix import cases; print(json.dumps(list(cases())))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "denoise-step-fp16" in json.loads(done.stdout)
