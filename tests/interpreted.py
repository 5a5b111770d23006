"""Runs functions of tests in a process of their own, where kernels are interpreted on guarded memory."""

from __future__ import annotations

import contextlib
import importlib.util
import json
import os
import subprocess
import sys
import tempfile
import traceback
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import torch
from torch.overrides import TorchFunctionMode

ROOT = Path(__file__).parent.parent
_BAND = 1024  # bytes on both sides of an allocation
_POISON = 0xFF  # makes every float NaN, fp8 too


class InterpretedError(RuntimeError):
    """A function failed in the worker, or took it down."""


def relative_error(got: torch.Tensor, truth: torch.Tensor) -> float:
    """`||got - truth|| / ||truth||` in float64; infinite where anything is not finite."""
    difference = (got.double() - truth.double()).norm() / truth.double().norm()
    return float(difference) if torch.isfinite(difference) else float("inf")


def largest_error(got: torch.Tensor, truth: torch.Tensor) -> float:
    """`max|got - truth| / max|truth|` in float64; infinite where anything is not finite."""
    difference = (got.double() - truth.double()).abs().max() / truth.double().abs().max()
    return float(difference) if torch.isfinite(difference) else float("inf")


def guarded(tensor: torch.Tensor) -> torch.Tensor:
    """The same values between bands of NaN, so that a kernel that reads outside of them is noticed."""
    size = tensor.numel() * tensor.element_size()
    buffer = torch.full((size + 2 * _BAND,), _POISON, dtype=torch.uint8)
    inner = buffer[_BAND : _BAND + size].view(tensor.dtype).view(tensor.shape)
    inner.copy_(tensor)
    return inner


class Poisoned(TorchFunctionMode):
    """Fills what `torch.empty` and its kin allocate with NaN, between bands in which every write is noticed."""

    _MAKERS = (torch.empty, torch.empty_like, torch.Tensor.new_empty)

    def __init__(self) -> None:
        super().__init__()
        self._buffers: list[tuple[torch.Tensor, int]] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        if func not in self._MAKERS or not made.is_contiguous() or made.device.type != "cpu":
            return made
        size = made.numel() * made.element_size()
        buffer = torch.full((size + 2 * _BAND,), _POISON, dtype=torch.uint8)
        self._buffers.append((buffer, size))
        return buffer[_BAND : _BAND + size].view(made.dtype).view(made.shape)

    def check(self) -> None:
        """Raise where a band was written to."""
        for buffer, size in self._buffers:
            if not bool((buffer[:_BAND] == _POISON).all() and (buffer[_BAND + size :] == _POISON).all()):
                raise InterpretedError(f"a kernel wrote outside an allocation of {size} bytes")


def watch_addresses() -> None:
    """Let the interpreter raise where a kernel loads or stores outside of the tensors of its launch."""
    from triton.runtime import interpreter

    from kernels.launch import Launch

    builder, run = interpreter.InterpreterBuilder, Launch.run
    load, store = builder.create_masked_load, builder.create_masked_store
    starts, ends = np.zeros(0, np.uint64), np.zeros(0, np.uint64)

    def watched_run(self: Launch) -> None:
        nonlocal starts, ends
        bounds = []
        for tensor in self.tensors():
            if tensor.numel():
                last = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
                bounds.append((tensor.data_ptr(), tensor.data_ptr() + (last + 1) * tensor.element_size()))
        starts, ends = (np.array(part, np.uint64) for part in zip(*sorted(bounds), strict=True))
        run(self)

    def check(what: str, pointers: Any, mask: Any) -> None:
        at = pointers.data[mask.data]
        tensor = np.searchsorted(starts, at, side="right").astype(np.int64) - 1
        size = pointers.dtype.element_ty.primitive_bitwidth // 8
        if (tensor < 0).any() or (at + np.uint64(size) > np.maximum.accumulate(ends)[tensor]).any():
            raise InterpretedError(f"a kernel {what} outside of its tensors")

    def watched_load(self: Any, pointers: Any, mask: Any, *rest: Any, **named: Any) -> Any:
        check("loads", pointers, mask)
        return load(self, pointers, mask, *rest, **named)

    def watched_store(self: Any, pointers: Any, value: Any, mask: Any, *rest: Any, **named: Any) -> Any:
        check("stores", pointers, mask)
        return store(self, pointers, value, mask, *rest, **named)

    Launch.run = watched_run  # type: ignore[method-assign]
    builder.create_masked_load, builder.create_masked_store = watched_load, watched_store


