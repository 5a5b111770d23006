"""The ONNX lowering: exact at two sizes, the same bytes in every process, nothing of this machine in the file."""

from __future__ import annotations

import hashlib
import subprocess
import sys
from pathlib import Path

import onnx
import pytest
import torch
from diffusers.models.embeddings import PatchEmbed
from diffusers.models.resnet import ResnetBlock2D
from torch import Tensor, nn

from export.errors import ExportError
from export.to_onnx import OPSET, SCOPES, export_module, strip_metadata
from export.weights import FILE, PoolWriter, write_graph, write_pool

ROOT = Path(__file__).parent.parent
AXES = {"hidden": {0: "batch", 2: "height", 3: "width"}, "emb": {0: "batch"}}


class Residual(nn.Module):
    """A residual block of a UNet under its own name."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.block = ResnetBlock2D(in_channels=8, out_channels=16, temb_channels=12, groups=4)

    def forward(self, hidden: Tensor, emb: Tensor) -> tuple[Tensor, Tensor]:
        out = self.block(hidden, emb)
        return out.squeeze(1), out.mean((2, 3))  # the squeeze does nothing in PyTorch, and is an error in ONNX


def inputs(batch: int, height: int, width: int) -> dict[str, Tensor]:
    torch.manual_seed(1)
    return {"hidden": torch.randn(batch, 8, height, width), "emb": torch.randn(batch, 12)}


def exported() -> onnx.ModelProto:
    return export_module(Residual(), inputs(2, 6, 8), AXES, ["out", "mean"], inputs(1, 8, 4), name="residual")


def digest(model: onnx.ModelProto) -> str:
    return hashlib.sha256(model.SerializeToString(deterministic=True)).hexdigest()


@pytest.fixture(scope="module")
def model() -> onnx.ModelProto:
    return exported()


def dimensions(value: onnx.ValueInfoProto) -> list[str | int]:
    return [size.dim_param or size.dim_value for size in value.type.tensor_type.shape.dim]


def test_names_and_sizes(model: onnx.ModelProto) -> None:
    onnx.checker.check_model(model, full_check=True)
    assert [(entry.domain, entry.version) for entry in model.opset_import] == [("", OPSET)]
    assert {value.name: dimensions(value) for value in model.graph.input} == {
        "hidden": ["batch", 8, "height", "width"],
        "emb": ["batch", 12],
    }
    outputs = {value.name: dimensions(value) for value in model.graph.output}
    assert outputs["mean"] == ["batch", 16]
    assert outputs["out"][:2] == ["batch", 16]
    assert "Squeeze" not in {node.op_type for node in model.graph.node}


def test_only_module_names_remain_of_the_metadata(model: onnx.ModelProto) -> None:
    keys = {entry.key for node in model.graph.node for entry in node.metadata_props}
    assert keys == {SCOPES}
    convolutions = [node for node in model.graph.node if node.op_type == "Conv"]
    scopes = {entry.value for node in convolutions for entry in node.metadata_props}
    assert all(any(f"'block.{name}'" in value for value in scopes) for name in ("conv1", "conv2", "conv_shortcut"))
    stripped = onnx.ModelProto()
    stripped.CopyFrom(model)
    strip_metadata(stripped)
    for text in (b".py", str(ROOT).encode(), sys.prefix.encode(), b"site-packages"):
        assert text not in stripped.SerializeToString()
    assert b"block." not in b"".join(node.SerializeToString() for node in stripped.graph.node if not node.input)


def test_another_process_writes_the_same_bytes(model: onnx.ModelProto) -> None:
    script = "from tests.test_to_onnx import digest, exported; print(digest(exported()))"
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", script],
        cwd=ROOT,
        env={"PATH": "/usr/bin:/bin", "PYTHONHASHSEED": "12345", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.split()[-1] == digest(model)


def test_weights_that_go_straight_into_a_pool_give_the_same_files(model: onnx.ModelProto, tmp_path: Path) -> None:
    once = onnx.ModelProto()
    once.CopyFrom(model)
    written = write_pool({"graph": once}, tmp_path / "once")
    with PoolWriter(tmp_path / "straight") as pool:
        for _ in range(2):  # the second export adds nothing to the pool
            graph = export_module(
                Residual(), inputs(2, 6, 8), AXES, ["out", "mean"], inputs(1, 8, 4), name="residual", pool=pool
            )
    write_graph(graph, pool.folder / "graph.onnx")
    assert (pool.bytes, pool.unshared_bytes) == (written.bytes, 2 * written.unshared_bytes)
    for name in ("graph.onnx", FILE):
        assert (tmp_path / "straight" / name).read_bytes() == (tmp_path / "once" / name).read_bytes()


def test_weights_rounded_on_their_way_into_a_pool_are_found_out_where_that_changes_the_output(tmp_path: Path) -> None:
    """The check reads the file; a module that holds what float16 can hold passes it, another does not."""
    module = Residual()
    tensors = (inputs(2, 6, 8), AXES, ["out", "mean"], inputs(1, 8, 4))
    with PoolWriter(tmp_path) as pool, pytest.raises(ExportError, match="differs from the module by"):
        export_module(module, *tensors, pool=pool, storage="float16")
    for parameter in module.parameters():
        parameter.data.copy_(parameter.half())
    with PoolWriter(tmp_path) as pool:
        graph = export_module(module, *tensors, pool=pool, storage="float16")
    widened = [node.output[0] for node in graph.graph.node if node.name.endswith(".widen")]
    assert len(widened) == sum(parameter.numel() >= 512 for parameter in module.parameters()) > 1


def test_a_table_baked_in_at_one_size_is_found_out() -> None:
    """The positions of a DiT are a table made for the size it is traced at, which is wrong at every other size."""
    embed = PatchEmbed(height=8, width=8, patch_size=2, in_channels=4, embed_dim=8)
    example, other = {"latent": torch.randn(2, 4, 8, 8)}, {"latent": torch.randn(1, 4, 4, 4)}
    with pytest.raises(ExportError, match="positions"):
        export_module(
            embed, example, {"latent": {0: "batch", 2: "height", 3: "width"}}, ["out"], other, name="positions"
        )


def test_a_graph_that_computes_something_else_is_refused() -> None:
    class Counter(nn.Module):
        """Returns another value at every call, as no pure function does."""

        calls = 0

        def forward(self, x: Tensor) -> Tensor:
            Counter.calls += 1
            return x * Counter.calls

    with pytest.raises(ExportError, match=r"counter at x .* differs from the module by"):
        export_module(
            Counter(), {"x": torch.ones(2, 2)}, {"x": {0: "n"}}, ["y"], {"x": torch.ones(1, 2)}, name="counter"
        )


def test_the_check_must_be_at_another_size() -> None:
    with pytest.raises(ExportError, match="same width as the example"):
        export_module(Residual(), inputs(2, 6, 8), AXES, ["out", "mean"], inputs(1, 8, 8), name="residual")


def test_what_cannot_be_traced_is_one_sentence() -> None:
    class Branches(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x + 1 if x.sum() > 0 else x - 1

    with pytest.raises(ExportError, match="branches cannot be traced") as caught:
        export_module(Branches(), {"x": torch.ones(2, 2)}, {}, ["y"], {"x": torch.ones(2, 2)}, name="branches")
    assert "\n" not in str(caught.value)
