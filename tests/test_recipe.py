"""The recipe: typed fields from YAML, defaults, overrides, and the place and way out in every error."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest

from compress.errors import RecipeError
from compress.nearest import listed
from compress.passes import PASSES
from compress.recipe.reader import pass_fields
from compress.recipe.schema import Range, Recipe

TEXT = """\
schema_version: 1
model: models/toy
sampler:
  scheduler: DDIMScheduler
  steps: 8
  options: {timestep_spacing: trailing, eta: 0.0}
passes:
  - quantize: {scheme: int8-w8a8}
  - cache:
      interval: 2
      cut: 1
targets: [onnxruntime-cpu]
shapes: {batch: [1, 1, 4], height: 16, width: 16}
calibration: {prompts: prompts.txt, samples: 4}
evaluate: {samples: 4, prompts: prompts.txt}
gates: {latent_psnr_db: {min: 10}}
out: engine
"""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "prompts.txt").write_text("a red circle\n")
    (tmp_path / "toy.yaml").write_text(TEXT)
    return tmp_path


def load(folder: Path, *overrides: str) -> Recipe:
    return Recipe.load(folder / "toy.yaml", overrides)


def error_of(folder: Path, *overrides: str) -> str:
    with pytest.raises(RecipeError) as caught:
        load(folder, *overrides)
    return str(caught.value)


def test_fields_are_typed_and_defaults_filled_in(folder: Path) -> None:
    recipe = load(folder)
    assert recipe.seed == 0
    assert recipe.shapes.batch == Range(1, 1, 4)
    assert recipe.shapes.height == Range(16, 16, 16)
    assert recipe.shapes.prompt_tokens is None
    assert recipe.sampler.guidance_scale == 1.0
    assert recipe.sampler.options == {"timestep_spacing": "trailing", "eta": 0.0}
    assert [step.name for step in recipe.passes] == ["quantize", "cache"]
    assert all(isinstance(step, PASSES[step.name]) for step in recipe.passes)
    assert recipe.gates["latent_psnr_db"].min == 10.0
    assert recipe.evaluate is not None
    assert recipe.evaluate.threads == (1,)


def test_the_resolved_recipe_reloads_equal_and_is_stable(folder: Path) -> None:
    recipe = load(folder, "sampler.guidance_interval=[0.2, 0.8]", "seed=7", "evaluate.threads=[1, 2]")
    again = Recipe.parse(recipe.to_yaml(), folder=folder)
    assert again == recipe
    assert hash(again) == hash(recipe)
    assert again.to_yaml() == recipe.to_yaml()
    assert again != load(folder)


def test_equal_recipes_are_equal_wherever_they_lie(folder: Path) -> None:
    (folder / "elsewhere").mkdir()
    moved = folder / "elsewhere" / "other.yaml"
    moved.write_text("# moved\n\n" + TEXT.replace("prompts.txt", str(folder / "prompts.txt")))
    here = load(folder, f"calibration.prompts={folder}/prompts.txt", f"evaluate.prompts={folder}/prompts.txt")
    assert Recipe.load(moved) == here


@pytest.mark.parametrize(
    "value",
    [
        "yes",
        "on",
        "1e5x",
        "012",
        "1:30",
        "0x10",
        "null value",
        "~x",
        "2024-01-01",
        "",
        " ",
        "a: b",
        "- x",
        "#",
        "é",
        "'",
        "!x",
    ],
)
def test_text_survives_writing_and_reading(folder: Path, value: str) -> None:
    import json

    recipe = load(folder, f"sampler.options.note={json.dumps(value)}")
    assert Recipe.parse(recipe.to_yaml(), folder=folder).sampler.options["note"] == value


@pytest.mark.parametrize("value", [1e-5, 1e300, 0.1, -2.5e-17, 3.0, 123456789.0])
def test_numbers_survive_writing_and_reading(folder: Path, value: float) -> None:
    recipe = load(folder, f"sampler.options.number={value!r}")
    found = Recipe.parse(recipe.to_yaml(), folder=folder).sampler.options["number"]
    assert found == value
    assert isinstance(found, float)


def test_only_the_core_schema_of_yaml_1_2_is_read(folder: Path) -> None:
    options = load(folder, "sampler.options={a: yes, b: 1:30, c: 1e-3, d: 010, e: .5, f: 2024-01-01}").sampler.options
    assert options == {"a": "yes", "b": "1:30", "c": 0.001, "d": 10, "e": 0.5, "f": "2024-01-01"}


def test_paths_are_taken_from_here_else_from_the_recipe(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = load(folder)
    assert recipe.locate("prompts.txt") == folder / "prompts.txt"
    here = folder / "here"
    here.mkdir()
    (here / "prompts.txt").write_text("another\n")
    monkeypatch.chdir(here)
    assert recipe.locate("prompts.txt").read_text() == "another\n"
    assert recipe.locate("out/new") == Path("out/new")


def test_overrides_win_in_their_order(folder: Path) -> None:
    recipe = load(folder, "sampler.steps=4", "passes.1.cache.interval=5", "passes[0].quantize.scheme=bf16")
    assert recipe.sampler.steps == 4
    assert pass_fields(recipe.passes[0])["scheme"] == "bf16"
    assert pass_fields(recipe.passes[1])["interval"] == 5
    assert load(folder, "sampler.steps=4", "sampler.steps=5").sampler.steps == 5
    assert load(folder, "passes=[]").passes == ()


def test_an_override_does_not_reach_the_next_load(folder: Path) -> None:
    load(folder, "sampler.options.eta=1.0")
    assert load(folder).sampler.options["eta"] == 0.0


@pytest.mark.parametrize("name", PASSES)
def test_the_fields_of_every_pass_are_its_recipe_keys(folder: Path, name: str) -> None:
    fields = [column.name for column in dataclasses.fields(PASSES[name]) if column.init]  # type: ignore[arg-type]
    sentence = error_of(folder, f"passes=[{{{name}: {{no_such_key: 1}}}}]")
    assert sentence.startswith("--set passes=")
    assert f"passes[0].{name}.no_such_key: is not a known key; known: {listed(fields)}" in sentence


@pytest.mark.parametrize("fields", ["method: magcache", "optimize: {latency_ratio: 0.5}"])
def test_a_cache_that_is_calibrated_needs_prompts(folder: Path, fields: str) -> None:
    sentence = error_of(folder, f"passes=[{{cache: {{{fields}}}}}]", "calibration=null")
    assert "passes[0].cache: needs the key calibration" in sentence
    assert load(folder, "passes=[{cache: {method: fora}}]", "calibration=null").calibration is None


PLACES = {
    "an unknown key": ("  steps: 8", "  step: 8", ":5: sampler.step: is not a known key; known: scheduler, steps"),
    "its nearest name": ("  steps: 8", "  step: 8", "did you mean 'steps'?"),
    "a missing key": ("  steps: 8\n", "", ":3: sampler.steps: is missing"),
    "a missing top key": ("model: models/toy\n", "", ":1: model: is missing"),
    "a wrong type": ("steps: 8", "steps: eight", ":5: sampler.steps: is the text 'eight', not an integer"),
    "true is no number": ("steps: 8", "steps: true", ":5: sampler.steps: is true or false, not an integer"),
    "a bound": ("steps: 8", "steps: 0", ":5: sampler.steps: 0 is not allowed; it must be at least 1"),
    "a scheduler": ("DDIMScheduler", "DDIMSheduler", "(did you mean 'DDIMScheduler'?)"),
    "the start of a scheduler": ("DDIMScheduler", "UniPC", "(did you mean 'UniPCMultistepScheduler'?)"),
    "a scheme": ("int8-w8a8", "int8-w8a7", ":8: passes[0].quantize.scheme: 'int8-w8a7' is not a scheme; known: "),
    "a nearest scheme": ("int8-w8a8", "int8-w8a7", "(did you mean 'int8-w8a8'?)"),
    "a pass": (
        "  - cache:",
        "  - cash:",
        ":9: passes[1].cash: 'cash' is not a pass; known: prune, distill, quantize, solver, cache, fuse",
    ),
    "a field two lines down": (
        "      interval: 2",
        "      interval: x",
        ":10: passes[1].cache.interval: is ",
    ),
    "a target": ("onnxruntime-cpu", "onnxruntime-gpu", ":12: targets[0]: 'onnxruntime-gpu' is not a target; known: "),
    "a target given twice": ("[onnxruntime-cpu]", "[onnxruntime-cpu, onnxruntime-cpu]", ":12: targets: "),
    "a range": ("[1, 1, 4]", "[4, 1, 1]", ":13: shapes.batch: [4, 1, 1] must rise from at least 1"),
    "a metric": ("latent_psnr_db", "latent_psnr", "(did you mean 'latent_psnr_db'?)"),
    "a bound of a gate": (
        "{min: 10}",
        "{mim: 10}",
        ":16: gates.latent_psnr_db.mim: is not a known key; known: max",
    ),
    "a gate without bounds": ("{min: 10}", "{}", ":16: gates.latent_psnr_db: has no bound"),
    "a key given twice": (
        "out: engine",
        "out: a\nout: b",
        ":18: the key 'out' is there twice; the first is on line 17",
    ),
    "a file that is not there": (
        "prompts: prompts.txt, samples",
        "prompts: no.txt, samples",
        ":14: calibration.prompts: ",
    ),
    "a file of another type": ("prompts: prompts.txt}", "prompts: toy.yaml}", ":15: evaluate.prompts: "),
    "a needed key": ("calibration: {prompts: prompts.txt, samples: 4}\n", "", ":8: passes[0].quantize: needs the key"),
    "a gate on what is not measured": ("latent_psnr_db: {min", "clip_score: {min", "needs the key evaluate.clip_model"),
    "gates without evaluate": ("evaluate: {samples: 4, prompts: prompts.txt}\n", "", ": gates: needs the key evaluate"),
    "another schema version": (
        "schema_version: 1",
        "schema_version: 2",
        ":1: schema_version: 2 is not allowed; known: 1",
    ),
    "how many more": ("  steps: 8\n", "  step: 8\n", "(1 more after this one)"),
    "an existing file as out": ("out: engine", "out: prompts.txt", ":17: out: 'prompts.txt' is a file"),
}


@pytest.mark.parametrize("what", PLACES)
def test_an_error_names_file_line_key_and_way_out(folder: Path, what: str) -> None:
    old, new, expected = PLACES[what]
    assert TEXT.count(old) == 1
    (folder / "toy.yaml").write_text(TEXT.replace(old, new))
    sentence = error_of(folder)
    assert sentence.startswith(f"{folder / 'toy.yaml'}:")
    assert expected in sentence
    assert "\n" not in sentence


def test_an_illegal_order_is_refused_with_the_legal_one(folder: Path) -> None:
    sentence = error_of(folder, "passes=[{cache: {cut: 1, interval: 2}}, {quantize: {scheme: int8-w8a8}}]")
    assert f"'quantize' cannot come after 'cache'; the legal order is {' < '.join(PASSES)}" in sentence
    assert "is there twice" in error_of(
        folder, "passes=[{cache: {cut: 1, interval: 2}}, {cache: {cut: 1, interval: 2}}]"
    )


OVERRIDES = {
    "sampler.steps": "--set sampler.steps: is not of the form key=value",
    "=4": "is not of the form key=value",
    "sampler..steps=4": "is not of the form key=value",
    "sampler.steps=[": "--set sampler.steps=[: is not YAML",
    "sampler.steps=x": "--set sampler.steps=x: sampler.steps: is the text 'x', not an integer",
    "passes.7.cache={}": "passes is a list; its indices are 0 to 1",
    "passes.first.cache={}": "passes is a list; its indices are 0 to 1",
    "seed.x=1": "--set seed.x=1: seed: is a mapping, not an integer",
    "model.x=1": "--set model.x=1: model is the text 'models/toy', which holds no keys",
    "sampler.steps=!!python/object/apply:os.system [echo]": "only plain data is",
}


@pytest.mark.parametrize("override", OVERRIDES)
def test_a_wrong_override_names_itself(folder: Path, override: str) -> None:
    sentence = error_of(folder, override)
    assert sentence.startswith("--set ")
    assert OVERRIDES[override] in sentence


def test_what_turns_out_later_is_located_too(folder: Path) -> None:
    later = load(folder).error(("shapes", "width"), "16 is not a multiple of 32")
    assert str(later) == f"{folder / 'toy.yaml'}:13: shapes.width: 16 is not a multiple of 32"


def test_an_error_that_only_knows_its_key_gets_file_and_line(folder: Path) -> None:
    recipe = load(folder, "passes.1.cache.interval=3")
    gate = recipe.placed(RecipeError("gates.latent_psnr_db.min: is too much"))
    assert str(gate) == f"{folder / 'toy.yaml'}:16: gates.latent_psnr_db.min: is too much"
    field = recipe.placed(RecipeError("passes[1].cache.interval: is too long"))
    assert str(field) == "--set passes.1.cache.interval=3: passes[1].cache.interval: is too long"
    other = RecipeError("nothing of the recipe: is meant")
    assert recipe.placed(other) is other


def test_heldout_prompts_are_found_beside_the_calibration_prompts(folder: Path) -> None:
    assert "evaluate.prompts: is missing" in error_of(folder, "evaluate={samples: 4}")
    (folder / "heldout.jsonl").write_text('{"prompt": "a"}\n')
    assert load(folder, "evaluate={samples: 4}").prompts_file() == folder / "heldout.jsonl"
