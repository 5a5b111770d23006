"""The weight pool: every tensor once, equal bytes for equal models, read by every runtime, never from elsewhere."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from export.backends import BACKENDS, backend, holds_machine_code
from export.errors import EngineError
from export.weights import FILE, INLINE_BYTES, PoolWriter, store_float16, write_pool

WIDTH = 64
OF_ONNX = [name for name in BACKENDS if not holds_machine_code(name)]


def weight(seed: int) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal((WIDTH, WIDTH)).astype(np.float32)


def linear(*weights: np.ndarray) -> onnx.ModelProto:
    """The graph of x @ weights[0] @ weights[1] ... + 1."""
    nodes, constants, tensor = [], [numpy_helper.from_array(np.ones(WIDTH, np.float32), "bias")], "x"
    for i, value in enumerate(weights):
        constants.append(numpy_helper.from_array(value, f"w{i}"))
        nodes.append(helper.make_node("MatMul", [tensor, f"w{i}"], [f"y{i}"]))
        tensor = f"y{i}"
    nodes.append(helper.make_node("Add", [tensor, "bias"], ["y"]))
    ends = [helper.make_tensor_value_info(name, TensorProto.FLOAT, ["n", WIDTH]) for name in "xy"]
    graph = helper.make_graph(nodes, "linear", ends[:1], ends[1:], constants)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)


def places(path: Path) -> dict[str, dict[str, str]]:
    graph = onnx.load(path, load_external_data=False).graph
    return {
        tensor.name: {entry.key: entry.value for entry in tensor.external_data}
        for tensor in graph.initializer
        if tensor.data_location == TensorProto.EXTERNAL
    }


def test_equal_tensors_are_stored_once(tmp_path: Path) -> None:
    pool = write_pool({"one": linear(weight(0)), "two": linear(weight(1), weight(0))}, tmp_path)
    size = 4 * WIDTH * WIDTH
    assert pool.unshared_bytes == 3 * size
    assert pool.bytes == (tmp_path / FILE).stat().st_size == 2 * size
    assert places(tmp_path / "one.onnx")["w0"] == places(tmp_path / "two.onnx")["w1"]
    assert places(tmp_path / "two.onnx")["w0"] != places(tmp_path / "two.onnx")["w1"]


def test_small_tensors_stay_in_the_graph_and_large_ones_begin_at_a_page(tmp_path: Path) -> None:
    large = np.random.default_rng(2).standard_normal((WIDTH, 1024)).astype(np.float32)
    model = linear(weight(0))
    model.graph.initializer.append(numpy_helper.from_array(large, "large"))
    write_pool({"graph": model}, tmp_path)
    found = places(tmp_path / "graph.onnx")
    assert set(found) == {"w0", "large"}
    assert 4 * WIDTH < INLINE_BYTES, "the bias is small"
    assert int(found["w0"]["offset"]) % 64 == 0
    assert int(found["large"]["offset"]) % 4096 == 0


def test_equal_models_give_equal_files_in_any_order(tmp_path: Path) -> None:
    write_pool({"a": linear(weight(0)), "b": linear(weight(1))}, tmp_path / "first")
    write_pool({"b": linear(weight(1)), "a": linear(weight(0))}, tmp_path / "second")
    names = sorted(path.name for path in (tmp_path / "first").iterdir())
    assert names == sorted(["a.onnx", "b.onnx", FILE])
    for name in names:
        assert (tmp_path / "first" / name).read_bytes() == (tmp_path / "second" / name).read_bytes()


def test_no_pool_where_all_is_small(tmp_path: Path) -> None:
    write_pool({"graph": linear()}, tmp_path)
    assert not (tmp_path / FILE).exists()
    assert (tmp_path / "graph.onnx").is_file()


def test_a_pool_takes_arrays_one_by_one(tmp_path: Path) -> None:
    with PoolWriter(tmp_path) as pool:
        first = pool.put_array(weight(0))
        assert pool.put_array(weight(1).T) != first
        assert pool.put_array(np.asfortranarray(weight(0))) == first, "the order in memory is not the order of values"
        assert pool.put_array(np.ones(WIDTH, np.float32)) is None, "it is small"
        half = pool.put_array(weight(0), "float16")
        large = pool.put_array(weight(0) * 1e6, "float16")
    assert None not in (first, half, large)
    assert (first.halved, half.halved, large.halved) == (False, True, False), "float16 cannot hold the last"
    data = (tmp_path / FILE).read_bytes()
    assert len(data) == pool.bytes
    assert data[first.offset :][: first.length] == weight(0).tobytes()
    assert data[half.offset :][: half.length] == weight(0).astype(np.float16).tobytes()


def test_an_empty_pool_is_no_file(tmp_path: Path) -> None:
    with PoolWriter(tmp_path / "new"):
        pass
    assert not list((tmp_path / "new").iterdir())


@pytest.mark.parametrize("name", OF_ONNX)
def test_runtimes_read_the_pool(name: str, tmp_path: Path) -> None:
    pytest.importorskip(BACKENDS[name].package)
    write_pool({"one": linear(weight(0)), "two": linear(weight(1), weight(0))}, tmp_path)
    x = np.random.default_rng(3).standard_normal((3, WIDTH)).astype(np.float32)
    computed = backend(name).load(tmp_path / "two.onnx", 1, {})({"x": x})["y"]
    np.testing.assert_allclose(computed, x @ weight(1) @ weight(0) + 1, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("name", OF_ONNX)
def test_float16_storage_halves_the_pool_and_computes_in_float32(name: str, tmp_path: Path) -> None:
    pytest.importorskip(BACKENDS[name].package)
    plain = write_pool({"graph": linear(weight(0))}, tmp_path / "plain")
    model = linear(weight(0))
    assert store_float16(model) == 1
    onnx.checker.check_model(model)
    stored = write_pool({"graph": model}, tmp_path / "stored")
    assert stored.bytes * 2 == plain.bytes
    x = np.random.default_rng(3).standard_normal((3, WIDTH)).astype(np.float32)
    rounded = weight(0).astype(np.float16).astype(np.float32)
    computed = backend(name).load(tmp_path / "stored" / "graph.onnx", 1, {})({"x": x})["y"]
    np.testing.assert_allclose(computed, x @ rounded + 1, rtol=1e-5, atol=1e-5)


def test_weights_beyond_float16_stay_float32() -> None:
    assert store_float16(linear(weight(0) * 1e6)) == 0


@pytest.mark.parametrize("name", OF_ONNX)
@pytest.mark.parametrize("location", ["../secret.bin", "{folder}/secret.bin"])
def test_no_runtime_reads_weights_from_outside_the_folder(name: str, location: str, tmp_path: Path) -> None:
    pytest.importorskip(BACKENDS[name].package)
    folder = tmp_path / "engine"
    write_pool({"graph": linear(weight(0))}, folder)
    (folder / FILE).rename(tmp_path / "secret.bin")
    model = onnx.load(folder / "graph.onnx", load_external_data=False)
    for tensor in model.graph.initializer:
        for entry in tensor.external_data:
            if entry.key == "location":
                entry.value = location.format(folder=tmp_path)
    (folder / "graph.onnx").write_bytes(model.SerializeToString())
    with pytest.raises(EngineError, match="cannot load"):
        backend(name).load(folder / "graph.onnx", 1, {})
