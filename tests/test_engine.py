"""The engine folder: what it computes, that equal models give equal engines, and that damage is seen and said."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest

from compress.engine.export_engine import export_engine
from compress.engine.swap import swap_in, temporary_beside
from compress.errors import PassError, RefusedError
from compress.model.latent_diffusion import LatentDiffusion
from compress.store import Store
from export.backends import available
from export.engine import Engine, EngineError, relative_error
from export.manifest import FILE, Manifest, sha256_of
from export.target import built_anywhere
from tests import tiny_engine as toy

HERE = [row.name for row in built_anywhere() if available(row.backend)]
PROMPTS = ["a red circle", "small blue square on the left"]

on_every_target = pytest.mark.parametrize("target", HERE)


@pytest.fixture(scope="module")
def model(tiny_folder: Callable[[str], Path]) -> LatentDiffusion:
    return toy.tiny_model(tiny_folder("unet"))


@pytest.fixture(scope="module")
def engine(tiny_engine: Path) -> Engine:
    return Engine.open(tiny_engine, "onnxruntime-cpu", threads=1)


def altered(tiny_engine: Path, tmp_path: Path, change: Callable[[dict[str, Any]], None], seal: bool = True) -> Path:
    """A copy of the engine with another manifest; `seal` computes its hash anew, as an attacker would."""
    folder = tmp_path / "engine"
    shutil.copytree(tiny_engine, folder)
    raw = json.loads((folder / FILE).read_text())
    change(raw)
    (folder / FILE).write_text(json.dumps(raw))
    if seal:
        raw["engine_hash"] = Manifest.from_json(json.dumps(raw)).digest()
        (folder / FILE).write_text(json.dumps(raw))
    return folder


@on_every_target
def test_latents_are_those_of_pytorch(target: str, tiny_engine: Path, model: LatentDiffusion) -> None:
    got = Engine.open(tiny_engine, target, threads=1).sample(PROMPTS, [0, 1])
    expected = toy.torch_runtime(model).sample(PROMPTS, [0, 1], toy.SIDE, toy.SIDE)
    assert got.dtype == np.float32
    # Where a value rounds the other way all that follows changes, and OpenVINO keeps convolution outputs in float.
    assert relative_error(got, expected) < 6e-2


@on_every_target
def test_pictures(target: str, tiny_engine: Path) -> None:
    engine = Engine.open(tiny_engine, target, threads=1)
    pictures = engine.generate(prompts=PROMPTS, seeds=[0, 1])
    assert pictures.shape == (2, toy.SIDE, toy.SIDE, 3)
    assert pictures.dtype == np.uint8
    assert pictures.std() > 1
    np.testing.assert_array_equal(pictures, engine.decode(engine.sample(PROMPTS, seeds=[0, 1])))
    np.testing.assert_array_equal(pictures, engine.generate(PROMPTS)), "seeds 0, 1, ... where none are given"
    alone = engine.generate(PROMPTS[1:], [1])
    assert np.abs(pictures[1:].astype(int) - alone).max() <= 2


def test_a_noise_array_takes_the_place_of_seeds(engine: Engine) -> None:
    from export.noise import INITIAL, noise

    given = noise([5], INITIAL, (4, 8, 8))
    np.testing.assert_array_equal(engine.sample(PROMPTS[:1], noise=given), engine.sample(PROMPTS[:1], [5]))


def test_image_to_image_and_inpainting(engine: Engine) -> None:
    image = engine.generate(PROMPTS[:1], [7])
    mask = np.zeros((1, toy.SIDE, toy.SIDE), bool)
    mask[:, :, toy.SIDE // 2 :] = True
    painted = engine.sample(PROMPTS[1:], [1], image_latents=engine.encode(image), mask=engine.latent_mask(mask))
    latents = engine.encode(image)
    np.testing.assert_allclose(painted[..., :4], latents[..., :4], atol=1e-5)
    assert np.abs(painted[..., 4:] - latents[..., 4:]).max() > 1e-2
    whole = engine.generate(PROMPTS[1:], [1], image=image, mask=mask)
    np.testing.assert_array_equal(whole, engine.decode(painted))
    with pytest.raises(EngineError, match="a mask must be"):
        engine.generate(PROMPTS[1:], [1], image=image, mask=mask[0])


def test_the_score_oracle_and_the_features(engine: Engine, model: LatentDiffusion) -> None:
    latents = np.random.default_rng(0).standard_normal((2, 4, 8, 8)).astype(np.float32)
    times = np.array([900.0, 10.0], np.float32)
    expected = toy.torch_runtime(model).features(latents, times, PROMPTS)
    computed = engine.features(latents, times, PROMPTS)
    assert list(computed) == list(expected)
    for name in ("emb", "skip_1", "out_sample"):
        assert relative_error(computed[name], expected[name]) < 3e-2
    np.testing.assert_array_equal(engine.denoise(latents, times, PROMPTS), computed["out_sample"])


def test_equal_models_give_equal_engines(
    tiny_engine: Path, engine_store: Store, model: LatentDiffusion, tmp_path: Path
) -> None:
    """The float graphs come from the store, the rest is done again; every file is the same, the manifest too."""
    manifest = toy.build(model, tmp_path / "again", engine_store)
    first = {path.relative_to(tiny_engine): sha256_of(path) for path in tiny_engine.rglob("*") if path.is_file()}
    again = {
        path.relative_to(tmp_path / "again"): sha256_of(path)
        for path in (tmp_path / "again").rglob("*")
        if path.is_file()
    }
    assert first == again
    assert manifest.engine_hash == json.loads((tiny_engine / FILE).read_text())["engine_hash"]


def test_segments_and_dialects_share_their_weights(tiny_engine: Path) -> None:
    folder = tiny_engine / "unet"
    segments = {"time-down_1", "down_2-up_2", "up_1-head"}
    assert {path.name for path in folder.iterdir()} == {
        "weights.bin",
        *(f"{name}.onnx" for name in segments),
        *(f"{name}.openvino.onnx" for name in segments),
    }
    referred = 0
    for path in folder.glob("*.onnx"):
        for tensor in onnx.load(path, load_external_data=False).graph.initializer:
            referred += sum(int(entry.value) for entry in tensor.external_data if entry.key == "length")
    assert (folder / "weights.bin").stat().st_size < 0.6 * referred
    assert [path.name for path in (tiny_engine / "text_encoder").glob("*.onnx")] == ["model.onnx"]


def test_nothing_of_this_machine_is_in_the_engine(tiny_engine: Path) -> None:
    home, root = str(Path.home()).encode(), str(Path(__file__).parent.parent).encode()
    for path in tiny_engine.rglob("*"):
        if path.is_file():
            content = path.read_bytes()
            assert root not in content, path
            assert home + b"/" not in content, path
            assert b"site-packages" not in content, path


def test_the_manifest_says_how_formats_run(engine: Engine) -> None:
    for name, row in engine.manifest.targets.items():
        assert row.formats == {"denoiser": {"float32": "native", "int8-w8a8": "native"}}, name
        assert set(row.graphs) == {
            "time-down_1",
            "down_2-up_2",
            "up_1-head",
            "vae_decoder",
            "vae_encoder",
            "text_encoder",
        }


@on_every_target
def test_verify_recomputes_the_golden_latents(target: str, tiny_engine: Path, tmp_path: Path) -> None:
    found = Engine.open(tiny_engine, target, threads=1).verify()
    assert found["relative_error"] <= 1e-6
    assert found["files"] == len(json.loads((tiny_engine / FILE).read_text())["files"])

    def forge(raw: dict[str, Any]) -> None:
        path = raw["golden"]["files"][target]
        np.save(tmp_path / "engine" / path, np.load(tmp_path / "engine" / path) * 1.5)
        raw["files"][path] |= {"sha256": sha256_of(tmp_path / "engine" / path)}

    folder = altered(tiny_engine, tmp_path, forge)
    assert Engine.open(folder, target, threads=1).verify(golden=False) == {"files": found["files"]}
    with pytest.raises(EngineError, match="differ from the golden ones by"):
        Engine.open(folder, target, threads=1).verify()


def test_a_golden_pickle_is_not_opened(tiny_engine: Path, tmp_path: Path) -> None:
    def forge(raw: dict[str, Any]) -> None:
        path = raw["golden"]["files"]["onnxruntime-cpu"]
        file = tmp_path / "engine" / path
        np.save(file, np.array([{"a": 1}], dtype=object), allow_pickle=True)
        raw["files"][path] |= {"sha256": sha256_of(file), "bytes": file.stat().st_size}

    with pytest.raises(EngineError, match=r"golden latents .* cannot be read"):
        Engine.open(altered(tiny_engine, tmp_path, forge), "onnxruntime-cpu").verify()


@pytest.mark.parametrize(
    "name", ["unet/time-down_1.onnx", "unet/weights.bin", "step_plan.json", "tokenizer/tokenizer.json", "recipe.yaml"]
)
def test_a_changed_or_missing_file_is_seen(name: str, tiny_engine: Path, tmp_path: Path) -> None:
    folder = tmp_path / "engine"
    shutil.copytree(tiny_engine, folder)
    content = bytearray((folder / name).read_bytes())
    content[len(content) // 2] ^= 1
    (folder / name).write_bytes(content)
    with pytest.raises(EngineError, match=f"damaged: {name} is not the file that was written"):
        Engine.open(folder)
    (folder / name).unlink()
    with pytest.raises(EngineError, match=f"incomplete: {name} is missing"):
        Engine.open(folder)


def test_a_link_in_place_of_a_file_is_refused(tiny_engine: Path, tmp_path: Path) -> None:
    folder = tmp_path / "engine"
    shutil.copytree(tiny_engine, folder)
    (folder / "unet").rename(tmp_path / "elsewhere")
    (folder / "unet").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(EngineError, match=r"unet/.* is a link"):
        Engine.open(folder)


def graph_path(value: str) -> Callable[[dict[str, Any]], None]:
    def change(raw: dict[str, Any]) -> None:
        raw["targets"]["onnxruntime-cpu"]["graphs"]["time-down_1"] = value

    return change


CHANGES: dict[str, tuple[Callable[[dict[str, Any]], Any], str]] = {
    "a later schema": (lambda raw: raw.update(schema_version=2), "schema version 2; this reads 1"),
    "an unknown key": (lambda raw: raw.update(extra=1), "cannot be read"),
    "a missing key": (lambda raw: raw.pop("latent"), "cannot be read"),
    "a wrong type": (lambda raw: raw.update(latent=[1]), "latent is not a mapping"),
    "no target": (lambda raw: raw.update(targets={}), "names no target"),
    "a size that is none": (lambda raw: raw["shapes"].update(height=[0, 1, 2]), "three positive integers"),
    "a size left out": (lambda raw: raw["shapes"].pop("width"), "shapes lacks 'width'"),
    "a path upwards": (graph_path("../secret.onnx"), "leads out of the engine"),
    "an absolute path": (graph_path("/etc/passwd"), "leads out of the engine"),
    "a path upwards from within": (graph_path("unet/../../secret.onnx"), "leads out of the engine"),
    "a path of another system": (graph_path("unet\\time-down_1.onnx"), "leads out of the engine"),
    "a path with a drive": (graph_path("c:/entry.onnx"), "not in its plain form"),
    "a path that is none": (graph_path(""), "leads out of the engine"),
    "a graph that is not listed": (graph_path("unet/other.onnx"), "does not list it"),
    "a listed path upwards": (lambda raw: raw["files"].update({"../x": raw["files"]["step_plan.json"]}), "leads out"),
    "a changed latent": (lambda raw: raw["latent"].update(scaling_factor=2.0), "changed after the engine was built"),
    "a changed option": (
        lambda raw: raw["targets"]["openvino-cpu"]["options"].update(deep={"inference_precision": "bfloat16"}),
        "changed after the engine was built",
    ),
    "a backend that is a list": (
        lambda raw: raw["targets"]["openvino-cpu"].update(backend=[]),
        "targets.openvino-cpu.backend is not text",
    ),
    "a latency that is text": (
        lambda raw: raw["targets"]["openvino-cpu"].update(measured={"latency_ms": "fast"}),
        "holds what is no number",
    ),
    "golden without seeds": (lambda raw: raw["golden"].update(seeds=[]), "golden is malformed"),
}


@pytest.mark.parametrize("name", CHANGES)
def test_a_changed_manifest_is_refused(name: str, tiny_engine: Path, tmp_path: Path) -> None:
    change, message = CHANGES[name]
    folder = altered(tiny_engine, tmp_path, change, seal=False)
    with pytest.raises(EngineError, match=message) as caught:
        Engine.open(folder)
    assert caught.value.exit_code == 3
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"null", b'{"schema_version": 1}', b"\xff\xfe", b"[" * 100_000])
def test_a_manifest_that_is_none_is_refused(content: bytes, tmp_path: Path) -> None:
    (tmp_path / FILE).write_bytes(content)
    with pytest.raises(EngineError, match="cannot be read") as caught:
        Engine.open(tmp_path)
    assert "\n" not in str(caught.value)


def test_sealed_nonsense_is_refused_all_the_same(tiny_engine: Path, tmp_path: Path) -> None:
    """Whoever rewrites the manifest can rewrite its hash; what it says must still make sense."""

    def foreign(raw: dict[str, Any]) -> None:
        raw["targets"]["onnxruntime-cpu"]["backend"] = "os"

    folder = altered(tiny_engine, tmp_path, foreign)
    with pytest.raises(EngineError, match="the backend 'os' is unknown"):
        Engine.open(folder, "onnxruntime-cpu")

    def unknown(raw: dict[str, Any]) -> None:
        raw["latent"]["colour"] = "red"

    shutil.rmtree(folder)
    with pytest.raises(EngineError, match=r"latent cannot be read: .*colour"):
        Engine.open(altered(tiny_engine, tmp_path, unknown))

    def swapped(raw: dict[str, Any]) -> None:
        graphs = raw["targets"]["onnxruntime-cpu"]["graphs"]
        graphs["time-down_1"] = graphs["down_2-up_2"]

    shutil.rmtree(folder)
    folder = altered(tiny_engine, tmp_path, swapped)
    with pytest.raises(EngineError, match="'time-down_1' does not compute 'emb'"):
        Engine.open(folder, "onnxruntime-cpu")


def test_what_cannot_be_asked_is_said(tiny_engine: Path, engine: Engine, tmp_path: Path) -> None:
    with pytest.raises(EngineError, match="not built for 'tensorrt', but for openvino-cpu, onnxruntime-cpu"):
        Engine.open(tiny_engine, "tensorrt")
    with pytest.raises(EngineError, match="threads must be at least 1"):
        Engine.open(tiny_engine, threads=0)
    with pytest.raises(EngineError, match="does not exist"):
        Engine.open(tmp_path / "nothing")
    with pytest.raises(EngineError, match=f"has no {FILE}"):
        Engine.open(tmp_path)
    with pytest.raises(EngineError, match="built for the height 16 alone, not 32"):
        engine.generate(PROMPTS, height=32)
    with pytest.raises(EngineError, match="one seed per sample"):
        engine.generate(PROMPTS, seeds=[1])
    with pytest.raises(EngineError, match="non-empty list"):
        engine.generate("a red circle")


def test_the_fastest_measured_target_is_the_default(tiny_engine: Path, tmp_path: Path) -> None:
    assert Engine.open(tiny_engine).target == HERE[0]
    slow = {name: 2.0 - place for place, name in enumerate(HERE)}

    def measure(raw: dict[str, Any]) -> None:
        for name, value in slow.items():
            raw["targets"][name]["measured"] = {"latency_ms": value}

    assert Engine.open(altered(tiny_engine, tmp_path, measure)).target == HERE[-1]


def test_what_does_not_fit_the_model_is_refused_before_any_export(model: LatentDiffusion, tmp_path: Path) -> None:
    rows = built_anywhere()
    with pytest.raises(RefusedError, match=r"shapes\.height: 18 is no multiple of 4 pixels"):
        export_engine(model, rows, {**toy.SHAPES, "height": (16, 18, 18)}, tmp_path / "engine")
    with pytest.raises(RefusedError, match="padded to 12 tokens"):
        export_engine(model, rows, {**toy.SHAPES, "prompt_tokens": (4, 4, 4)}, tmp_path / "engine")
    assert not (tmp_path / "engine").exists()


def test_a_finished_folder_takes_the_place_of_another(tmp_path: Path) -> None:
    out = tmp_path / "engine"
    for content in ("first", "second"):
        folder = temporary_beside(out)
        (folder / "inner").mkdir()
        (folder / "inner" / "file").write_text(content)
        swap_in(folder, out)
        assert (out / "inner" / "file").read_text() == content
        assert [path.name for path in tmp_path.iterdir()] == ["engine"]
    (tmp_path / ".engine.999999999.abcd.tmp").mkdir()
    kept = temporary_beside(out)
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(["engine", kept.name])


def test_a_model_without_a_plan_is_our_fault(tiny_folder: Callable[[str], Path], tmp_path: Path) -> None:
    from compress.model.latent_diffusion import load

    with pytest.raises(PassError, match="no step plan"):
        export_engine(load(tiny_folder("unet")), built_anywhere(), toy.SHAPES, tmp_path / "engine")


def test_options_of_the_backend_are_handed_over(tiny_engine: Path, engine: Engine) -> None:
    plain = Engine.open(tiny_engine, "onnxruntime-cpu", threads=1, options={"optimization": "none"})
    assert relative_error(plain.sample(PROMPTS, [0, 1]), engine.sample(PROMPTS, [0, 1])) < 0.2
    with pytest.raises(EngineError, match="the backend 'onnxruntime' has no option 'device'"):
        Engine.open(tiny_engine, "onnxruntime-cpu", options={"device": "cuda"})
