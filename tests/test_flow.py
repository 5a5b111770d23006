"""The whole flow on toy models: recipe to examined engine, gates, what a second run repeats, and kills in between."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from compress import compiler
from compress.errors import GateError, RefusedError
from compress.recipe.schema import Recipe
from compress.report.report import Report
from export.engine import Engine
from export.manifest import read_manifest
from export.step_plan import StepPlan

ROOT = Path(__file__).parent.parent
TOYS = {
    "unet": "cache: {cut: 1, interval: 2, forecast: taylor1}",
    "sd3": "cache: {cut: 1, interval: 2}",
}

RECIPE = """
schema_version: 1
model: {model}
sampler: {{scheduler: {scheduler}, steps: 4, guidance_scale: 2.0}}
passes:
  - quantize: {{scheme: int8-w8a8}}
  - {cache}
targets: [onnxruntime-cpu]
shapes: {{batch: [1, 1, 4], height: 16, width: 16}}
calibration: {{prompts: {prompts}, samples: 2}}
evaluate: {{samples: 2, prompts: {held}, batch: 2, allow_slower: true}}
out: {out}
"""


@pytest.fixture
def recipe_file(tiny_folder: Callable[[str], Path], tmp_path: Path) -> Callable[[str], Path]:
    """Family -> a recipe with both passes for its toy model."""

    def write(family: str) -> Path:
        prompts, held = tmp_path / "calibration.txt", tmp_path / "held.txt"
        prompts.write_text("a red circle\na blue square\n")
        held.write_text("a green triangle\na yellow ring\n")
        scheduler = "DDIMScheduler" if family == "unet" else "FlowMatchEulerDiscreteScheduler"
        text = RECIPE.format(
            model=tiny_folder(family),
            scheduler=scheduler,
            cache=TOYS[family],
            prompts=prompts,
            held=held,
            out=tmp_path / "out" / "engine",
        )
        path = tmp_path / "recipe.yaml"
        path.write_text(text)
        return path

    return write


@pytest.mark.parametrize("family", TOYS)
def test_a_recipe_becomes_an_examined_engine(
    family: str, recipe_file: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = Recipe.load(recipe_file(family))
    done: list[str] = []
    outcome = compiler.run(recipe, progress=lambda what, *_: done.append(what), work_dir=tmp_path / "work")
    assert outcome.engine is not None
    report = Report.from_json((outcome.engine / "report.json").read_text())
    assert {row.metric for row in report.rows} >= {"latency_ms", "size_mib", "peak_rss_mib", "latent_psnr_db"}
    psnr = report.row("latent_psnr_db")
    assert psnr is not None
    assert set(psnr.per_pass) == {"quantize", "cache"}
    assert None not in (psnr.compressed, psnr.exported, psnr.engine)
    page = (outcome.engine / "report.html").read_text()
    assert page.count("data:image/png") >= 8
    assert "http://" not in page.replace("http://www.w3.org", "")
    assert "calibrate" in done
    assert Recipe.load(outcome.engine / "recipe.yaml") == recipe
    engine = Engine.open(outcome.engine)
    assert engine.verify()["relative_error"] == 0.0
    pictures = engine.generate(prompts=["a red circle", "a blue square"], seeds=[3, 4])
    alone = engine.generate(prompts=["a blue square"], seeds=[4])
    assert pictures.shape == (2, 16, 16, 3)
    assert np.abs(pictures[1].astype(int) - alone[0]).max() <= 1

    first = read_manifest(outcome.engine).engine_hash
    done.clear()
    again = compiler.run(recipe, progress=lambda what, *_: done.append(what), work_dir=tmp_path / "work")
    assert "calibrate" not in done  # the passes came from the store
    assert again.engine is not None
    assert read_manifest(again.engine).engine_hash == first


def test_a_searched_plan_is_examined_at_its_own_points(recipe_file: Callable[[str], Path], tmp_path: Path) -> None:
    """`optimize` may take fewer steps than the recipe: the report still compares step by step."""
    search = "{cache: {optimize: {latency_ratio: 0.6, seconds: 1.0}}}"
    overrides = [f"passes=[{{quantize: {{scheme: int8-w8a8}}}}, {search}]", "sampler.steps=6"]
    overrides += ["sampler.scheduler=DPMSolverMultistepScheduler", "sampler.options={algorithm_type: dpmsolver++}"]
    outcome = compiler.run(Recipe.load(recipe_file("unet"), overrides), work_dir=tmp_path / "work")
    assert outcome.engine is not None
    plan = StepPlan.from_json((outcome.engine / "step_plan.json").read_text())
    assert plan.key["optimised"]["chosen"]["calls"] == plan.network_calls
    report = Report.from_json((outcome.engine / "report.json").read_text())
    assert {len(curve.psnr_db) for curve in report.curves} == {plan.network_calls}


def test_a_gate_that_is_not_met_keeps_the_engine_apart(recipe_file: Callable[[str], Path], tmp_path: Path) -> None:
    recipe = Recipe.load(recipe_file("unet"), ["gates.size_mib={max_ratio: 0.0001}"])
    with pytest.raises(GateError, match=r"size: engine / original at most 0.0001 \(found .*rejected"):
        compiler.run(recipe, work_dir=tmp_path / "work")
    assert not (tmp_path / "out" / "engine").exists()
    assert Engine.open(tmp_path / "out" / "rejected" / "engine").verify()
    assert not list((tmp_path / "out").glob(".*"))


def test_a_dry_run_writes_nothing_and_shows_every_edit(recipe_file: Callable[[str], Path], tmp_path: Path) -> None:
    outcome = compiler.run(Recipe.load(recipe_file("unet")), dry_run=True, work_dir=tmp_path / "work")
    assert not (tmp_path / "work").exists()
    assert not (tmp_path / "out").exists()
    actions = {edit.action for edit in outcome.edits}
    assert {"skip", "int8-w8a8", "cut", "shallow"} <= actions
    assert outcome.estimate.minutes > 0
    json.dumps(outcome.to_dict())


def test_evaluating_what_was_calibrated_is_refused(recipe_file: Callable[[str], Path], tmp_path: Path) -> None:
    recipe = Recipe.load(recipe_file("unet"), [f"evaluate.prompts={tmp_path / 'calibration.txt'}"])
    with pytest.raises(RefusedError, match="2 of the calibration prompts are evaluated too"):
        compiler.run(recipe, work_dir=tmp_path / "work")


@pytest.mark.slow
def test_a_killed_run_resumes_to_the_same_engine(recipe_file: Callable[[str], Path], tmp_path: Path) -> None:
    path = recipe_file("unet")
    out = tmp_path / "out" / "engine"

    def start(work: str) -> subprocess.Popen[bytes]:
        command = [sys.executable, "-m", "compress", str(path), "--cache", str(tmp_path / work)]
        return subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)

    began = time.monotonic()
    assert start("first").wait() == 0
    whole = time.monotonic() - began
    expected = read_manifest(out).engine_hash
    for share in (0.3, 0.5, 0.7, 0.9):
        run = start("second")
        time.sleep(whole * share)
        run.send_signal(signal.SIGKILL)
        run.wait()
        assert read_manifest(out).engine_hash == expected  # the engine that was there is still whole
    os.rename(out, tmp_path / "set-aside")
    assert start("second").wait() == 0
    assert read_manifest(out).engine_hash == expected
    assert [entry.name for entry in out.parent.iterdir()] == ["engine"]
