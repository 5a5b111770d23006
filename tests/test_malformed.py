"""Malformed recipes, models and engines: the right exit code, one sentence, no traceback, and nothing left behind."""

from __future__ import annotations

import json
import os
import random
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from compress.cli import main
from export.errors import EngineError

ROOT = Path(__file__).parent.parent

RECIPE = b"""\
schema_version: 1
model: model
sampler: {scheduler: DDIMScheduler, steps: 6, guidance_scale: 2.0}
passes:
  - quantize: {scheme: int8-w8a8}
  - cache: {cut: 1, interval: 2}
targets: [onnxruntime-cpu]
shapes: {batch: [1, 1, 2], height: 16, width: 16}
calibration: {prompts: prompts.txt, samples: 1}
out: engine
"""


def tree(folder: Path) -> dict[str, int]:
    """List what is in a folder, with sizes; links are not followed."""
    return {str(path.relative_to(folder)): path.lstat().st_size for path in folder.rglob("*")}


Refused = Callable[..., str]


@pytest.fixture
def refused(tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Refused:
    """Run the command line in `tmp_path`; check code, sentence and leftovers; return the sentence."""
    monkeypatch.chdir(tmp_path)

    def run(code: int, *words: str) -> str:
        before = tree(tmp_path)
        capfd.readouterr()  # what making the model printed
        found = main([*words])
        out, err = capfd.readouterr()
        assert found == code, err
        assert out == ""
        assert err.startswith("compress: ")
        assert err.count("\n") == 1, f"not one sentence: {err}"
        assert err.endswith("\n")
        assert "Traceback" not in err
        assert len(err) < 1000
        assert tree(tmp_path) == before
        return err

    return run


def swap(old: bytes, new: bytes) -> bytes:
    assert RECIPE.count(old) == 1
    return RECIPE.replace(old, new)


def bomb() -> bytes:
    """Aliases of aliases: nine levels of nine would be 387 million values."""
    lines = [b"a0: &a0 [x, x, x, x, x, x, x, x, x]"]
    lines += [b"a%d: &a%d [%s]" % (i, i, b", ".join([b"*a%d" % (i - 1)] * 9)) for i in range(1, 9)]
    return b"\n".join(lines)


RECIPES: dict[str, tuple[bytes, int, str]] = {
    "empty": (b"", 2, "is empty"),
    "only a comment": (b"# nothing\n", 2, "is empty"),
    "only spaces": (b"  \n\n", 2, "is empty"),
    "a word": (b"recipe\n", 2, "the text 'recipe', not a mapping"),
    "a number": (b"3\n", 2, "the number 3, not a mapping"),
    "a list": (b"- model: x\n", 2, "a list, not a mapping"),
    "a tab": (b"sampler:\n\tsteps: 3\n", 2, ":2: is indented with a tab"),
    "an open bracket": (b"shapes: {batch: [1\n", 2, "is not YAML"),
    "an open quote": (b'model: "x\n', 2, "is not YAML"),
    "bad indentation": (b"a: 1\n b: 2\n", 2, ":2: is not YAML"),
    "two documents": (RECIPE + b"---\n" + RECIPE, 2, "is not YAML"),
    "zero bytes": (b"model: \0\0\n", 2, "is not a text file"),
    "a picture": (b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR", 2, "is not a text file"),
    "latin-1": ("model: modèle\n".encode("latin-1"), 2, ":1: is not UTF-8 text (byte 0xe8)"),
    "utf-16": (RECIPE.decode().encode("utf-16"), 2, "is not UTF-8 text"),
    "a control character": (b"model: a\x07b\n", 2, "holds the character U+0007"),
    "half a character": (b'model: "\\ud800"\n', 2, "recipe.yaml"),
    "too large": (b"# " + b"x" * (1 << 20) + b"\n", 2, "is larger than 1024 KiB"),
    "an alias bomb": (bomb(), 2, "holds more than 10000 values"),
    "an alias of itself": (b"model: &a [*a]\n", 2, "is nested deeper than 24 levels"),
    "an unknown alias": (b"model: *nobody\n", 2, "is not YAML"),
    "deep nesting": (b"model: " + b"[" * 50_000, 2, "is nested deeper than 24 levels"),
    "an object": (b"model: !!python/object/apply:os.system [ls]\n", 2, "only plain data is"),
    "a tag": (b"model: !model x\n", 2, "the tag '!model' is not allowed"),
    "a tag that lies": (b"seed: !!int x\n", 2, "'x' is not a value of the type int"),
    "a date": (swap(b"out: engine", b"out: !!timestamp 2024-01-01"), 2, "the tag '!!timestamp' is not allowed"),
    "a key that is a list": (b"? [a, b]\n: 1\n", 2, "a key must be a plain word"),
    "a key given twice": (swap(b"out: engine", b"out: a\nout: b"), 2, "the key 'out' is there twice"),
    "a nested key given twice": (swap(b"steps: 6", b"steps: 6, steps: 7"), 2, "the key 'sampler.steps' is there twice"),
    "a merge key": (swap(b"out: engine", b"out: engine\n<<: {seed: 1}"), 2, "<<: is not a known key"),
    "an endless number": (swap(b"steps: 6", b"steps: " + b"9" * 5000), 2, "is not a value of the type int"),
    "a huge number": (swap(b"steps: 6", b"steps: 99999999999999999999"), 2, "sampler.steps"),
    "no schema version": (swap(b"schema_version: 1\n", b""), 2, "schema_version: is missing"),
    "a later schema version": (swap(b"schema_version: 1", b"schema_version: 9"), 2, "9 is not allowed; known: 1"),
    "no model": (swap(b"model: model\n", b""), 2, "model: is missing"),
    "no targets": (swap(b"[onnxruntime-cpu]", b"[]"), 2, "targets: must not be empty"),
    "targets as text": (swap(b"[onnxruntime-cpu]", b"onnxruntime-cpu"), 2, "targets: is the text"),
    "an unknown key": (swap(b"out: engine", b"output: engine"), 2, "output: is not a known key"),
    "an unknown pass": (
        swap(b"- cache:", b"- prun:"),
        2,
        "'prun' is not a pass; known: prune, distill, quantize, solver, cache, fuse",
    ),
    "passes as a mapping": (RECIPE.replace(b"  - ", b"  "), 2, "passes: is a mapping, not a list of passes"),
    "two passes in one item": (RECIPE.replace(b"  - cache", b"    cache"), 2, "passes[0]: is 2 keys, not one pass"),
    "an empty pass": (swap(b"quantize: {scheme: int8-w8a8}", b"quantize:"), 2, "quantize.scheme: is missing"),
    "a pass that is a number": (swap(b"- cache: {cut: 1, interval: 2}", b"- 7"), 2, "passes[1]: is the number 7"),
    "a wrong scheme": (swap(b"int8-w8a8", b"int9-w9a9"), 2, "'int9-w9a9' is not a scheme; known: "),
    "an order that is not legal": (
        RECIPE.replace(b"  - quantize: {scheme: int8-w8a8}\n", b"").replace(
            b"interval: 2}\n", b"interval: 2}\n  - quantize: {scheme: int8-w8a8}\n"
        ),
        2,
        "the legal order is prune < distill < quantize < solver < cache < fuse",
    ),
    "steps of 0": (swap(b"steps: 6", b"steps: 0"), 2, "it must be at least 1"),
    "steps as text": (swap(b"steps: 6", b'steps: "6"'), 2, "the text '6', not an integer"),
    "guidance that is no number": (swap(b"guidance_scale: 2.0", b"guidance_scale: .nan"), 2, "not a finite number"),
    "an unknown scheduler": (swap(b"DDIMScheduler", b"DDIM2Scheduler"), 2, "did you mean 'DDIMScheduler'?"),
    "a batch upside down": (swap(b"[1, 1, 2]", b"[2, 1, 1]"), 2, "shapes.batch: [2, 1, 1] must rise"),
    "a height of 0": (swap(b"height: 16", b"height: 0"), 2, "shapes.height: 0 must rise from at least 1"),
    "no prompts file": (swap(b"prompts.txt", b"nowhere.txt"), 2, "there is no file 'nowhere.txt'"),
    "a gate with nothing measured": (RECIPE + b"gates: {ssim: {min: 0.5}}\n", 2, "gates: needs the key evaluate"),
    "an engine over the model": (swap(b"out: engine", b"out: model"), 2, "would replace a folder"),
    "an engine over everything": (swap(b"out: engine", b"out: /"), 2, "would replace a folder"),
    "no calibration": (swap(b"calibration: {prompts: prompts.txt, samples: 1}\n", b""), 2, "needs the key calibration"),
    "a model that is not there": (swap(b"model: model", b"model: nowhere"), 3, "nowhere"),
    "a cut that is not there": (swap(b"cut: 1", b"cut: 99"), 3, "there is no cut 99"),
    "an interval of 1": (swap(b"interval: 2", b"interval: 1"), 2, "passes[1].cache.interval: "),
    "a height between latent pixels": (swap(b"height: 16", b"height: 17"), 3, "height"),
    "a scheduler that is not linear": (
        swap(b"steps: 6,", b"steps: 6, options: {thresholding: true},"),
        3,
        "thresholding",
    ),
    "an option the scheduler has not": (swap(b"steps: 6,", b"steps: 6, options: {etta: 0},"), 3, "etta"),
    "more samples than prompts": (swap(b"samples: 1", b"samples: 100"), 3, "holds 1 prompts, but 100"),
}


@pytest.fixture
def workplace(tmp_path: Path) -> Path:
    """Make a folder with prompts and an empty model folder, where recipes are tried."""
    (tmp_path / "prompts.txt").write_text("a red circle\n")
    (tmp_path / "model").mkdir()
    return tmp_path


def put_model(workplace: Path, tiny_folder: Callable[[str], Path]) -> None:
    (workplace / "model").rmdir()
    (workplace / "model").symlink_to(tiny_folder("unet"))


@pytest.mark.parametrize("what", RECIPES)
def test_a_malformed_recipe(what: str, workplace: Path, tiny_folder: Callable[[str], Path], refused: Refused) -> None:
    content, code, expected = RECIPES[what]
    if code == 3:
        put_model(workplace, tiny_folder)
    (workplace / "recipe.yaml").write_bytes(content)
    sentence = refused(code, "recipe.yaml", "--dry-run")
    assert expected in sentence
    if code == 2:
        assert sentence.startswith("compress: recipe.yaml:")


def test_the_recipe_that_is_mutated_is_sound(
    workplace: Path, tiny_folder: Callable[[str], Path], capsys: pytest.CaptureFixture[str]
) -> None:
    put_model(workplace, tiny_folder)
    (workplace / "recipe.yaml").write_bytes(RECIPE)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(workplace)
        assert main(["recipe.yaml", "--dry-run", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["edits"]


@pytest.mark.parametrize("seed", range(24))
def test_a_recipe_with_random_damage(seed: int, workplace: Path, refused: Refused) -> None:
    """Bytes are dropped, doubled or replaced until the recipe is no longer read as it was."""
    from compress.errors import RecipeError
    from compress.recipe.schema import Recipe

    (workplace / "recipe.yaml").write_bytes(RECIPE)
    sound = Recipe.load(workplace / "recipe.yaml")
    dice = random.Random(seed)
    raw = bytearray(RECIPE)
    while True:
        at = dice.randrange(len(raw))
        match dice.randrange(3):
            case 0:
                del raw[at]
            case 1:
                raw[at:at] = bytes([raw[at]]) * dice.randrange(1, 4)
            case 2:
                raw[at] = dice.choice(b"\t\n :{}[]&*!%@`'\"#-?,x0\x00\xff")
        (workplace / "recipe.yaml").write_bytes(bytes(raw))
        try:
            if Recipe.load(workplace / "recipe.yaml") != sound:
                return  # still a recipe, and another one: whether its model takes it is not asked here
        except RecipeError:
            break
    refused(2, "recipe.yaml", "--dry-run")


def test_paths_that_are_no_recipes(tmp_path: Path, refused: Refused) -> None:
    (tmp_path / "folder.yaml").mkdir()
    (tmp_path / "loop.yaml").symlink_to("loop.yaml")
    assert "this is a folder" in refused(2, "folder.yaml")
    assert "there is no such file" in refused(2, "nowhere.yaml")
    assert "loop.yaml: cannot be read" in refused(2, "loop.yaml")
    assert "nowhere" in refused(2, "nowhere")


@pytest.mark.skipif(os.geteuid() == 0, reason="the superuser may read every file")
def test_a_recipe_that_may_not_be_read(tmp_path: Path, refused: Refused) -> None:
    (tmp_path / "secret.yaml").write_bytes(RECIPE)
    (tmp_path / "secret.yaml").chmod(0)
    assert "Permission denied" in refused(2, "secret.yaml")


UNET = "unet/diffusion_pytorch_model.safetensors"


def edit_json(file: str, **changes: object) -> Callable[[Path], object]:
    def mutate(model: Path) -> None:
        content = json.loads((model / file).read_text()) | changes
        (model / file).write_text(json.dumps({key: value for key, value in content.items() if value != "DELETE"}))

    return mutate


def write(file: str, content: bytes) -> Callable[[Path], object]:
    return lambda model: (model / file).write_bytes(content)


def remove(file: str) -> Callable[[Path], object]:
    return lambda model: shutil.rmtree(model / file) if (model / file).is_dir() else (model / file).unlink()


def cut_off(file: str, keep: float) -> Callable[[Path], object]:
    return lambda model: os.truncate(model / file, int((model / file).stat().st_size * keep))


def poison(value: float) -> Callable[[Path], object]:
    def mutate(model: Path) -> None:
        from safetensors.numpy import load_file, save_file

        tensors = load_file(model / UNET)
        name = max(tensors, key=lambda key: tensors[key].size)
        tensors[name].flat[tensors[name].size // 2] = np.float32(value)
        save_file(tensors, model / UNET)

    return mutate


def change_tensors(change: Callable[[dict[str, np.ndarray]], object]) -> Callable[[Path], object]:
    def mutate(model: Path) -> None:
        from safetensors.numpy import load_file, save_file

        tensors = load_file(model / UNET)
        change(tensors)
        save_file(tensors, model / UNET)

    return mutate


def pickled(model: Path) -> None:
    (model / UNET).unlink()
    (model / "unet" / "diffusion_pytorch_model.bin").write_bytes(b"\x80\x04\x95")


def linked_out(model: Path) -> None:
    outside = model.parent / "outside.safetensors"
    shutil.move(model / UNET, outside)
    (model / UNET).symlink_to(outside)


def from_another_model(model: Path) -> None:
    shutil.copy(model / "vae" / "diffusion_pytorch_model.safetensors", model / UNET)


def lying_header(model: Path) -> None:
    raw = bytearray((model / UNET).read_bytes())
    raw[:8] = (1 << 60).to_bytes(8, "little")
    (model / UNET).write_bytes(bytes(raw))


MODELS: dict[str, tuple[Callable[[Path], object], str]] = {
    "no model_index": (remove("model_index.json"), "neither manifest.json"),
    "an empty model_index": (write("model_index.json", b""), "model_index.json"),
    "a model_index that is a list": (write("model_index.json", b"[]"), "must hold a JSON object"),
    "a model_index that is no text": (write("model_index.json", b"\xff\xfe\0"), "model_index.json"),
    "a deep model_index": (write("model_index.json", b"[" * 100_000), "model_index.json"),
    "an unknown pipeline": (edit_json("model_index.json", _class_name="KolorsPipeline"), "is not a supported pipeline"),
    "a pipeline that is a number": (edit_json("model_index.json", _class_name=7), "is not a supported pipeline"),
    "no denoiser in the index": (edit_json("model_index.json", unet="DELETE"), "has no 'unet'"),
    "an unknown component": (edit_json("model_index.json", extra=["diffusers", "UNet"]), "'extra'"),
    "a component of code": (edit_json("model_index.json", unet=["my_code", "Evil"]), "'Evil'"),
    "an entry that is too long": (edit_json("model_index.json", unet=["a", "b", "c"]), "must be [library, class]"),
    "no denoiser folder": (remove("unet"), "is missing"),
    "no denoiser configuration": (remove("unet/config.json"), "config.json is missing"),
    "a broken configuration": (write("unet/config.json", b"{"), "config.json"),
    "a configuration of another class": (
        edit_json("unet/config.json", _class_name="DiTTransformer2DModel"),
        "is wrong",
    ),
    "a configuration of another width": (edit_json("unet/config.json", block_out_channels=[16, 64]), "not of the same"),
    "a configuration with a text for a number": (edit_json("unet/config.json", in_channels="four"), "config.json"),
    "a configuration of a giant": (edit_json("unet/config.json", block_out_channels=[1 << 20, 1 << 20]), "unet"),
    "a negative width": (edit_json("unet/config.json", block_out_channels=[-16, 32]), "unet"),
    "a sample size that is a list": (edit_json("unet/config.json", sample_size=[8, 8]), "sample_size"),
    "a quantized checkpoint": (edit_json("unet/config.json", quantization_config={"bits": 4}), "quantized weights"),
    "no weights": (remove(UNET), "is missing"),
    "empty weights": (write(UNET, b""), "is truncated"),
    "weights cut in the header": (cut_off(UNET, 0.001), "is truncated"),
    "weights cut in the middle": (cut_off(UNET, 0.5), "is truncated"),
    "weights cut at the end": (cut_off(UNET, 0.9999), "is truncated"),
    "a header that lies about its length": (lying_header, "is truncated"),
    "weights that are text": (write(UNET, b"version https://git-lfs.github.com/spec/v1\n"), "is truncated"),
    "weights in a pickle": (pickled, "is a pickle"),
    "weights behind a link": (linked_out, "leads out of the model folder"),
    "weights of another model": (from_another_model, "not of the same model"),
    "NaN in a weight": (poison(float("nan")), "holds NaN or Inf"),
    "infinity in a weight": (poison(float("inf")), "holds NaN or Inf"),
    "a missing tensor": (change_tensors(lambda tensors: tensors.pop("conv_in.bias")), "lacks tensor 'conv_in.bias'"),
    "an extra tensor": (
        change_tensors(lambda tensors: tensors.update(extra=np.zeros(3, np.float32))),
        "has the unexpected tensor",
    ),
    "a tensor of another shape": (
        change_tensors(lambda tensors: tensors.update({"conv_in.bias": np.zeros(3, np.float32)})),
        "with shape (3,)",
    ),
    "no VAE": (remove("vae"), "is missing"),
    "another VAE class": (edit_json("model_index.json", vae=["diffusers", "AutoencoderTiny"]), "'AutoencoderTiny'"),
    "a VAE with other latents": (edit_json("vae/config.json", latent_channels=8), "vae"),
    "no text encoder": (remove("text_encoder"), "is missing"),
    "a text encoder of another width": (edit_json("text_encoder/config.json", hidden_size=32), "text_encoder"),
    "no tokenizer": (remove("tokenizer"), "is missing"),
    "a broken tokenizer": (write("tokenizer/tokenizer.json", b"{}"), "tokenizer"),
    "no scheduler": (remove("scheduler"), "is missing"),
    "a broken scheduler": (write("scheduler/scheduler_config.json", b"nonsense"), "scheduler_config.json"),
}


@pytest.mark.parametrize("what", MODELS)
def test_a_malformed_model(what: str, tmp_path: Path, tiny_folder: Callable[[str], Path], refused: Refused) -> None:
    mutate, expected = MODELS[what]
    shutil.copytree(tiny_folder("unet"), tmp_path / "model")
    mutate(tmp_path / "model")
    assert expected in refused(3, "inspect", "model")


def test_a_malformed_model_stops_a_recipe_too(
    tmp_path: Path, tiny_folder: Callable[[str], Path], refused: Refused
) -> None:
    (tmp_path / "prompts.txt").write_text("a red circle\n")
    (tmp_path / "recipe.yaml").write_bytes(RECIPE)
    shutil.copytree(tiny_folder("unet"), tmp_path / "model")
    cut_off(UNET, 0.5)(tmp_path / "model")
    assert "is truncated" in refused(3, "recipe.yaml")


def reseal(engine: Path, change: Callable[[dict[str, Any]], object] = lambda manifest: None) -> None:
    """Change an engine as somebody would who knows how its hashes are made."""
    from export.manifest import Manifest

    run = {path for path, entry in json.loads((engine / "manifest.json").read_text())["files"].items() if entry["run"]}
    manifest = Manifest.from_json((engine / "manifest.json").read_text()).sealed(engine, run)
    raw = json.loads(manifest.to_json())
    change(raw)
    try:
        raw["engine_hash"] = Manifest.from_json(json.dumps(raw)).digest()
    except EngineError:
        pass  # the reader will say so too
    (engine / "manifest.json").write_text(json.dumps(raw))


def resealed(change: Callable[[dict[str, Any]], object]) -> Callable[[Path], object]:
    return lambda engine: reseal(engine, change)


def resealed_file(file: str, content: bytes) -> Callable[[Path], object]:
    def mutate(engine: Path) -> None:
        (engine / file).write_bytes(content)
        reseal(engine)

    return mutate


def flip(file: str) -> Callable[[Path], object]:
    def mutate(engine: Path) -> None:
        raw = bytearray((engine / file).read_bytes())
        raw[len(raw) // 2] ^= 1
        (engine / file).write_bytes(bytes(raw))

    return mutate


def edit_plan(change: Callable[[dict[str, Any]], object]) -> Callable[[Path], object]:
    def mutate(engine: Path) -> None:
        plan = json.loads((engine / "step_plan.json").read_text())
        change(plan)
        (engine / "step_plan.json").write_text(json.dumps(plan))
        reseal(engine)

    return mutate


def link(file: str) -> Callable[[Path], object]:
    def mutate(engine: Path) -> None:
        outside = engine.parent / "outside"
        shutil.move(engine / file, outside)
        (engine / file).symlink_to(outside)

    return mutate


def edit_golden(value: float) -> Callable[[Path], object]:
    def mutate(engine: Path) -> None:
        path = engine / "golden" / "onnxruntime-cpu.npy"
        latents = np.load(path)
        np.save(path, np.full_like(latents, value))
        reseal(engine)

    return mutate


def pickled_golden(engine: Path) -> None:
    np.save(engine / "golden" / "onnxruntime-cpu.npy", np.array([{"a": 1}], dtype=object), allow_pickle=True)
    reseal(engine)


def foreign_weights(engine: Path) -> None:
    """Point a graph's weights at a file outside the engine."""
    import onnx

    (engine.parent / "secret").write_bytes(b"x" * 4096)
    graph = onnx.load(engine / "vae_decoder" / "model.onnx", load_external_data=False)
    for tensor in graph.graph.initializer:
        for entry in tensor.external_data:
            if entry.key == "location":
                entry.value = "../../secret"
    onnx.save(graph, engine / "vae_decoder" / "model.onnx")
    reseal(engine)


ENTRY = "time-down_1"
GRAPH, POOL = f"unet/{ENTRY}.onnx", "unet/weights.bin"


def row(manifest: dict[str, Any]) -> dict[str, Any]:
    found: dict[str, Any] = manifest["targets"]["onnxruntime-cpu"]
    return found


ENGINES: dict[str, tuple[Callable[[Path], object], str]] = {
    "no manifest": (remove("manifest.json"), "has no manifest.json"),
    "an empty manifest": (write("manifest.json", b""), "manifest.json"),
    "a manifest that is a list": (write("manifest.json", b"[]"), "manifest.json"),
    "a manifest that is no text": (write("manifest.json", b"\xff\xfe\0"), "manifest.json"),
    "a manifest nested deeply": (write("manifest.json", b"[" * 100_000), "manifest.json"),
    "a later schema version": (edit_json("manifest.json", schema_version=99), "schema version 99"),
    "no schema version": (edit_json("manifest.json", schema_version="DELETE"), "manifest.json"),
    "an unknown key": (edit_json("manifest.json", extra=1), "manifest.json"),
    "a missing key": (edit_json("manifest.json", latent="DELETE"), "manifest.json"),
    "targets that are a list": (edit_json("manifest.json", targets=[]), "manifest.json"),
    "no targets": (edit_json("manifest.json", targets={}), "names no target"),
    "files that are text": (edit_json("manifest.json", files="all"), "manifest.json"),
    "another family": (edit_json("manifest.json", family="other"), "was changed after"),
    "another hash": (edit_json("manifest.json", engine_hash="0" * 64), "was changed after"),
    "a path that climbs out": (resealed(lambda m: row(m)["graphs"].update({ENTRY: "../entry.onnx"})), "leads out"),
    "an absolute path": (resealed(lambda m: row(m)["graphs"].update({ENTRY: "/etc/hostname"})), "leads out"),
    "a path with a backslash": (resealed(lambda m: row(m)["graphs"].update({ENTRY: "..\\x.onnx"})), "leads out"),
    "a tokenizer elsewhere": (resealed(lambda m: m["tokenizers"].update(tokenizer="../..")), "leads out"),
    "a graph that is not listed": (
        resealed(lambda m: row(m)["graphs"].update({ENTRY: "unet/x.onnx"})),
        "does not list",
    ),
    "a graph for no segment": (resealed(lambda m: row(m)["graphs"].pop(ENTRY)), "no graph for the segment"),
    "an unknown backend": (resealed(lambda m: row(m).update(backend="evil")), "the backend 'evil' is unknown"),
    "an unknown option": (resealed(lambda m: row(m)["options"].update({ENTRY: {"provider": "x"}})), "option"),
    "a height of zero": (resealed(lambda m: m["shapes"].update(height=[0, 0, 0])), "shapes.height"),
    "a latent of another size": (resealed(lambda m: m["latent"].update(channels=7)), "(2, 7, 8, 8)"),
    "a latent with an unknown key": (resealed(lambda m: m["latent"].update(extra=7)), "latent cannot be read"),
    "a latent that is text": (resealed(lambda m: m["latent"].update(channels="4")), "makes no sense"),
    "a latent scaled by nothing": (resealed(lambda m: m["latent"].update(scaling_factor=0.0)), "makes no sense"),
    "a latent that is huge": (resealed(lambda m: m["latent"].update(downscale=10**12)), "makes no sense"),
    "a conditioning of no kind": (resealed(lambda m: m["conditioning"].update(kind="magic")), "magic"),
    "a flipped bit in a graph": (flip(GRAPH), f"is damaged: {GRAPH}"),
    "a flipped bit in the weights": (flip(POOL), "is damaged: unet/weights.bin"),
    "a flipped bit in the plan": (flip("step_plan.json"), "is damaged: step_plan.json"),
    "a flipped bit in a tokenizer": (flip("tokenizer/tokenizer.json"), "is damaged: tokenizer/tokenizer.json"),
    "truncated weights": (cut_off(POOL, 0.5), "is damaged: unet/weights.bin"),
    "missing weights": (remove(POOL), "unet/weights.bin is missing"),
    "a missing folder": (remove("tokenizer"), "is missing"),
    "weights behind a link": (link(POOL), "is a link"),
    "a folder behind a link": (link("unet"), "is a link"),
    "a graph that is text": (resealed_file(GRAPH, b"not a graph"), f"{ENTRY}.onnx"),
    "an empty graph": (resealed_file(GRAPH, b""), f"{ENTRY}.onnx"),
    "another graph in its place": (
        lambda engine: (shutil.copy(engine / "unet/up_1-head.onnx", engine / GRAPH), reseal(engine)),
        ENTRY,
    ),
    "empty weights": (resealed_file(POOL, b""), "cannot load"),
    "weights outside the engine": (foreign_weights, "External data path"),
    "a plan that is text": (resealed_file("step_plan.json", b"{"), "step plan"),
    "a plan of a later version": (edit_plan(lambda plan: plan.update(schema_version=9)), "schema version 9"),
    "a plan without steps": (edit_plan(lambda plan: plan.update(steps=[])), "no steps"),
    "a plan with NaN": (edit_plan(lambda plan: plan["steps"][0].update(t=float("nan"))), "step 0"),
    "a plan that reads what is not there": (edit_plan(lambda plan: plan["steps"].pop(0)), "step 0"),
    "a plan with an unknown path": (edit_plan(lambda plan: plan["steps"][1].update(path="magic")), "magic"),
    "a plan with an unknown key": (edit_plan(lambda plan: plan.update(extra=1)), "step plan"),
    "a tokenizer that is empty": (resealed_file("tokenizer/tokenizer.json", b"{}"), "tokenizer"),
    "golden latents that differ": (edit_golden(1.0), "differ from the golden ones"),
    "golden latents of NaN": (edit_golden(float("nan")), "golden"),
    "golden latents in a pickle": (pickled_golden, "cannot be read"),
}


@pytest.mark.parametrize("what", ENGINES)
def test_a_malformed_engine(what: str, tmp_path: Path, tiny_engine: Path, refused: Refused) -> None:
    mutate, expected = ENGINES[what]
    shutil.copytree(tiny_engine, tmp_path / "engine")
    mutate(tmp_path / "engine")
    assert expected in refused(3, "verify", "engine", "--target", "onnxruntime-cpu")


def test_the_engine_that_is_mutated_is_sound(tiny_engine: Path, tmp_path: Path) -> None:
    assert main(["verify", str(tiny_engine)]) == 0
    shutil.copytree(tiny_engine, tmp_path / "engine")
    reseal(tmp_path / "engine")
    assert main(["verify", str(tmp_path / "engine")]) == 0


RUNS: dict[str, tuple[int, list[str], str]] = {
    "no prompt": (2, [], "needs --prompt"),
    "no engine": (3, ["--prompt", "x", "-o", "x.png"], "there is no engine"),
    "another ending": (2, ["--prompt", "x", "-o", "x.jpg"], "written as .png"),
    "one file for two pictures": (2, ["--prompt", "x", "--count", "2", "-o", "x.png"], "name a folder"),
    "a negative seed": (2, ["--prompt", "x", "-o", "x.png", "--seed", "-1"], "--seed must be"),
    "a seed that is text": (2, ["--prompt", "x", "-o", "x.png", "--seed", "x"], "--seed: invalid int value"),
    "no threads": (2, ["--prompt", "x", "-o", "x.png", "--threads", "0"], "--threads must be"),
    "a mask without a picture": (2, ["--prompt", "x", "-o", "x.png", "--mask", "m.png"], "--mask needs --init-image"),
    "too much strength": (2, ["--prompt", "x", "-o", "x.png", "--strength", "1.5"], "--strength must be"),
    "an unknown target": (3, ["--prompt", "x", "-o", "x.png", "--target", "tpu"], "was not built for 'tpu'"),
    "a height between latent pixels": (3, ["--prompt", "x", "-o", "x.png", "--height", "17"], "17"),
    "a picture that is not there": (3, ["--prompt", "x", "-o", "x.png", "--init-image", "no.png"], "no such file"),
    "a picture that is text": (3, ["--prompt", "x", "-o", "x.png", "--init-image", "text.png"], "is not a picture"),
    "a folder that is a file": (3, ["--prompt", "x", "-o", "text.png/x.png"], "no folder that may be written to"),
}


@pytest.mark.parametrize("what", RUNS)
def test_a_run_that_cannot_be(what: str, tmp_path: Path, tiny_engine: Path, refused: Refused) -> None:
    code, words, expected = RUNS[what]
    (tmp_path / "text.png").write_text("not a picture")
    engine = "nowhere" if what == "no engine" else str(tiny_engine)
    out = [] if "-o" in words else ["-o", "x.png"]
    assert expected in refused(code, "run", engine, *words, *out)


def test_the_program_itself_says_one_sentence(tmp_path: Path) -> None:
    """The same, as a user meets it: in a process of its own, with whatever libraries print."""
    (tmp_path / "recipe.yaml").write_bytes(swap(b"steps: 6", b"steps: six"))
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "model_index.json").write_text("{}")
    for code, words in ((2, ["recipe.yaml"]), (3, ["inspect", "model"])):
        command = [sys.executable, "-m", "compress", *words]
        environment = {**os.environ, "PYTHONPATH": str(ROOT)}
        done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False, env=environment)
        assert (done.returncode, done.stdout) == (code, "")
        assert done.stderr.startswith("compress: ")
        assert done.stderr.count("\n") == 1
