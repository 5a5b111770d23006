"""Calibration: rows and histograms go through a file unchanged, are kept in the store, and are used again."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from compress import calibrate
from compress.errors import PassError
from compress.model.latent_diffusion import load
from compress.passes.base import PassContext
from compress.quantization import statistics
from compress.store import Store
from tests.tiny_engine import SIDE, sampled

PROMPTS = ("a red circle", "large blue square", "a small green triangle")
CONTEXT = PassContext(PROMPTS, seed=0, height=SIDE, width=SIDE, batch=2)
LAYERS = {
    "denoiser": ["conv_in", "down_blocks.0.resnets.0.conv1", "time_embedding.linear_1"],
    "vae_decoder": ["decoder.conv_in"],
}


def test_what_is_read_again_is_what_was_seen(tiny_folder: Callable[[str], Path], tmp_path: Path) -> None:
    model = sampled(load(tiny_folder("unet")), 3)
    inputs: dict[str, list[torch.Tensor]] = {}

    def keep(_: str, name: str, __: torch.nn.Module, x: torch.Tensor, y: torch.Tensor) -> None:
        inputs.setdefault(name, []).append(x.clone())

    seen = calibrate.observe(model, LAYERS, CONTEXT, rows=64)
    with calibrate.watching(model, LAYERS, keep):
        calibrate.run(model.runtime(simulate=False), CONTEXT, "watch")
    assert set(seen) == {(part, name) for part, names in LAYERS.items() for name in names}
    vectors = seen["denoiser", "time_embedding.linear_1"]
    calls = torch.cat([x for x in inputs["time_embedding.linear_1"]])
    assert vectors.rows.dtype == torch.float32
    assert all((calls == row).all(1).any() for row in vectors.rows)
    assert vectors.input.high == max(float(x.max()) for x in inputs["time_embedding.linear_1"])
    assert vectors.input.counts.sum() == sum(x.numel() for x in inputs["time_embedding.linear_1"])
    assert vectors.output is None
    conv = seen["denoiser", "conv_in"]
    assert conv.output is not None
    assert conv.rows.shape[1] == model.denoiser.conv_in.weight[0].numel()
    # Two batches of three calls: a row of the timestep's layer says which call it is from.
    order = vectors.calls_of_rows(3, 2)
    rows = [vectors.rows[order == call].unique(dim=0) for call in range(3)]
    assert [len(own) for own in rows] == [1, 1, 1]
    assert len(torch.cat(rows).unique(dim=0)) == 3


def test_calibration_is_kept_and_used_again(
    tiny_folder: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = sampled(load(tiny_folder("unet")), 3)
    context = replace(CONTEXT, store=Store(tmp_path))
    first = calibrate.observe(model, LAYERS, context)
    ran = []
    monkeypatch.setattr(calibrate, "run", lambda *_: ran.append(1))
    again = calibrate.observe(model, LAYERS, context)
    assert not ran
    for key, one in first.items():
        assert torch.equal(one.rows, again[key].rows)
        assert torch.equal(one.input.counts, again[key].input.counts)
        assert (one.input.low, one.input.high, one.places) == (
            again[key].input.low,
            again[key].input.high,
            again[key].places,
        )
    with pytest.raises(PassError, match="never ran"):
        calibrate.observe(model, LAYERS, replace(context, seed=1))
    assert ran


def test_a_shortened_file_is_noticed(tiny_folder: Callable[[str], Path], tmp_path: Path) -> None:
    model = sampled(load(tiny_folder("unet")), 3)
    with statistics.writing(tmp_path) as file:
        statistics.save(tmp_path, calibrate._watched(model, LAYERS, CONTEXT, 64, {}, file))
    seen = statistics.load(tmp_path)
    whole = (tmp_path / "rows.bin").read_bytes()
    (tmp_path / "rows.bin").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(PassError, match="shorter"):
        [one.rows for one in seen.values()]


def test_memory_does_not_grow_with_rows(tiny_folder: Callable[[str], Path]) -> None:
    model = sampled(load(tiny_folder("unet")), 3)
    seen = calibrate.observe(model, LAYERS, CONTEXT)
    for one in seen.values():
        assert not any(isinstance(value, torch.Tensor) for value in vars(one).values())
        assert not any(
            isinstance(value, list) and value and isinstance(value[0], torch.Tensor) for value in vars(one).values()
        )
