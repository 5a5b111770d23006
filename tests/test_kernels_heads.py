"""Tiles of heads: zeros are read outside of a tensor, nothing is written there; and which tensors are read in place."""

from __future__ import annotations

from types import ModuleType

import pytest
import torch

from kernels import heads as tensors
from kernels.heads import aligned, load_tile, store_tile
from kernels.language import jit, tl
from kernels.launch import Configuration, Launch
from tests.heads import BATCH, HEADS, heads
from tests.interpreted import Interpreter

TOKENS, CHANNELS, TILE = 21, 40, (16, 64)


@jit
def _copy(
    source: tl.tensor,
    source_strides: tl.tensor,
    target: tl.tensor,
    target_strides: tl.tensor,
    tiles: tl.tensor,
    tokens: tl.tensor,
    CHANNELS: tl.constexpr,
    BLOCK_TOKENS: tl.constexpr,
    BLOCK_CHANNELS: tl.constexpr,
) -> None:
    first, batch, head = tl.program_id(0) * BLOCK_TOKENS, tl.program_id(1), tl.program_id(2)
    tile = load_tile(source, source_strides, batch, head, first, tokens, CHANNELS, BLOCK_TOKENS, BLOCK_CHANNELS, False)
    store_tile(target, target_strides, tile, batch, head, first, tokens, CHANNELS, BLOCK_TOKENS, BLOCK_CHANNELS, False)
    index = (tl.program_id(0) * tl.num_programs(1) + batch) * tl.num_programs(2) + head
    row, column = tl.arange(0, BLOCK_TOKENS), tl.arange(0, BLOCK_CHANNELS)
    offsets = (index * BLOCK_TOKENS + row[:, None]) * BLOCK_CHANNELS + column[None, :]
    tl.store(tiles + offsets, tile)


def difference(op: ModuleType, layout: str) -> float:
    """The largest difference between a tensor and its copy, and between tiles and what they are to hold."""
    globals().update(load_tile=op.load_tile, store_tile=op.store_tile)
    source = heads(0, TOKENS, CHANNELS, "float16", layout)
    target = torch.empty(BATCH, TOKENS, HEADS, CHANNELS, dtype=source.dtype).transpose(1, 2)
    tiles = torch.empty(2, BATCH, HEADS, *TILE, dtype=source.dtype)
    arguments = {
        "source": source,
        "target": target,
        **op.strides(source=source, target=target),
        "tiles": tiles,
        "tokens": TOKENS,
        "CHANNELS": CHANNELS,
    }
    configuration = Configuration(warps=4, blocks={"BLOCK_TOKENS": TILE[0], "BLOCK_CHANNELS": TILE[1]})
    Launch(_copy, (2, BATCH, HEADS), arguments, configuration).run()
    padded = torch.nn.functional.pad(source.float(), (0, TILE[1] - CHANNELS, 0, 2 * TILE[0] - TOKENS))
    expected = padded.unflatten(2, (2, TILE[0])).movedim(2, 0)
    worst = torch.maximum((tiles.float() - expected).abs().max(), (target - source).abs().max().float())
    return float(worst) if torch.isfinite(worst) else float("inf")


@pytest.mark.parametrize("layout", ["heads", "tokens"])
def test_tiles_are_read_and_written(interpreter: Interpreter, layout: str) -> None:
    assert interpreter.run(difference, "heads", layout=layout) == 0.0


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("(first + row[:, None] < tokens) & (column", "(column"),
        (" & (column[None, :] < CHANNELS)", ""),
        ("first + row[:, None] < tokens", "row[:, None] < tokens"),
        ("batch * tl.cast(strides[0]", "batch * tl.cast(strides[1]"),
        ("head * tl.cast(strides[1]", "head * tl.cast(strides[2]"),
        ("first * tl.cast(strides[2]", "first * tl.cast(strides[1]"),
        ("row[:, None] * strides[2]", "row[:, None] * CHANNELS"),
        ("mask=inside, other=0.0", "mask=inside, other=1.0"),
        ("tile.to(target.dtype.element_ty), mask=inside", "tile.to(target.dtype.element_ty)"),
    ],
)
def test_broken_tiles_are_seen(interpreter: Interpreter, old: str, new: str) -> None:
    assert interpreter.sees("heads", old, new, difference, above=0.0, layout="tokens")


def test_what_can_be_read_16_bytes_at_a_time_is_not_copied() -> None:
    fused = torch.zeros(2, 5, 3, 4, 40, dtype=torch.float16)  # (batch, tokens, query key value, heads, channels)
    for part in fused.unbind(2):
        view = part.transpose(1, 2)
        assert aligned(view) is view
    for odd in (
        torch.zeros(2, 4, 5, 48)[..., 1:41],
        torch.zeros(2, 4, 40, 5).mT,
        torch.zeros(2, 4, 5, 44)[..., :40],
        torch.zeros(1, 4, 5, 40).expand(2, 4, 5, 40),
        torch.zeros(1 + 2 * 4 * 5 * 40)[1:].view(2, 4, 5, 40),
    ):
        copied = aligned(odd)
        assert copied.is_contiguous()
        assert copied.data_ptr() % 16 == 0
        assert torch.equal(copied, odd)
    assert [tensors.power_of_2(count) for count in (1, 16, 17, 64, 80)] == [16, 16, 32, 64, 128]
