"""Engine folders with TensorRT engines in them: built, hashed and told, never opened, never timed."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import onnx
import pytest

from compress.cli import main
from compress.compiler import run
from compress.engine.export_engine import export_engine
from compress.engine.jobs import profiles
from compress.errors import RecipeError, RefusedError
from compress.inspect import take_stock
from compress.measure.size import engine_size
from compress.model.latent_diffusion import LatentDiffusion, load
from compress.passes.base import PassContext
from compress.passes.quantize import Quantize
from compress.recipe.schema import Recipe
from compress.store import Store
from export.backends import available, backend
from export.engine import Engine, EngineError
from export.manifest import Manifest, read_manifest, sha256_of
from export.qdq import lower, require_all
from export.quant_plan import QuantPlan
from export.target import TARGETS, target
from export.to_onnx import export_module, strip_metadata
from export.to_tensorrt import BuildOptions, build
from tests import tiny_engine as toy

ARCHITECTURES = ("sm_89", "sm_120")
RTX = replace(TARGETS["tensorrt-rtx"], build=BuildOptions(ARCHITECTURES))
RECIPE = """
schema_version: 1
model: {model}
sampler: {{scheduler: EulerDiscreteScheduler, steps: 2, guidance_scale: 3.0}}
passes: [{{quantize: {{scheme: {scheme}}}}}]
targets: [{targets}]
shapes: {{height: 16, width: 16}}
{more}
calibration: {{prompts: prompts.txt, samples: 2}}
out: {out}
"""


@pytest.fixture(scope="module")
def trt() -> Any:
    return pytest.importorskip("tensorrt_rtx_bindings", reason="TensorRT for RTX is not installed")


@pytest.fixture(scope="module")
def built(
    trt: Any, tiny_folder: Callable[[str], Path], engine_store: Store, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, Manifest]:
    """The toy engine, cut, cached and quantized, for ONNX Runtime and for TensorRT for RTX."""
    folder = tmp_path_factory.mktemp("rtx") / "engine"
    model = toy.tiny_model(tiny_folder("unet"))
    manifest = export_engine(
        model,
        [RTX, TARGETS["onnxruntime-cpu"]],
        toy.SHAPES,
        folder,
        golden_prompts=["a red circle"],
        store=engine_store,
    )
    return folder, manifest


def test_engines_are_in_the_folder_hashed_and_labelled(built: tuple[Path, Manifest]) -> None:
    folder, manifest = built
    row = manifest.targets["tensorrt-rtx"]
    assert row.evidence == "built"
    assert not row.measured
    assert set(row.graphs) == set(manifest.targets["onnxruntime-cpu"].graphs)
    for path in row.graphs.values():
        assert path.endswith(".tensorrt-rtx.engine")
        entry = manifest.files[path]
        assert entry.run
        assert entry.sha256 == sha256_of(folder / path)
    assert row.formats["denoiser"] == {"float16": "native", "int8-w8a8": "storage only"}
    assert read_manifest(folder) == manifest
    assert not list(folder.rglob("*.tensorrt.onnx")), "what an engine was built from stays out"
    assert manifest.golden is not None
    assert list(manifest.golden.files) == ["onnxruntime-cpu"]


def test_the_manifest_says_how_engines_were_built(built: tuple[Path, Manifest], trt: Any) -> None:
    record = built[1].targets["tensorrt-rtx"].build
    assert record["builder"] == f"TensorRT for RTX {trt.__version__}"
    assert record["architectures"] == list(ARCHITECTURES)
    assert record["options"] == {"weight_streaming": False, "version_compatible": False, "refit": False}
    assert set(record["onnx_sha256"]) == set(record["layers"]) == set(record["profiles"]) == set(record["tensors"])
    assert len(set(record["onnx_sha256"].values())) == len(record["onnx_sha256"])
    first = record["profiles"]["time-down_1"]
    assert first["sample"] == [[1, 4, 8, 8], [2, 4, 8, 8], [8, 4, 8, 8]], "both guidance halves"
    assert record["tensors"]["time-down_1"]["inputs"]["sample"] == ["float32", [None, 4, 8, 8]]
    assert first["encoder_hidden_states"] == [[1, 12, 16], [2, 12, 16], [8, 12, 16]]


def test_profiles_reach_from_the_least_size_to_the_greatest(tiny_folder: Callable[[str], Path]) -> None:
    model = toy.tiny_model(tiny_folder("unet"))
    assert model.step_plan is not None
    model.step_plan = replace(model.step_plan, steps=(replace(model.step_plan.steps[0], span=3),))
    shapes = {"batch": (1, 2, 4), "height": (16, 24, 32), "width": (16, 16, 16), "prompt_tokens": (12, 12, 12)}
    found = profiles(model, shapes)
    assert set(found) == {"time-down_1", "down_2-up_2", "up_1-head", "vae_decoder", "vae_encoder", "text_encoder"}
    assert found["time-down_1"]["sample"] == ((1, 4, 8, 8), (4, 4, 12, 8), (24, 4, 16, 8))
    assert found["vae_encoder"]["sample"][2] == (24, 3, 32, 16)
    assert found["text_encoder"]["input_ids"] == ((1, 12), (4, 12), (24, 12))
    between = next(shapes for name, shapes in found["down_2-up_2"].items() if name.startswith("skip"))
    assert [shape[2] for shape in between] == [8, 12, 16]


def test_another_target_is_opened_and_this_one_says_why_not(built: tuple[Path, Manifest], tmp_path: Path) -> None:
    folder, manifest = built
    assert not available("tensorrt-rtx")
    assert Engine.open(folder).target == "onnxruntime-cpu"
    with pytest.raises(EngineError, match="TensorRT for RTX are built by this version and not opened by it"):
        Engine.open(folder, "tensorrt-rtx")
    with pytest.raises(EngineError, match="engines of TensorRT are built"):
        backend("tensorrt")
    alone = replace(manifest, targets={"tensorrt-rtx": manifest.targets["tensorrt-rtx"]}, golden=None)
    sealed = alone.sealed(folder, {path for path, entry in manifest.files.items() if entry.run})
    other = tmp_path / "alone"
    other.symlink_to(folder)
    assert sealed.engine_hash != manifest.engine_hash
    with pytest.raises(EngineError, match="run them with NVIDIA's own runtime"):
        Engine(folder, sealed, "tensorrt-rtx", None)


def test_inspect_and_sizes_know_engines(built: tuple[Path, Manifest], capsys: pytest.CaptureFixture[str]) -> None:
    folder, manifest = built
    stock = take_stock(folder)["targets"]["tensorrt-rtx"]
    assert stock["evidence"] == "built"
    assert stock["measured"] == {}
    assert stock["build"]["architectures"] == list(ARCHITECTURES)
    assert main(["inspect", str(folder)]) == 0
    said = capsys.readouterr().out
    assert "for sm_89, sm_120, latency not measured" in said
    assert "sample 1..8x4x8x8" in said
    bytes_ = sum(manifest.files[path].bytes for path in manifest.targets["tensorrt-rtx"].graphs.values())
    size = engine_size(folder, "tensorrt-rtx")
    assert bytes_ / 2**20 < size.mib < bytes_ / 2**20 + 1
    assert engine_size(folder, "onnxruntime-cpu").mib < size.mib


def recipe(tmp_path: Path, model: Path, scheme: str, targets: str, more: str = "") -> Recipe:
    (tmp_path / "prompts.txt").write_text("a red circle\na small ring\n")
    text = RECIPE.format(model=model, scheme=scheme, targets=targets, more=more, out=tmp_path / "out")
    return Recipe.parse(text, folder=tmp_path)


@pytest.mark.parametrize(
    ("scheme", "more", "said"),
    [
        ("fp8-w8a8", "tensorrt: {architectures: [sm_86, sm_89]}", r"fp8-w8a8 from sm_89 on.* built for sm_86: name"),
        ("fp8-w8a8", "", "fp8-w8a8 from sm_89 on, but is to be built for sm_80, sm_86"),
        ("nvfp4", "tensorrt: {architectures: sm_89}", "nvfp4 from sm_120 on, but is to be built for sm_89"),
        ("mxfp8", "", "tensorrt-rtx does not know the number format mxfp8; it knows float16, "),
    ],
)
def test_formats_that_a_target_does_not_have_are_refused_first(
    scheme: str, more: str, said: str, tiny_folder: Callable[[str], Path], tmp_path: Path
) -> None:
    with pytest.raises(RefusedError, match=said):
        run(recipe(tmp_path, tiny_folder("unet"), scheme, "tensorrt-rtx", more), dry_run=True)


def test_what_cannot_be_measured_is_refused_first(tiny_folder: Callable[[str], Path], tmp_path: Path) -> None:
    (tmp_path / "heldout.txt").write_text("a ring\na square\n")
    more = "evaluate: {samples: 2, prompts: heldout.txt}"
    with pytest.raises(RefusedError, match="tensorrt-rtx are not opened here, so nothing can be measured: add"):
        run(recipe(tmp_path, tiny_folder("unet"), "int8-w8a8", "tensorrt-rtx", more), dry_run=True)
    assert run(
        recipe(tmp_path, tiny_folder("unet"), "int8-w8a8", "tensorrt-rtx, onnxruntime-cpu", more), dry_run=True
    ).edits
    with pytest.raises(RecipeError, match="is for the targets tensorrt-rtx and tensorrt"):
        recipe(tmp_path, tiny_folder("unet"), "int8-w8a8", "onnxruntime-cpu", "tensorrt: {refit: true}")


def test_a_missing_library_is_said_before_anything_is_computed(
    tiny_folder: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import sys

    monkeypatch.setitem(sys.modules, "tensorrt_rtx_bindings", None)  # what Python does where it cannot be imported
    with pytest.raises(EngineError, match=r"pip install 'latent-compress\[tensorrt\]'"):
        run(recipe(tmp_path, tiny_folder("unet"), "int8-w8a8", "tensorrt-rtx"), work_dir=tmp_path / "cache")
    assert not (tmp_path / "cache").exists() or not list((tmp_path / "cache").rglob("*.safetensors"))
    assert target("tensorrt").library == "tensorrt"


REFERENCE = Path(__file__).parent.parent / "recipes" / "reference"
SCHEMES = ("float16", "int8-w8a8", "fp8-w8a8", "int4-w4a32-g64", "nvfp4")


@pytest.mark.slow
@pytest.mark.parametrize("name", ["unet", "mmdit"])
def test_the_denoisers_of_the_reference_models_are_built(name: str, trt: Any, tmp_path: Path) -> None:
    model = toy.sampled(load(REFERENCE / name), steps=2)
    side = model.family.latent_side(model.denoiser)
    module: Any = model.parts()["denoiser"]
    tokens = 20 if name == "unet" else 21
    inputs = [model.family.example_inputs(model.denoiser, batch, side, side, tokens) for batch in (2, 3)]
    graph = export_module(module, inputs[0], {key: {0: "batch"} for key in inputs[0]}, module.outputs, inputs[1])
    shapes = {key: tuple((batch, *tensor.shape[1:]) for batch in (1, 2, 8)) for key, tensor in inputs[0].items()}
    sizes: dict[str, int] = {}
    for scheme in SCHEMES:
        made = copy.deepcopy(graph)
        lowering = lower(made, _planned(model, scheme, side), "tensorrt", prefix=f"{module.prefix}.")
        require_all(_planned(model, scheme, side), [lowering], "tensorrt")
        strip_metadata(made)
        path = tmp_path / f"{scheme}.onnx"
        onnx.save(made, path)
        for architecture in ("sm_120",) if scheme == "nvfp4" else ARCHITECTURES:
            found = build(trt, path, [shapes], BuildOptions((architecture,)))
            sizes[f"{scheme} {architecture}"] = len(found.engine)
            assert len(found.engine) > path.stat().st_size
    # Few bits do not make these engines much smaller: kernels are most of them, and weights are not all kept as given.
    assert max(sizes.values()) < 1.1 * sizes["float16 sm_89"]


def _planned(model: LatentDiffusion, scheme: str, side: int) -> QuantPlan:
    """The denoiser's plan, calibrated on one picture."""
    if scheme == "float16":
        return QuantPlan({})
    other = model.clone()
    other.quant_plans = {}
    step = Quantize(scheme, parts={name: "none" for name in other.parts() if name != "denoiser"}, float_share=0.0)
    size = side * model.latent["downscale"]
    step.apply(other, step.plan(other, []), PassContext(("a red circle",), 0, size, size))
    return other.quant_plans["denoiser"]
