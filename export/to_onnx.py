"""Lowering of a PyTorch module to a float ONNX graph: traced, cleaned, made deterministic, and checked twice."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from export.errors import ExportError
from export.tracing import in_one_line, quietly, require_other_sizes, trace
from export.weights import FILE, Place, PoolWriter, Storage, refer, write_pool

if TYPE_CHECKING:
    import onnx
    from torch import Tensor, nn
    from torch.export import ExportedProgram

OPSET = 20
"""Opset 23 has fused attention, but ONNX Runtime's CPU kernel refuses its broadcast masks; no speed is lost at 20."""

SCOPES = "pkg.torch.onnx.name_scopes"
"""The node metadata kept for the Q/DQ lowering: module names from the outermost inwards, then the node's own."""

TOLERANCE = 1e-4
"""Largest difference allowed between module and graph, relative to the largest absolute value of the output."""

_PROTOBUF_LIMIT = 2**31 - 2**24  # of the weights, which leaves room for the graph


def export_module(
    module: nn.Module,
    example_inputs: Mapping[str, Tensor],
    dynamic_axes: Mapping[str, Mapping[int, str]],
    output_names: Sequence[str],
    check_inputs: Mapping[str, Tensor],
    *,
    name: str = "graph",
    pool: PoolWriter | None = None,
    storage: Storage = "float32",
) -> onnx.ModelProto:
    """Write a module as a float32 ONNX graph that ONNX Runtime computes as PyTorch does.

    Equal modules give equal graphs, byte for byte, in every process. No paths or source lines remain in it.

    Args:
        module: its `forward` takes the inputs by name and returns a tensor or a tuple; set to evaluation mode.
        example_inputs: input name -> tensor, in the order of `forward`; dynamic dimensions are at least 2 here.
        dynamic_axes: input name -> {dimension: axis name}; equal names have equal sizes; other dimensions are fixed.
        output_names: of the tuple.
        check_inputs: the same inputs with another size on every dynamic axis. A graph can be exact at the traced
            size and wrong at others (an absolute position table that was baked in), so this check is not optional.
        name: in errors, and of the graph.
        pool: takes the weights of a large network one by one, so that there is never a second copy of them in memory;
            the graph then refers to them, and belongs beside the pool.
        storage: of the weights in that pool. A module whose weights are float16 already, see `export.half_weights`,
            is written from those without a float32 copy.

    Raises:
        ExportError: the module cannot be traced or lowered, or the graph does not compute the same at both sizes.
    """
    import torch

    from export.half_weights import stand_ins

    require_other_sizes(name, example_inputs, dynamic_axes, check_inputs)
    module.eval()
    with torch.no_grad(), quietly(), stand_ins(module) as halves:
        if halves and pool is None:
            raise ExportError(f"{name} has weights kept as float16, which are written into a pool: give one")
        program = trace(name, module, example_inputs, dynamic_axes)
        _drop_idle_squeezes(program)
        try:
            written = torch.onnx.export(
                program,
                kwargs=dict(example_inputs),
                input_names=list(example_inputs),
                output_names=list(output_names),
                opset_version=OPSET,
                dynamo=True,
                verbose=False,
            )
        except Exception as error:
            raise ExportError(f"{name} cannot be lowered to ONNX: {in_one_line(error)}") from error
        if written is None:
            raise ExportError(f"{name} cannot be lowered to ONNX: the exporter gave no program")
        places = {} if pool is None else _put_weights(written.model, pool, storage, halves)
        model: Any = written.model_proto
        del program, written
    _canonicalise(model, name, dynamic_axes)
    refer(model, places)
    _check(name, module, model, [example_inputs, check_inputs], pool)
    return model


def strip_metadata(model: onnx.ModelProto) -> None:
    """Remove what is left of the exporter's node metadata, in place; the Q/DQ lowering needs it, runtimes do not."""
    del model.metadata_props[:]
    for node in model.graph.node:
        del node.metadata_props[:]


def _drop_idle_squeezes(program: ExportedProgram) -> None:
    """Remove `squeeze` of a dimension that is not 1: nothing in PyTorch, an error in ONNX."""
    import torch

    graph = program.graph_module.graph
    for node in list(graph.nodes):
        if node.target in (torch.ops.aten.squeeze.dim, torch.ops.aten.squeeze.dims):
            source: Any = node.args[0]
            if source.meta["val"].dim() == node.meta["val"].dim():
                node.replace_all_uses_with(source)
                graph.erase_node(node)
    program.graph_module.recompile()


