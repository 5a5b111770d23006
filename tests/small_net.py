"""A network with each kind of layer that is quantized, its float graph, and plans of it from calibration."""

from __future__ import annotations

import io
from collections.abc import Callable
from typing import Any

import onnx
import torch
from torch import Tensor, nn

from compress.quantization.layer import Methods, quantized_layer
from compress.quantization.scheme import SCHEMES
from compress.quantization.statistics import Observed, RowFile
from export.quant_plan import QuantPlan
from export.to_onnx import export_module

SHAPE = (2, 8, 6, 6)
ALL: dict[str, Any] = {"smooth": 0.5, "rotate": True, "low_rank": 4, "rounding": "gptq"}
"""Every method at once."""

Plan = Callable[..., QuantPlan]


class Net(nn.Module):
    """A convolution with stride, linear layers on tokens and on vectors, one without a bias, one read twice."""

    def __init__(self, width: int = 32) -> None:
        super().__init__()
        self.conv = nn.Conv2d(8, width, 3, 2, 1)
        self.first = nn.Linear(width, 2 * width)
        self.second = nn.Linear(2 * width, 2 * width, bias=False)
        self.vector = nn.Linear(2 * width, 16)

    def forward(self, x: Tensor) -> Tensor:
        tokens = nn.functional.silu(self.conv(x)).flatten(2).transpose(1, 2)
        tokens = nn.functional.gelu(self.first(tokens))
        tokens = tokens + self.second(tokens)
        return self.vector(tokens.mean(1))


class Whole(nn.Module):
    """A network within another, as parts of models are."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)


def seeded(width: int = 32) -> nn.Module:
    """The network with its random weights."""
    torch.manual_seed(0)
    return Net(width).eval()


def float_graph(net: nn.Module, shape: tuple[int, ...] = SHAPE) -> onnx.ModelProto:
    """Its graph, the batch dynamic; layers are found by the prefix `net.`."""
    given, other = torch.randn(shape), torch.randn(3, *shape[1:])
    return export_module(Whole(net), {"x": given}, {"x": {0: "batch"}}, ["y"], {"x": other})


def planner(net: nn.Module, shape: tuple[int, ...] = SHAPE) -> Plan:
    """Scheme and methods -> a plan for all layers, calibrated on random inputs."""
    layers = {name: layer for name, layer in net.named_modules() if isinstance(layer, nn.Linear | nn.Conv2d)}
    seen = {name: Observed(name, layer, 512, RowFile(io.BytesIO())) for name, layer in layers.items()}
    handles = [
        layer.register_forward_hook(lambda _, args, output, name=name: seen[name].update(args[0], output))
        for name, layer in layers.items()
    ]
    torch.manual_seed(1)
    with torch.no_grad():
        for _ in range(8):
            net(torch.randn(32, *shape[1:]))
    for handle in handles:
        handle.remove()

    def make(scheme: str, **methods: Any) -> QuantPlan:
        row = SCHEMES[scheme]
        done = {name: quantized_layer(layer, row, seen[name], Methods(**methods)) for name, layer in layers.items()}
        found = QuantPlan(done)
        found.validate()
        return QuantPlan.from_json(found.to_json())

    return make