class Interpreter:
    """A worker process with Triton's interpreter, started at the first call."""

    def __init__(self) -> None:
        self._process: subprocess.Popen[str] | None = None

    def run(self, function: Callable[..., Any], operation: str, **arguments: Any) -> Any:
        """Call a function of a test file in the worker.

        Args:
            function: takes the module `kernels.<operation>` first; called by name, so no closure.
            operation: a file in kernels/.
            arguments: what JSON can hold; so the result.

        Raises:
            InterpretedError: it raised, a kernel wrote outside an allocation, or the worker died.
        """
        return self._call(function, operation, (ROOT / "kernels" / f"{operation}.py").read_text(), arguments)

    def sees(
        self, operation: str, old: str, new: str, function: Callable[..., float], above: float, **arguments: Any
    ) -> bool:
        """Whether a comparison fails, or its error is above a bound, once a text in the source is replaced."""
        source = (ROOT / "kernels" / f"{operation}.py").read_text()
        assert source.count(old) == 1, f"{old!r} occurs {source.count(old)} times in {operation}.py"
        try:
            return not self._call(function, operation, source.replace(old, new), arguments) <= above
        except InterpretedError:
            return True

    def close(self) -> None:
        """End the worker."""
        if self._process is not None:
            process, self._process = self._process, None
            with process, contextlib.suppress(BrokenPipeError):
                process.communicate()

    def _call(self, function: Callable[..., Any], operation: str, source: str, arguments: dict[str, Any]) -> Any:
        if self._process is None:
            environment = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
            words = [sys.executable, "-m", "tests.interpreted"]
            pipe = subprocess.PIPE
            self._process = subprocess.Popen(words, cwd=ROOT, env=environment, stdin=pipe, stdout=pipe, text=True)
        stdin, stdout = self._process.stdin, self._process.stdout
        assert stdin is not None
        assert stdout is not None
        call = [Path(function.__code__.co_filename).stem, function.__qualname__, operation, source, arguments]
        try:
            stdin.write(json.dumps(call) + "\n")
            stdin.flush()
            line = stdout.readline()
        except BrokenPipeError:
            line = ""
        if not line:
            code = self._process.wait()
            self.close()
            raise InterpretedError(f"the worker ended with exit code {code}")
        answer = json.loads(line)
        if "error" in answer:
            raise InterpretedError(answer["error"])
        return answer["result"]


def _module(operation: str, source: str, scratch: Path) -> ModuleType:
    """The operation's module; one of its own where the source is not that of the file."""
    path = ROOT / "kernels" / f"{operation}.py"
    if source == path.read_text():
        return importlib.import_module(f"kernels.{operation}")
    folder = Path(tempfile.mkdtemp(dir=scratch))
    broken = folder / path.name
    broken.write_text(source)
    spec = importlib.util.spec_from_file_location(f"broken_{folder.name}_{operation}", broken)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def _serve(scratch: Path) -> None:
    """Answer one call a line, as JSON, until there are no more."""
    from kernels.interpreter import cure

    torch.set_num_threads(1)
    cure()
    watch_addresses()
    answers, sys.stdout = sys.stdout, sys.stderr
    for line in sys.stdin:
        file, name, operation, source, arguments = json.loads(line)
        try:
            function = getattr(importlib.import_module(f"tests.{file}"), name)
            module = _module(operation, source, scratch)
            with Poisoned() as memory:
                result = function(module, **arguments)
            memory.check()
            answer = {"result": result}
        except Exception:
            answer = {"error": traceback.format_exc()}
        answers.write(json.dumps(answer) + "\n")
        answers.flush()


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as scratch:
        _serve(Path(scratch))