def _canonicalise(model: onnx.ModelProto, name: str, dynamic_axes: Mapping[str, Mapping[int, str]]) -> None:
    """Remove what differs between machines, and give the dynamic dimensions readable names."""
    graph = model.graph
    graph.name = name
    _count_last_axes_from_the_end(graph)
    model.doc_string = graph.doc_string = ""
    del model.metadata_props[:], graph.metadata_props[:], graph.value_info[:]
    for node in graph.node:
        node.doc_string = ""
        kept = [entry for entry in node.metadata_props if entry.key == SCOPES]
        scopes = kept[0].value if kept else None
        del node.metadata_props[:]
        if scopes is not None:
            node.metadata_props.add(key=SCOPES, value=scopes)
    for tensor in graph.initializer:
        tensor.doc_string = ""
        del tensor.metadata_props[:]
    symbols: dict[str, str] = {}
    for value in graph.input:
        for dimension, size in enumerate(value.type.tensor_type.shape.dim):
            axis = dynamic_axes.get(value.name, {}).get(dimension)
            if axis is None and size.HasField("dim_param"):
                raise ExportError(f"{name}: dimension {dimension} of {value.name!r} should be fixed but is not")
            if axis is not None and not size.HasField("dim_param"):
                raise ExportError(f"{name}: the {axis} of {value.name!r} was fixed by the trace")
            if axis is not None:
                symbols.setdefault(size.dim_param, axis)
                size.dim_param = axis
    for value in (*graph.input, *graph.output):
        value.doc_string = ""
        del value.metadata_props[:]
    for value in graph.output:
        for dimension, size in enumerate(value.type.tensor_type.shape.dim):
            if size.HasField("dim_param"):
                size.dim_param = symbols.get(size.dim_param, f"{value.name}_{dimension}")


def _count_last_axes_from_the_end(graph: onnx.GraphProto) -> None:
    """Write the axis of a `Split` along the last one as -1: the ranks, which tell, are forgotten with `value_info`."""
    ranks = {value.name: len(value.type.tensor_type.shape.dim) for value in graph.value_info}
    for node in graph.node:
        for attribute in node.attribute:
            if node.op_type == "Split" and attribute.name == "axis" and attribute.i + 1 == ranks.get(node.input[0]):
                attribute.i = -1


def _put_weights(model: Any, pool: PoolWriter, storage: Storage, halves: Mapping[str, Tensor]) -> dict[str, Place]:
    """Move the large initializers of the exporter's own model into a pool; gives where they lie, by name.

    Those that were traced as stand-ins are taken from `halves`.
    """
    import onnx_ir

    from export.half_weights import values_of

    places = {}
    for name, value in model.graph.initializers.items():
        tensor = value.const_value
        array = tensor.numpy()
        half = values_of(name, array, halves) if halves else None
        place = pool.put_array(array, storage) if half is None else pool.put_half(half)
        if place is not None:
            places[name] = place
            value.const_value = onnx_ir.ExternalTensor(
                FILE, place.offset, place.length, tensor.dtype, shape=tensor.shape, name=name, base_dir=pool.folder
            )
    return places


def _check(
    name: str,
    module: nn.Module,
    model: onnx.ModelProto,
    inputs: Sequence[Mapping[str, Tensor]],
    pool: PoolWriter | None,
) -> None:
    """Compare the graph in ONNX Runtime with the module.

    Raises:
        ExportError: names the output, the sizes and the difference.
    """
    import torch

    with tempfile.TemporaryDirectory() as folder:
        session = _session(name, model, Path(folder), pool)
        for tensors in inputs:
            sizes = ", ".join(f"{key} {tuple(value.shape)}" for key, value in tensors.items())
            try:
                with torch.no_grad():
                    expected = module(**tensors)
            except Exception as error:
                raise ExportError(f"{name} itself fails at {sizes}: {in_one_line(error)}") from error
            expected = expected if isinstance(expected, tuple) else (expected,)
            taken = {value.name for value in session.get_inputs()}
            try:
                computed = session.run(None, {key: v.numpy() for key, v in tensors.items() if key in taken})
            except Exception as error:
                raise ExportError(f"the graph of {name} fails at {sizes}: {in_one_line(error)}") from error
            outputs = [value.name for value in session.get_outputs()]
            if len(outputs) != len(expected):
                raise ExportError(f"{name} gives {len(expected)} tensors, its graph {len(outputs)}")
            for output, wanted, got in zip(outputs, expected, computed, strict=True):
                _compare(f"{output!r} of {name} at {sizes}", wanted.numpy(), got)


def _compare(what: str, wanted: np.ndarray, got: np.ndarray) -> None:
    if wanted.shape != got.shape or wanted.dtype != got.dtype:
        raise ExportError(f"{what}: the graph gives {got.dtype} {got.shape}, the module {wanted.dtype} {wanted.shape}")
    error = float(np.abs(got - wanted).max(initial=0.0))
    limit = TOLERANCE * float(np.abs(wanted).max(initial=0.0))
    if not error <= limit:
        raise ExportError(f"{what}: the graph differs from the module by {error:.2e}, allowed is {limit:.2e}")


def _session(name: str, model: onnx.ModelProto, folder: Path, pool: PoolWriter | None) -> Any:
    import onnxruntime

    settings = onnxruntime.SessionOptions()
    settings.log_severity_level = 3
    source: bytes | str
    if pool is not None:
        pool.flush()
        # As the graph is written, on the weights as they lie in the file: no folded, packed or reordered copies.
        settings.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
        settings.add_session_config_entry("session.disable_prepacking", "1")
        settings.add_session_config_entry("session.model_external_initializers_file_folder_path", str(pool.folder))
        source = model.SerializeToString()
    elif sum(len(tensor.raw_data) for tensor in model.graph.initializer) < _PROTOBUF_LIMIT:
        source = model.SerializeToString()
    else:
        copy = type(model)()
        copy.CopyFrom(model)
        write_pool({"graph": copy}, folder)
        source = str(folder / "graph.onnx")
    try:
        return onnxruntime.InferenceSession(source, settings, providers=["CPUExecutionProvider"])
    except Exception as error:
        raise ExportError(f"ONNX Runtime does not load the graph of {name}: {in_one_line(error)}") from error
