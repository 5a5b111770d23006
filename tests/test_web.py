"""The target `web`: folders that a browser runs, and what is said where a part of one is missing."""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from compress.cli import main
from compress.compiler import targets_of
from compress.engine.export_engine import export_engine
from compress.engine.proof import GOLDEN_TOLERANCE
from compress.errors import RecipeError
from compress.inspect import stock_of_engine
from compress.measure.size import engine_size
from compress.model.latent_diffusion import LatentDiffusion, load
from compress.recipe.schema import Recipe
from compress.store import Store
from export.engine import Engine, EngineError, relative_error
from export.manifest import read_manifest
from export.target import TARGETS, require_buildable
from export.to_web import FOLDER, PROCESSOR, PageOptions, find_package, write_page
from recipes.benchmarks import browser
from tests import tiny_engine as toy

ROOT = Path(__file__).parent.parent
Folder = Callable[[str], Path]
PROMPT = "a red circle above the large ring"
PACKAGE = os.environ.get("ONNXRUNTIME_WEB", "")
"""Where onnxruntime-web is, if not in `node_modules`."""

RECIPE = """
schema_version: 1
model: {model}
sampler: {{scheduler: EulerDiscreteScheduler, steps: 2, guidance_scale: 3.0}}
passes: []
targets: [{targets}]
shapes: {{height: 16, width: 16}}
{more}
out: {out}
"""


def package(folder: Path, version: str = "1.30.0", **more: str) -> Path:
    """A folder that looks like an installed onnxruntime-web."""
    (folder / "dist").mkdir(parents=True)
    told = {"name": "onnxruntime-web", "version": version, "license": "MIT", **more}
    (folder / "package.json").write_text(json.dumps(told))
    for name in PageOptions().files:
        (folder / "dist" / name).write_text(f"content of {name}")
    return folder


def exported(model: LatentDiffusion, options: PageOptions, folder: Path, store: Store) -> Path:
    """An engine for browsers, and for ONNX Runtime on the same graphs."""
    targets = [TARGETS["onnxruntime-cpu"], replace(TARGETS["web"], page=options)]
    export_engine(model, targets, toy.SHAPES, folder, golden_prompts=["a red circle"], store=store)
    return folder


