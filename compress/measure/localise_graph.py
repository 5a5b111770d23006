"""Finds the first layer at which a lowered graph departs from the PyTorch module it was exported from."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from compress.errors import PassError
from compress.measure.localise import LayerErrors, Ratio
from compress.report.report import Layer
from export.gates import HALF

if TYPE_CHECKING:
    import onnx
    from torch import nn

_OPERATORS = ("Conv", "MatMul", "Gemm")
_LABEL = ".weight.int8"


def compare_graph(
    module: nn.Module, graph: Path, calls: Sequence[Mapping[str, np.ndarray]], prefix: str = ""
) -> LayerErrors | None:
    """Compare every quantized layer of a lowered graph with the same layer of a fake-quantized module.

    The graph is run node by node, without the fusions of a runtime, with the output of every quantized layer added
    to its outputs. Both run by themselves from the same inputs, so errors are cumulative: the layer to look at is
    `largest_drop()`.

    Args:
        module: a segment or a part, with `inputs` naming its arguments, and its layers fake-quantized.
        graph: as lowered from it, its weights beside it.
        calls: inputs of a few calls.
        prefix: put before the names of the layers.

    Returns:
        The layers in the order of the graph; None where it has no quantized layer.

    Raises:
        PassError: the module has none of the graph's quantized layers.
    """
    import onnx

    model = onnx.load(graph)
    taps = quantized_outputs(model)
    if not taps:
        return None
    layers = _modules(module, list(taps))
    if not layers:
        raise PassError(f"{graph.name} and its module have no quantized layer in common")
    ratios = {name: Ratio() for name in layers}
    session = _tapped(model, {name: taps[name] for name in layers})
    for call in calls:
        expected = _torch_outputs(module, layers, call)
        wanted = [tensor for name in expected for tensor in taps[name]]
        found = dict(zip(wanted, session.run(wanted, {key: call[key] for key in _inputs(session)}), strict=True))
        for name, output in expected.items():
            ratios[name].add(output, np.concatenate([found[tensor] for tensor in taps[name]], axis=-1))
    order = [name for name in taps if name in layers]
    return LayerErrors(
        tuple(
            Layer(name=prefix + name, local_db=ratios[name].db(), cumulative_db=ratios[name].db())
            for name in order
            if ratios[name].seen
        )
    )


def quantized_outputs(model: onnx.ModelProto) -> dict[str, tuple[str, ...]]:
    """Quantized layer -> the tensors of the graph that are its output, in the order of execution.

    The lowering names the int8 weight of a layer after it; a bias added by a node of its own belongs to the layer. The
    layer before a gate has two outputs, the halves of its columns.
    """
    constants = {tensor.name for tensor in model.graph.initializer}
    readers: dict[str, list[Any]] = {}
    for node in model.graph.node:
        for tensor in node.input:
            readers.setdefault(tensor, []).append(node)
    found: dict[str, tuple[str, ...]] = {}
    for node in model.graph.node:
        if node.op_type not in _OPERATORS or _LABEL not in node.input[1]:
            continue
        output = node.output[0]
        after = readers.get(output, [])
        if len(after) == 1 and after[0].op_type == "Add" and node.op_type == "MatMul":
            other = [tensor for tensor in after[0].input if tensor != output]
            if other and other[0] in constants:
                output = after[0].output[0]
        layer, _, rest = node.input[1].partition(_LABEL)
        if layer not in found:
            found[layer] = (output,)
        elif HALF in rest and len(found[layer]) == 1:
            found[layer] = (*found[layer], output)
    return found


def _tapped(model: onnx.ModelProto, taps: Mapping[str, Sequence[str]]) -> Any:
    """A session of the graph, not optimised, that also gives the tapped tensors."""
    import onnx
    import onnxruntime

    present = {output.name for output in model.graph.output}
    model.graph.output.extend(
        onnx.helper.make_tensor_value_info(tensor, onnx.TensorProto.FLOAT, None)
        for tensor in dict.fromkeys(tensor for tensors in taps.values() for tensor in tensors)
        if tensor not in present
    )
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.log_severity_level = 3
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "tapped.onnx"
        onnx.save_model(model, path, save_as_external_data=True, location="tapped.bin", size_threshold=1024)
        return onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])


def _inputs(session: Any) -> list[str]:
    return [tensor.name for tensor in session.get_inputs()]


def _modules(module: nn.Module, names: Sequence[str]) -> dict[str, nn.Module]:
    """Layers by the name the quantization plan has for them, wherever the module keeps its component."""
    found = {}
    every = dict(module.named_modules())
    for name in names:
        path = next((path for path in every if path == name or path.endswith(f".{name}")), None)
        if path is not None:
            found[name] = every[path]
    return found


def _torch_outputs(
    module: Any, layers: Mapping[str, nn.Module], call: Mapping[str, np.ndarray]
) -> dict[str, np.ndarray]:
    """What the layers give in one call; only the first time a layer runs."""
    import torch

    outputs: dict[str, np.ndarray] = {}

    def keep(name: str) -> Any:
        def hook(layer: nn.Module, args: Any, output: Any) -> None:
            outputs.setdefault(name, output.detach().numpy())

        return hook

    hooks = [layer.register_forward_hook(keep(name)) for name, layer in layers.items()]
    try:
        with torch.inference_mode():
            module(**{key: torch.from_numpy(np.array(call[key])) for key in module.inputs})
    finally:
        for hook in hooks:
            hook.remove()
    return outputs
