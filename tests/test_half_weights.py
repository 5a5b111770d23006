"""Weights that are float16 in memory: they compute as float32, and are exported without ever being it."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from export.backends import backend
from export.errors import ExportError
from export.half_weights import HalfWeight, halve
from export.to_onnx import export_module
from export.weights import PoolWriter, write_graph


class Net(nn.Module):
    """A convolution, and linear layers that an exporter transposes; of a square one that shows in no shape."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(64, 64, 3, padding=1)
        self.narrow = nn.Linear(64, 256, bias=False)
        self.square = nn.Linear(256, 256)

    def forward(self, x: Tensor) -> Tensor:
        return self.square(self.narrow(self.conv(x).flatten(2).transpose(1, 2)).relu())


AXES = {"x": {0: "batch"}}


def inputs(batch: int) -> dict[str, Tensor]:
    return {"x": torch.randn(batch, 64, 3, 3, generator=torch.Generator().manual_seed(0))}


def net() -> Net:
    torch.manual_seed(0)
    return Net().eval().requires_grad_(False)


def test_half_weights_compute_as_their_values_do_in_float32() -> None:
    halved, rounded = net(), net()
    halve(halved)
    for parameter in rounded.parameters():
        if parameter.ndim > 1:
            parameter.copy_(parameter.half())
    assert isinstance(halved.square.weight, HalfWeight)
    assert not isinstance(halved.square.bias, HalfWeight)
    assert torch.equal(halved(**inputs(2)), rounded(**inputs(2)))


def test_half_weights_are_written_once_and_run(tmp_path: Path) -> None:
    module = net()
    halve(module)
    with PoolWriter(tmp_path) as pool:
        graph = export_module(module, inputs(2), AXES, ["y"], inputs(1), pool=pool)
    write_graph(graph, tmp_path / "graph.onnx")
    weights = sum(parameter.numel() for parameter in module.parameters() if parameter.ndim > 1)
    assert 2 * weights <= pool.bytes < 2.1 * weights
    assert isinstance(module.square.weight, HalfWeight)
    wanted = module(**inputs(1)).numpy()
    got = backend("onnxruntime").load(tmp_path / "graph.onnx", 1, {})({"x": inputs(1)["x"].numpy()})["y"]
    np.testing.assert_allclose(got, wanted, atol=1e-5 * np.abs(wanted).max())


def test_half_weights_without_a_pool_are_refused() -> None:
    module = net()
    halve(module)
    with pytest.raises(ExportError, match="pool"):
        export_module(module, inputs(2), AXES, ["y"], inputs(1))