@pytest.fixture(scope="module")
def folder(tiny_folder: Folder, engine_store: Store, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The toy engine, cut, cached and quantized, with a page whose runtime is made up."""
    place = tmp_path_factory.mktemp("web")
    options = PageOptions(str(package(place / "package")))
    return exported(toy.tiny_model(tiny_folder("unet")), options, place / "engine", engine_store)


def test_the_page_lies_in_the_folder_hashed_beside_the_graphs_it_shares(folder: Path) -> None:
    manifest = read_manifest(folder)
    row = manifest.targets["web"]
    assert row.graphs == manifest.targets["onnxruntime-cpu"].graphs
    assert row.evidence == "built"
    assert row.build == {"runtime": "onnxruntime-web 1.30.0", "licence": "MIT"}
    page = {path for path in manifest.files if path == "index.html" or path.startswith("web/")}
    assert {f"{FOLDER}/{name}" for name in PageOptions().files} < page
    ours = {path.relative_to(ROOT / "export/site").as_posix() for path in (ROOT / "export/site").rglob("*.*")}
    assert ours < page
    assert not any(manifest.files[path].run for path in page)


def test_the_page_changes_neither_the_engine_nor_its_size(
    folder: Path, tiny_folder: Folder, engine_store: Store, tmp_path: Path
) -> None:
    model = toy.tiny_model(tiny_folder("unet"))
    other = exported(model, PageOptions(str(package(tmp_path / "package", "1.31.0"))), tmp_path / "again", engine_store)
    first, second = read_manifest(folder), read_manifest(other)
    assert first.engine_hash == second.engine_hash
    differing = {path for path, entry in first.files.items() if second.files[path] != entry}
    assert not differing
    assert engine_size(folder, "web").parts == engine_size(folder, "onnxruntime-cpu").parts
    assert stock_of_engine(folder)["targets"]["web"]["build"]["runtime"] == "onnxruntime-web 1.30.0"


def test_an_engine_for_browsers_is_not_opened_here(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(EngineError, match="an engine for the web is run by a browser: serve its folder"):
        Engine.open(folder, target="web")
    assert Engine.open(folder).target == "onnxruntime-cpu"
    assert main(["inspect", str(folder)]) == 0
    assert "web: a page that runs on onnxruntime-web 1.30.0 (MIT)" in capsys.readouterr().out


def test_pages_without_webgpu_are_smaller(tmp_path: Path) -> None:
    options = PageOptions(str(package(tmp_path / "package")), webgpu=False)
    write_page(options, tmp_path / "engine")
    assert sorted(path.name for path in (tmp_path / "engine" / FOLDER).iterdir()) == sorted(PROCESSOR)


def test_the_runtime_is_found_above_and_missed_in_one_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a" / "b").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "a" / "b")
    with pytest.raises(
        EngineError, match=r"run `npm install onnxruntime-web@1\.30`, or name its folder with the recipe"
    ):
        require_buildable(TARGETS["web"])
    place = package(tmp_path / "node_modules" / "onnxruntime-web")
    assert find_package(PageOptions()).folder == place
    require_buildable(TARGETS["web"])
    (place / "dist" / PROCESSOR[2]).unlink()
    with pytest.raises(
        EngineError, match=rf"\(1\.30\.0\) does not serve the target web: its dist has no {PROCESSOR[2]}"
    ):
        find_package(PageOptions())


def test_a_folder_that_is_no_runtime_is_refused(tmp_path: Path) -> None:
    with pytest.raises(
        EngineError, match=r"is not the npm package onnxruntime-web \(its package\.json cannot be read\)"
    ):
        find_package(PageOptions(str(tmp_path)))
    other = package(tmp_path / "other", name="onnxruntime-node")
    with pytest.raises(EngineError, match="does not serve the target web: it is onnxruntime-node"):
        find_package(PageOptions(str(other)))


def test_a_tokenizer_that_the_page_cannot_read_is_refused(tmp_path: Path, folder: Path) -> None:
    content = json.loads((folder / "tokenizer" / "tokenizer.json").read_text())
    content["normalizer"] = {"type": "Sequence", "normalizers": [{"type": "NFC"}, {"type": "BertNormalizer"}]}
    (tmp_path / "engine" / "tokenizer").mkdir(parents=True)
    (tmp_path / "engine" / "tokenizer" / "tokenizer.json").write_text(json.dumps(content))
    options = PageOptions(str(package(tmp_path / "package")))
    with pytest.raises(EngineError, match=r"tokenizer/tokenizer\.json: its normalizer is of the kind BertNormalizer"):
        write_page(options, tmp_path / "engine")
    assert not (tmp_path / "engine" / "index.html").exists()


def recipe(tmp_path: Path, tiny_folder: Folder, targets: str, more: str = "") -> Path:
    path = tmp_path / "recipe.yaml"
    path.write_text(RECIPE.format(model=tiny_folder("unet"), targets=targets, more=more, out=tmp_path / "engine"))
    return path


def test_a_recipe_names_the_runtime(tmp_path: Path, tiny_folder: Folder) -> None:
    package(tmp_path / "package")
    path = recipe(tmp_path, tiny_folder, "web", "web: {onnxruntime: package, webgpu: false}")
    read = Recipe.load(path)
    assert Recipe.load(path) == read
    assert targets_of(read)[0].page == PageOptions(str(tmp_path / "package"), webgpu=False)
    with pytest.raises(RecipeError, match="web: is for the target web, which the recipe does not have"):
        Recipe.load(recipe(tmp_path, tiny_folder, "onnxruntime-cpu", "web: {webgpu: false}"))


def test_a_run_without_the_runtime_is_refused_before_anything_is_computed(
    tmp_path: Path, tiny_folder: Folder, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    path = recipe(tmp_path, tiny_folder, "web")
    monkeypatch.chdir(tmp_path)
    assert main([str(path)]) == 3
    assert "the target web needs the npm package onnxruntime-web" in capsys.readouterr().err
    assert not (tmp_path / "engine").exists()


# In a browser.


@pytest.fixture(scope="module")
def runtime() -> PageOptions:
    """The real runtime."""
    if browser.installed() is None:
        pytest.skip("no Chromium is installed")
    options = PageOptions(PACKAGE)
    try:
        find_package(options)
    except EngineError as error:
        pytest.skip(str(error))
    return options


@pytest.fixture(scope="module")
def chromium(runtime: PageOptions) -> Iterator[browser.Browser]:
    with browser.opened() as running:
        yield running


GENERATE = """
const { Engine } = await import("./web/engine.js");
const engine = await Engine.open({ device: "cpu" });
const seen = [];
const found = [];
for (const options of data) {
    const onStep = ({ step, steps, preview }) => seen.push([step, steps, preview?.pixels.length ?? 0]);
    const picture = await engine.generate(options.prompt, { ...options, onStep });
    found.push({ ...picture, pixels: Array.from(picture.pixels), latent: Array.from(picture.latent) });
}
engine.close();
return { found, seen, fetched: engine.fetched, reused: engine.reused };
"""


def pictures(page: browser.Page, asked: list[dict[str, Any]]) -> Any:
    return page.run(f"const data = {json.dumps(asked)}; {GENERATE}")


def require_equal(found: Any, engine: Engine, prompt: Any, seed: int, integer: bool, **more: Any) -> None:
    """The browser's latents and pixels are those of ONNX Runtime here, as far as golden latents must be."""
    latents = engine.sample([prompt], [seed], **more)
    got = np.array(found["latent"], np.float32).reshape(latents.shape)
    assert relative_error(got, latents) <= GOLDEN_TOLERANCE[integer]
    pixels = np.array(found["pixels"], np.uint8).reshape(found["height"], found["width"], 4)
    require_close(pixels, engine.decode(latents)[0], integer)


def require_close(pixels: np.ndarray, expected: np.ndarray, integer: bool) -> None:
    """In integers one value may round the other way, and moves all that follow by a little."""
    difference = np.abs(pixels[..., :3].astype(int) - expected)
    assert expected.std() > 10
    assert difference.max() <= (16 if integer else 1)
    assert difference.mean() <= (2.0 if integer else 0.05)
    assert (pixels[..., 3] == 255).all()


def of_family(family: str, tiny_folder: Folder) -> LatentDiffusion:
    return toy.tiny_model(tiny_folder(family)) if family == "unet" else toy.sampled(load(tiny_folder(family)))


@pytest.fixture(scope="module")
def served(
    runtime: PageOptions, tiny_folder: Folder, engine_store: Store, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[tuple[Path, str]]:
    """The toy engine, cut, cached and quantized, and where a static server has it."""
    place = tmp_path_factory.mktemp("served") / "engine"
    exported(of_family("unet", tiny_folder), runtime, place, engine_store)
    with browser.served(place) as address:
        yield place, address


def test_a_browser_draws_what_python_draws(chromium: browser.Browser, served: tuple[Path, str]) -> None:
    """Cut, cached, int8: equal pictures, previews, equal runs, nothing asked from another host, no complaint."""
    place, address = served
    page = chromium.page()
    page.open(address)
    page.wait('document.getElementById("status")?.textContent === "Ready"')
    asked = [
        {"prompt": PROMPT, "seed": 3, "previews": True},
        {"prompt": PROMPT, "seed": 3},
        {"prompt": "blue", "seed": str(2**63 + 5), "negativePrompt": "a red circle"},
    ]
    told = pictures(page, asked)
    engine = Engine.open(place, "onnxruntime-cpu", threads=1)
    first, again, other = told["found"]
    require_equal(first, engine, PROMPT, 3, integer=True)
    require_equal(other, engine, "blue", 2**63 + 5, integer=True, negative_prompts=["a red circle"])
    assert again["pixels"] == first["pixels"]
    assert again["latent"] == first["latent"]
    assert [step for step, _, _ in told["seen"]] == [1, 2, 3, 4] * 3
    assert [bool(size) for _, _, size in told["seen"]] == [True, True, True, False] + [False] * 8
    assert not [url for url in page.requests if not url.startswith((address, "data:", "blob:"))]
    assert len(page.requests) > 20
    assert not page.complaints
    # The page has opened the engine before: all but the modules comes from what the browser keeps.
    assert told["fetched"] == 0
    assert told["reused"] > 10_000_000


def test_the_page_is_worked_by_keyboard_and_tells_what_it_does(
    chromium: browser.Browser, served: tuple[Path, str]
) -> None:
    place, address = served
    page = chromium.page()
    page.size(360, 740, mobile=True)
    page.open(address)
    page.wait('document.getElementById("status")?.textContent === "Ready"')
    assert page.run("return document.activeElement === document.body")
    for _ in range(20):
        page.press("Tab", 9)
        if page.run('return document.activeElement.id === "seed"'):
            break
    page.run('document.getElementById("seed").select()')
    page.press("5", 53, "5")
    page.press("Enter", 13, "\r")
    page.wait('document.getElementById("status").textContent.startsWith("Done")')
    shown = page.run("""
        const canvas = document.getElementById("picture");
        const image = canvas.getContext("2d").getImageData(0, 0, canvas.width, canvas.height);
        return { pixels: Array.from(image.data), label: canvas.getAttribute("aria-label"),
            times: document.getElementById("times").innerText, about: document.getElementById("about").innerText,
            wide: document.documentElement.scrollWidth };""")
    expected = Engine.open(place, "onnxruntime-cpu", threads=1).generate(["a red circle"], [5])[0]
    require_close(np.array(shown["pixels"], np.uint8).reshape(16, 16, 4), expected, integer=True)
    assert shown["label"] == "Picture of: a red circle, seed 5"
    assert "Each step" in shown["times"]
    assert read_manifest(place).engine_hash in shown["about"]
    assert "4 network calls" in shown["about"]
    assert shown["wide"] <= 360
    # Everything that can be worked has a name that a screen reader can say.
    nodes = page.send("Accessibility.getFullAXTree")["nodes"]
    worked = {"textbox", "button", "checkbox", "progressbar", "img", "combobox", "spinbutton", "link", "image"}
    roles = [(node["role"]["value"], node.get("name", {}).get("value", "")) for node in nodes if not node["ignored"]]
    named = [(role, name) for role, name in roles if role in worked]
    assert {"textbox", "button", "checkbox", "progressbar"} <= {role for role, _ in named}
    assert all(name for _, name in named), named
    assert not page.complaints


def test_a_picture_is_cancelled_and_wrong_wishes_are_refused(
    chromium: browser.Browser, served: tuple[Path, str]
) -> None:
    _, address = served
    page = chromium.page()
    page.open(address)
    page.wait('document.getElementById("status")?.textContent === "Ready"')
    said = page.run("""
        const { Engine } = await import("./web/engine.js");
        const caught = async (promise) => {
            try { await promise; return null; } catch (error) { return [error.name, error.message]; }
        };
        const engine = await Engine.open();
        const stop = new AbortController();
        let steps = 0;
        const onStep = () => { steps += 1; stop.abort(); };
        const found = { cancelled: await caught(engine.generate("a", { signal: stop.signal, onStep })), steps };
        found.width = (await engine.generate("a")).width;
        found.seed = await caught(engine.generate("a", { seed: -1 }));
        found.height = await caught(engine.generate("a", { height: 24 }));
        engine.close();
        found.closed = await caught(engine.generate("a"));
        found.missing = await caught(Engine.open({ url: new URL("web/", location.href) }));
        return found;""")
    assert said["cancelled"] == ["AbortError", "the picture was cancelled"]
    assert said["steps"] < 4
    assert said["width"] == 16
    assert said["seed"][1] == 'a seed is a whole number from 0 to 18446744073709551615, not "-1"'
    assert said["height"][1] == "the height of this engine is 16 pixels, not 24"
    assert said["closed"] == ["Error", "the engine was closed"]
    assert re.match(r"there is no engine at http://\S+/web/: manifest\.json answers 404", said["missing"][1])


def test_a_damaged_file_is_not_run(chromium: browser.Browser, served: tuple[Path, str], tmp_path: Path) -> None:
    place = tmp_path / "engine"
    shutil.copytree(served[0], place)
    weights = place / "unet" / "weights.bin"
    content = bytearray(weights.read_bytes())
    content[7] ^= 1
    weights.write_bytes(content)
    page = chromium.page()
    with browser.served(place) as address:
        page.open(address)
        page.wait('document.getElementById("error")?.hidden === false')
        said = page.run('return document.getElementById("error").textContent')
    assert said == "the engine is damaged: unet/weights.bin is not the file that was built"


@pytest.mark.parametrize(
    "family", ["sd3", "dit", *(pytest.param(name, marks=pytest.mark.slow) for name in ("sdxl", "flux", "pixart"))]
)
def test_every_family_is_drawn_as_in_python(
    family: str,
    chromium: browser.Browser,
    runtime: PageOptions,
    tiny_folder: Folder,
    engine_store: Store,
    tmp_path: Path,
) -> None:
    place = exported_family(family, runtime, tiny_folder, engine_store, tmp_path)
    prompt = "3" if family == "dit" else PROMPT
    page = chromium.page()
    with browser.served(place) as address:
        page.open(address)
        page.wait('document.getElementById("status")?.textContent === "Ready"')
        told = pictures(page, [{"prompt": prompt, "seed": 9}])
    require_equal(told["found"][0], Engine.open(place, "onnxruntime-cpu", threads=1), prompt, 9, integer=False)
    assert not page.complaints


def exported_family(family: str, runtime: PageOptions, tiny_folder: Folder, store: Store, tmp_path: Path) -> Path:
    """A toy engine of a family; class-conditional ones have no prompt to keep latents of."""
    targets = [TARGETS["onnxruntime-cpu"], replace(TARGETS["web"], page=runtime)]
    export_engine(of_family(family, tiny_folder), targets, toy.SHAPES, tmp_path / "engine", store=store)
    return tmp_path / "engine"
