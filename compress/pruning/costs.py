"""What a network and the units of its axes cost: parameters, and multiply-accumulates on inputs of one size."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from compress.pruning.axis import Axis, DepthAxis, Network

Run = Callable[[], object]
"""Runs the network once on one sample."""

_QUERIES, _KEYS = ("to_q", "add_q_proj"), ("to_k", "add_k_proj")


@dataclass(frozen=True)
class Costs:
    """Of one network, until it is cut.

    Attributes:
        network: itself.
        parameters: how many numbers the part that counts holds.
        macs: multiply-accumulates of its convolutions, linear layers and attention.
        positions: path of a linear or convolution layer -> at how many places each number of its weight is used.
        products: path of an attention -> multiply-accumulates of its two products.
    """

    network: Network
    parameters: int
    macs: int
    positions: Mapping[str, int]
    products: Mapping[str, int]

    def parameters_of(self, axis: Axis) -> Tensor:
        """Of each unit, float64 (units,)."""
        return axis.scores({path: torch.ones(()).expand(p.shape) for path, p in self.network.named_parameters()})

    def macs_of(self, axis: Axis) -> Tensor:
        """Of each unit, float64 (units,)."""
        elements = {}
        for path, parameter in self.network.named_parameters():
            layer, _, name = path.rpartition(".")
            each = self.positions.get(layer, 0) if name == "weight" else 0
            elements[path] = torch.tensor(float(each)).expand(parameter.shape)
        return axis.scores(elements) + self._products_of(axis)

    def _products_of(self, axis: Axis) -> Tensor:
        if isinstance(axis, DepthAxis):
            inside = [tuple(f"{path}." for path in unit) for unit in axis.units]
            sums = [sum(n for path, n in self.products.items() if path.startswith(unit)) for unit in inside]
            return torch.tensor(sums, dtype=torch.float64)
        own = self.products.get(axis.module, 0) if axis.kind == "heads" else 0
        return torch.full((axis.size,), own / axis.size, dtype=torch.float64)


def costs_of(network: Network, run: Run, within: str = "") -> Costs:
    """Price a network from shapes alone; nothing is computed.

    Args:
        network: on any device.
        run: calls it on one sample.
        within: the path of the part that counts.
    """
    positions: dict[str, int] = {}
    handles = []

    def watch(path: str) -> Any:
        def hook(layer: nn.Module, _: Any, output: Tensor) -> None:
            channels = output.shape[1] if isinstance(layer, nn.Conv2d) else output.shape[-1]
            positions[path] = positions.get(path, 0) + output.numel() // channels

        return hook

    layers = {name: module for name, module in network.named_modules() if isinstance(module, nn.Linear | nn.Conv2d)}
    try:
        handles = [module.register_forward_hook(watch(path)) for path, module in layers.items()]
        with torch.no_grad(), FakeTensorMode(allow_non_fake_inputs=True):
            run()
    finally:
        for handle in handles:
            handle.remove()
    products = _products(network, positions)
    own = {path: n for path, n in positions.items() if path.startswith(within)}
    macs = sum(network.get_submodule(path).weight.numel() * n for path, n in own.items())
    macs += sum(n for path, n in products.items() if path.startswith(within))
    parameters = sum(p.numel() for path, p in network.named_parameters() if path.startswith(within))
    return Costs(network, parameters, macs, positions, products)


def _products(network: Network, positions: Mapping[str, int]) -> dict[str, int]:
    """Queries times keys, and their softmax times values, of every attention that ran."""
    found = {}
    for path, module in network.named_modules():
        if hasattr(module, "to_q") and f"{path}.to_q" in positions:
            queries, keys = (sum(positions.get(f"{path}.{name}", 0) for name in names) for names in (_QUERIES, _KEYS))
            found[path] = 2 * queries * keys * int(module.to_q.out_features)
    return found
