"""Tests of the caching benchmark: which entries it measures, what it keeps, how reports are merged and tables told."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from compress.caching.methods import METHODS
from compress.passes.cache import Cache
from recipes.benchmarks import caching_tables
from recipes.benchmarks.caching import __main__ as program
from recipes.benchmarks.caching import bench, chart, interaction, presets, pytorch, results

OWN = "DPMSolverMultistepScheduler"
RUN = presets.Run("unet", OWN, 50)


def row(entry: str, ms: float | None = None, db: float | None = None, **more: Any) -> dict[str, Any]:
    made: dict[str, Any] = {"model": "unet", "sampler": OWN, "steps": 50, "entry": entry}
    made |= {"samples": 64, "date": "2026-01-02"}
    if ms is not None:
        made |= {"ms": ms, "ratio": 100.0 / ms, "attributes": {"value": 0.9, "interval": [0.8, 0.95], "n": 64}}
        made |= {"ms_quartiles": [ms - 1, ms + 1], "whole_ms": ms + 10, "whole_ratio": 110.0 / (ms + 10)}
        made |= {"cost": ms / 2, "full_calls": 2, "cached_calls": 1, "strip": "FFc"}
    if db is not None:
        made["latent_psnr_db"] = {"value": db, "interval": [db - 1, db + 1], "n": 64}
        made["image_psnr_db"] = {"value": db + 1, "interval": [db, db + 2], "n": 64}
        made["pooled_psnr_db"] = db - 2
        made["change_points"] = {"value": -1.0, "interval": [-2.0, 0.0], "n": 64}
        made["frechet"] = {"value": 1.5, "interval": [1.0, 2.0], "n": 64}
    return made | more


def report(*rows: dict[str, Any]) -> dict[str, Any]:
    made = {"date": "2026-01-02", "target": "openvino-cpu", "environment": {"processor": "a processor"}}
    return made | {"entries": list(rows)}


FEW = [row("full", 100.0), row("25 steps", 50.0, 30.0), row("20 steps", 40.0, 26.0), row("10 steps", 20.0, 15.0)]


def test_the_line_between_two_neighbours_is_compared_with() -> None:
    assert caching_tables.fewer_steps_db(45.0, FEW) == pytest.approx(28.0)
    assert caching_tables.fewer_steps_db(30.0, FEW) == pytest.approx(20.5)
    assert caching_tables.fewer_steps_db(51.0, FEW) is None
    assert caching_tables.fewer_steps_db(19.0, FEW) is None


def test_tables_say_what_was_measured_and_what_was_refused() -> None:
    rows = [*FEW, row("deepcache", 45.0, 33.0), row("fora", 60.0, 40.0), row("hicache", 10.0, 9.0)]
    lines = caching_tables.markdown(report(*rows, row("pab", refused="pab: no"))).splitlines()
    assert f"## unet, {OWN}, 50 steps" in lines
    cells = {line.split(" | ")[0].removeprefix("| "): line.removesuffix(" |").split(" | ")[1:] for line in lines}
    assert cells["deepcache"] == [
        "45.0 (44.0 to 46.0)",
        "2.22x",
        "2.00x",
        "2.22x",
        "33.0 (32.0 to 34.0)",
        "31.0",
        "28.0",
        "34.0",
        "1.50 (1.00 to 2.00)",
        "90.0 (80.0 to 95.0)",
        "-1.0 (-2.0 to +0.0)",
        "2 + 1",
        "`FFc`",
    ]
    assert cells["full"][4:9] == ["-"] * 5
    assert cells["fora"][6] == "> 30.0"
    assert cells["hicache"][6] == "< 15.0"
    assert set(cells["pab"]) == {"-"}
    assert "- pab: pab: no" in lines


def test_the_readme_gets_the_default_samplers_at_fifty_steps() -> None:
    other = row("full", 7.0) | {"sampler": "DDIMScheduler"}
    elsewhere = row("full", 8.0, target="onnxruntime-cpu")
    made = report(
        *FEW, row("fora", 45.0, 33.0), row("pab", refused="no"), other, elsewhere, row("full") | {"steps": 20}
    )
    text = f"before\n{caching_tables.BEGIN}\nold\n{caching_tables.END}\nafter"
    changed = caching_tables.with_tables(text, made)
    assert changed.startswith(f"before\n{caching_tables.BEGIN}\n| unet, {OWN}, 50 steps |")
    assert changed.endswith(f"{caching_tables.END}\nafter")
    assert "| fora | 2.22x | 33.0 (32.0 to 34.0) | 28.0 | 1.50 (1.00 to 2.00) | 90.0 |" in changed.splitlines()
    assert changed.count("| full |") == 1
    assert not any(word in changed for word in ("old", "DDIMScheduler", "20 steps |\n| ---", "pab"))
    assert caching_tables.with_tables(changed, made) == changed
    assert caching_tables.with_tables("no marks", made) == "no marks"


def test_merging_keeps_what_is_not_measured_anew(tmp_path: Path) -> None:
    folder, build = tmp_path / "reports", tmp_path / "build"
    kept = results.Kept(build)
    folder.mkdir()
    old = report(
        row("optimised 0.4", 40.0, 35.0),
        row("deepcache", 45.0, 33.0),
        row("fora", 30.0, 20.0, samples=1024),
        row("full", 100.0),
        row("a preset of another day", 90.0, 9.0),
    )
    (folder / "caching-2026-01-02.json").write_text(json.dumps(old), encoding="utf-8")
    older = report(row("pab", 1.0, 1.0))
    (folder / "caching-2026-01-01.json").write_text(json.dumps(older), encoding="utf-8")
    new = [row("deepcache", 41.0, 34.0), row("5 steps", 10.0, 9.0), row("25 steps", 50.0, 30.0), row("fora", 2.0, 2.0)]
    for one in new:
        kept.put(RUN, one | {"date": "2026-01-03"})
    made = results.aggregate(folder, [build])
    found = {one["entry"]: one for one in made["entries"]}
    names = ["full", "25 steps", "5 steps", "deepcache", "fora", "a preset of another day", "optimised 0.4"]
    assert list(found) == names
    assert (found["deepcache"]["ms"], found["deepcache"]["date"]) == (41.0, "2026-01-03")
    assert (found["optimised 0.4"]["ms"], found["optimised 0.4"]["date"]) == (40.0, "2026-01-02")
    assert found["fora"]["samples"] == 1024
    assert made["environment"]["processor"]
    assert json.loads((folder / f"caching-{made['date']}.json").read_bytes()) == made
    assert "| optimised 0.4 | 40.0 (" in (folder / "caching.md").read_text(encoding="utf-8")
    again = results.aggregate(folder, [build])
    assert again["entries"] == made["entries"]


def test_a_later_day_goes_on_from_the_report(tmp_path: Path) -> None:
    kept = results.Kept(tmp_path)
    kept.put(RUN, row("deepcache", 41.0, 34.0, inputs="new"))
    other = row("fora", 1.0, 1.0, inputs="x", target="onnxruntime-cpu")
    old = report(row("deepcache", 45.0, 33.0, inputs="old"), row("pab", 9.0, 9.0, inputs="old"), row("hicache"), other)
    kept.restore(RUN, "openvino-cpu", old)
    assert {one["entry"]: one["inputs"] for one in kept.rows(RUN)} == {"deepcache": "new", "pab": "old"}
    kept.restore(RUN, "openvino-cpu", None)


def test_a_result_stands_while_what_it_depends_on_does() -> None:
    found = row("pab", 9.0, 9.0, inputs="asked", sources="code")
    assert results.verdict(None, "asked", "code") == "measure"
    assert results.verdict(row("pab", 9.0, 9.0), "asked", "code") == "measure"
    assert results.verdict(found, "asked", "code") == "keep"
    assert results.verdict(found, "asked otherwise", "code") == "measure"
    assert results.verdict(found, "asked", "other code") == "compare"
    assert results.verdict(found | {"refused": "no"}, "asked", "code") == "keep"
    assert results.verdict(found | {"refused": "no"}, "asked", "other code") == "measure"
    assert results.verdict(found | {"entry": "optimised 0.4"}, "asked", "other code") == "keep"


def test_a_result_of_pytorch_waits_for_its_engine() -> None:
    found = row("pab", db=9.0, inputs="asked", sources="code", computed="PyTorch")
    assert results.verdict(found, "asked", "code") == "complete"
    assert results.verdict(found, "asked otherwise", "code") == "measure"
    assert results.verdict(found | {"refused": "no"}, "asked", "code") == "keep"
    assert results.verdict(found | {"engine": "of a layout"}, "asked", "code") == "keep"


def test_what_devices_calibrate_may_differ_in_rounding_alone() -> None:
    plan = {"steps": [{"read": {"deep": [1.0, 0.25]}, "path": "shallow"}], "rows": 3}
    close = {"steps": [{"read": {"deep": [1.0, 0.250001]}, "path": "shallow"}], "rows": 3}
    assert bench.alike(plan, close)
    assert not bench.alike(plan, {"steps": [{"read": {"deep": [1.0, 0.2501]}, "path": "shallow"}], "rows": 3})
    assert not bench.alike(plan, {"steps": [{"read": {"deep": [1.0]}, "path": "shallow"}], "rows": 3})
    assert not bench.alike(plan, {"steps": plan["steps"], "rows": 4})
    assert bench.rounded([1.0 + 1e-12, {"a": [0.1 + 1e-13]}, "x", 3]) == bench.rounded([1.0, {"a": [0.1]}, "x", 3])


def test_pytorch_computes_engines_complete_and_nothing_is_measured_twice(tmp_path: Path) -> None:
    entries = ["2 steps", "deepcache"]
    told = ["--models", "unet", "--samplers", "default", "--steps", "4", "--samples", "9"]
    told += ["--only", *entries, "--build", str(tmp_path / "build")]
    pytorch.main([*told, "--device", "cpu", "--workers", "1"])
    run, kept = presets.Run("unet", OWN, 4), results.Kept(tmp_path / "build")
    computed = {entry: kept.row(run, entry) for entry in ["full", *entries]}
    assert all("engine" not in one for one in computed.values())
    # What PyTorch made of one entry is replaced, so that its engine must disagree with it.
    kept.put_array(run, "samples", "deepcache", 1.0 + kept.array(run, "samples", "deepcache"))

    told += ["--budgets", "--results", str(tmp_path)]
    program.main(told)
    done = {entry: kept.row(run, entry) for entry in computed}
    for entry in ("full", "2 steps"):
        quality = "attributes" if entry == "full" else "latent_psnr_db"
        assert done[entry]["departure"] < 1e-4
        assert done[entry][quality] == computed[entry][quality]
    assert "departure" not in done["deepcache"]
    both = [rows["deepcache"]["latent_psnr_db"]["value"] for rows in (computed, done)]
    assert both[1] == pytest.approx(both[0], abs=0.01)
    assert all("whole_ms" in done[entry] for entry in done)

    before = {file: file.stat().st_mtime_ns for file in kept.root.glob("results/**/*.json")}
    program.main(told)
    assert {file: file.stat().st_mtime_ns for file in kept.root.glob("results/**/*.json")} == before
    kept.put(run, done["2 steps"] | {"inputs": "other prompts"})
    program.main(told)
    again = {file: file.stat().st_mtime_ns for file in kept.root.glob("results/**/*.json")}
    assert kept.row(run, "2 steps")["inputs"] == done["2 steps"]["inputs"]
    assert again.keys() == before.keys()
    unchanged = kept.file(run, "results", "deepcache", ".json")
    assert json.loads(unchanged.read_bytes())["latent_psnr_db"] == done["deepcache"]["latent_psnr_db"]


def test_every_method_is_measured_and_every_preset_is_a_valid_pass() -> None:
    found = [fields for model in presets.PRESETS.values() for fields in model.values()]
    assert {Cache(**fields).method for fields in found} == set(METHODS)
    assert RUN.fewer() == [45, 38, 30, 25, 20, 15, 10, 7, 5]
    assert RUN.entries([0.4], ["pab", "25 steps", "optimised 0.4"]) == ["full", "25 steps", "pab", "optimised 0.4"]
    assert presets.Run("unet", OWN, 10).fewer() == [9, 8, 6, 5, 4, 3, 2, 1]


def test_what_matters_most_comes_first() -> None:
    assert {model: next(iter(names)) for model, names in presets.SAMPLERS.items()} == caching_tables.DEFAULTS
    assert [run.sampler for run in presets.runs(["unet"], ["default"], [50])] == [OWN]
    every = list(presets.runs(["unet", "mmdit"], ["all"], [50, 20]))
    assert len(every) == 12
    assert [(run.model, run.steps) for run in every[:4]] == [("unet", 50), ("mmdit", 50), ("unet", 20), ("mmdit", 20)]
    assert {run.sampler for run in every[:4]} == set(caching_tables.DEFAULTS.values())
    assert [run.model for run in presets.runs(["unet", "mmdit"], ["DDIMScheduler"], [50])] == ["unet"]


def test_the_picture_shows_what_was_measured(tmp_path: Path) -> None:
    file = tmp_path / "caching.png"
    assert not chart.draw(report(row("full", 100.0)), file)
    assert not file.exists()
    assert chart.draw(report(*FEW, row("deepcache", 45.0, 33.0)), file)
    with Image.open(file) as with_preset:
        seen = np.asarray(with_preset.convert("RGB"))
    assert chart.draw(report(*FEW), file)
    with Image.open(file) as without:
        bare = np.asarray(without.convert("RGB"))
    assert seen.shape == bare.shape
    assert (seen != bare).any()


def test_two_changes_promise_the_product_of_speeds_and_the_sum_of_errors() -> None:
    assert interaction.expected_psnr(np.array([30.0, 20.0]), np.array([30.0, 90.0])) == pytest.approx(
        (30.0 - 10 * np.log10(2) + 20.0) / 2, abs=1e-4
    )
    one = {"ratio": 2.0, "whole_ratio": 1.5, "change_points": {"value": -1.0}}
    two = {"ratio": 3.0, "whole_ratio": 2.0, "change_points": {"value": 0.5}}
    found = interaction.expected({"int8-w8a8": one, "fora": two}, "fora", 25.0)
    assert found == {"ratio": 6.0, "whole_ratio": 3.0, "latent_psnr_db": 25.0, "change_points": -0.5}
    rows = {"full": row("full", 100.0), "int8-w8a8": row("x", 50.0, 30.0), "both": row("x", 25.0, 25.0)}
    both = {"model": "unet", "steps": 50, "entry": "fora", "scheme": "int8-w8a8", "rows": rows, "expected": found}
    lines = caching_tables.interaction({"interaction": [both]}).splitlines()
    assert (
        "| unet, 50 steps | int8-w8a8 and fora | 4.00x | 3.14x | 25.0 (24.0 to 26.0) | -1.0 (-2.0 to +0.0) |" in lines
    )
    assert "| unet, 50 steps | both, as promised by each alone | 6.00x | 3.00x | 25.0 | -0.5 |" in lines
    assert caching_tables.interaction(report()) == ""


def test_spans_are_told_beside_fewer_steps() -> None:
    times = {"ms": 45.0, "ratio": 2.22, "peak_mib": 300.4}
    measured = row("", 45.0, 33.0) | {
        "length": 4,
        "batched": times,
        "in turn": times | {"ratio": 1.9, "peak_mib": 280.0},
    }
    found = {"model": "unet", "sampler": OWN, "steps": 50, "rows": [measured]}
    (line,) = caching_tables.spans(report(*FEW) | {"spans": [found]}).splitlines()[2:]
    assert line == (
        "| unet, 50 steps, 4 | 2.22x | 1.90x | 300 | 280 | 33.0 (32.0 to 34.0) | 28.0 | 90.0 (80.0 to 95.0) |"
    )
    assert caching_tables.spans(report()) == ""


def test_what_pytorch_computed_is_said() -> None:
    done = row("fora", 60.0, 40.0, computed="PyTorch on a GPU", engine="x", departure=2e-6)
    waiting = row("pab", db=40.0, computed="PyTorch on a GPU")
    said = caching_tables.evidence(report(*FEW, done, waiting))
    assert "The quality of 1 of 6 entries was computed by PyTorch on a GPU" in said
    assert "at most 2e-06 of their norm" in said
    assert "PyTorch" not in caching_tables.evidence(report(*FEW))
