"""Kernels that do one thing each, cast or multiply, by which the interpreter's arithmetic is judged."""

from __future__ import annotations

import torch

from kernels.language import jit, tl
from kernels.launch import Argument, Configuration, Launch


@jit
def _cast(values: tl.tensor, narrow: tl.tensor, wide: tl.tensor, LENGTH: tl.constexpr) -> None:
    at = tl.arange(0, LENGTH)
    cast = tl.load(values + at).to(narrow.dtype.element_ty)
    tl.store(narrow + at, cast)
    tl.store(wide + at, cast.to(tl.float32))


def cast_launch(values: torch.Tensor, dtype: torch.dtype) -> tuple[Launch, torch.Tensor, torch.Tensor]:
    """Casts values (length,) to a type, and that to float32; the length is a power of two."""
    narrow, wide = torch.empty_like(values, dtype=dtype), torch.empty_like(values, dtype=torch.float32)
    arguments: dict[str, Argument] = {"values": values, "narrow": narrow, "wide": wide, "LENGTH": values.numel()}
    return Launch(_cast, (1,), arguments, Configuration(warps=4)), narrow, wide


@jit
def _product(a: tl.tensor, b: tl.tensor, product: tl.tensor, allowed: tl.tensor, SIZE: tl.constexpr) -> None:
    """One product, stored in the columns below `allowed` if that is above 0."""
    at = tl.arange(0, SIZE)
    square = at[:, None] * SIZE + at[None, :]
    made = tl.dot(tl.load(a + square), tl.load(b + square))
    tl.store(product + square, made, mask=(at[None, :] < allowed) & (tl.load(product) < allowed))


def product_launch(a: torch.Tensor, b: torch.Tensor, columns: int) -> tuple[Launch, torch.Tensor]:
    """Multiplies matrices (size, size), of which the first columns are stored; the size is a power of two."""
    product = a.new_zeros(a.shape, dtype=torch.float32)
    arguments: dict[str, Argument] = {"a": a, "b": b, "product": product, "allowed": columns, "SIZE": len(a)}
    return Launch(_product, (1,), arguments, Configuration(warps=4)), product
