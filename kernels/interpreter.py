"""Cures Triton's interpreter of wrong low-precision arithmetic, so that what it computes is what a GPU computes."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from kernels.errors import KernelError
from kernels.language import INTERPRETED, tl, triton

VERSIONS = ("3.7.1", "3.9.0")
"""The versions of Triton whose internals are replaced: that of PyTorch 2.13, and the newest."""


def cure() -> None:
    """Replace what the interpreter does wrong, products and casts of bf16 and 8-bit floats, then check them.

    Triton's interpreter truncates float32 to bf16 where a GPU rounds to the nearest even, is off in some casts
    to 8-bit floats, multiplies bf16 operands as if their bits were integers, and makes integers of the truth of a
    number when a mask is combined with it. Casts to 8-bit floats saturate, as
    the GPU's instruction does. Arithmetic other than products on bf16 and 8-bit blocks stays wrong: kernels
    compute in float32.

    Raises:
        KernelError: kernels are not interpreted, Triton has another version, or a cast or product still differs
            from torch's.
    """
    if not INTERPRETED:
        raise KernelError("nothing is interpreted: set TRITON_INTERPRET=1 before the first import of a kernel")
    if triton.__version__ not in VERSIONS:
        known = " and ".join(VERSIONS)
        raise KernelError(f"the interpreters of Triton {known} can be cured, not {triton.__version__}'s; install one")
    from triton.runtime import interpreter

    torch_types = {
        tl.bfloat16: torch.bfloat16,
        tl.float8e4nv: torch.float8_e4m3fn,
        tl.float8e5: torch.float8_e5m2,
    }
    builder = interpreter.InterpreterBuilder
    handle = interpreter.TensorHandle
    stock_cast, stock_dot, stock_splat = builder.cast_impl, builder.create_dot, builder.create_splat
    stock_convert = interpreter._convert_float

    def widened(data: np.ndarray, dtype: Any) -> np.ndarray:
        """Values of any type as float32."""
        if dtype not in torch_types:
            return data.astype(np.float32)
        bits = torch.from_numpy(np.ascontiguousarray(data).view(f"i{data.itemsize}"))
        return bits.view(torch_types[dtype]).float().numpy()

    def narrowed(values: np.ndarray, dtype: Any) -> np.ndarray:
        """float32 values as the bits of a low-precision type, rounded to the nearest even."""
        kind = torch_types[dtype]
        wide = torch.from_numpy(np.ascontiguousarray(values, np.float32))
        if kind.itemsize == 1:
            limit = torch.finfo(kind).max
            wide = wide.clamp(-limit, limit)
        bits: np.ndarray = wide.to(kind).view(torch.uint8 if kind.itemsize == 1 else torch.int16).numpy()
        return bits.view(f"u{kind.itemsize}")

    def convert(data: np.ndarray, source: Any, target: Any, rounding: Any) -> np.ndarray:
        if target in torch_types:
            return narrowed(widened(data, source), target)
        if source in torch_types:
            wide = widened(data, source)
            return wide if target == tl.float32 else stock_convert(wide, tl.float32, target, rounding)
        converted: np.ndarray = stock_convert(data, source, target, rounding)
        return converted

    def cast(self: Any, source: Any, target: Any) -> Any:
        if source.dtype.scalar in torch_types or target.scalar in torch_types:
            wide = widened(source.data, source.dtype.scalar)
            if target.scalar in torch_types:
                return handle(narrowed(wide, target.scalar), target.scalar)
            return handle(wide.astype(interpreter._get_np_dtype(target)), target.scalar)
        return stock_cast(self, source, target)

    def dot(self: Any, a: Any, b: Any, c: Any, precision: Any, imprecise: Any) -> Any:
        kinds = a.dtype.scalar, b.dtype.scalar
        if torch_types.keys() & set(kinds):
            product = np.matmul(widened(a.data, kinds[0]), widened(b.data, kinds[1]))
            return handle(product + c.data, c.dtype.scalar)
        return stock_dot(self, a, b, c, precision, imprecise)

    def splat(self: Any, kind: Any, scalar: Any) -> Any:
        if scalar.data.dtype == np.bool_:
            return handle(np.full(kind.shape, scalar.data), tl.int1)
        return stock_splat(self, kind, scalar)

    interpreter._convert_float = convert
    builder.cast_impl, builder.create_dot, builder.create_splat = cast, dot, splat
    _check()


def _check() -> None:
    """Compare casts with torch's on values of all sizes, ties and subnormals among them, and products and masks.

    Raises:
        KernelError: one of them differs.
    """
    from kernels.probe import cast_launch, product_launch

    random = torch.Generator().manual_seed(0)
    exponents = torch.randint(-20, 9, (4096,), generator=random)
    values = torch.randn(4096, generator=random) * 2.0**exponents
    values[:512] = values[:512].bfloat16().float() * (1 + 2.0**-8)  # ties of bf16
    values[512:520] = torch.tensor([0.0, -0.0, 1.0, -1.0, 2.0**-9, 2.0**-10, 3 * 2.0**-10, 2.0**-16])
    for kind in (torch.bfloat16, torch.float8_e4m3fn, torch.float8_e5m2, torch.float16):
        limit = torch.finfo(kind).max
        whole = [torch.arange(-128, 128, dtype=torch.int8)] if kind.itemsize > 1 else []  # none becomes an 8-bit float
        for given in (values.clamp(-limit, limit), *whole):
            launch, narrow, wide = cast_launch(given, kind)
            launch.run()
            expected = given.to(kind).float()
            if not torch.equal(narrow.float(), expected) or not torch.equal(wide, expected):
                raise KernelError(f"the interpreter's cast of {given.dtype} to {kind} differs from torch's")
        a, b = (torch.randn(16, 16, generator=random).to(kind) for _ in range(2))
        launch, product = product_launch(a, b, columns=11)
        launch.run()
        expected = (a.float() @ b.float()).where(torch.arange(16) < 11, 0.0)
        if not torch.allclose(product, expected, rtol=1e-5, atol=1e-5):
            raise KernelError(f"the interpreter's product of {kind} matrices differs from torch's")
