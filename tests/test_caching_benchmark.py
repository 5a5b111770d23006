"""Tests of the caching benchmark: which entries it measures, how reports are merged, and what the tables say."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from compress.caching.methods import METHODS
from compress.passes.cache import Cache
from recipes.benchmarks import caching, caching_tables

OWN = "DPMSolverMultistepScheduler"


def row(entry: str, ms: float | None = None, db: float | None = None, **more: Any) -> dict[str, Any]:
    made: dict[str, Any] = {"model": "unet", "sampler": OWN, "steps": 50, "entry": entry}
    made |= {"samples": 64, "date": "2026-01-02"}
    if ms is not None:
        made |= {"ms": ms, "ratio": 100.0 / ms, "attributes": {"value": 0.9, "interval": [0.8, 0.95], "n": 64}}
    if db is not None:
        made["latent_psnr_db"] = {"value": db, "interval": [db - 1, db + 1], "n": 64}
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
    made = report(*FEW, row("deepcache", 45.0, 33.0), row("pab", refused="pab: no"))
    lines = caching_tables.markdown(made).splitlines()
    assert f"## unet, {OWN}, 50 steps" in lines
    assert "| deepcache | 45.0 | 2.2x | 33.0 | 28.0 | 1.50 (1.00 to 2.00) | 90.0 | -1.0 (-2.0 to +0.0) |" in lines
    assert "| full | 100.0 | 1.0x | - | - | - | 90.0 | - |" in lines
    assert "| pab | - | - | - | - | - | - | - |" in lines
    assert "- pab: pab: no" in lines


def test_the_readme_gets_the_default_samplers_at_fifty_steps() -> None:
    other = row("full", 7.0) | {"sampler": "DDIMScheduler"}
    made = report(*FEW, row("pab", refused="no"), other, row("full", 9.0) | {"steps": 20})
    text = f"before\n{caching_tables.BEGIN}\nold\n{caching_tables.END}\nafter"
    changed = caching_tables.with_tables(text, made)
    assert changed.startswith(f"before\n{caching_tables.BEGIN}\n| unet, {OWN}, 50 steps |")
    assert changed.endswith(f"{caching_tables.END}\nafter")
    assert not any(word in changed for word in ("old", "DDIMScheduler", "20 steps |\n| ---", "pab"))
    assert caching_tables.with_tables(changed, made) == changed
    assert caching_tables.with_tables("no marks", made) == "no marks"


def test_merging_keeps_what_is_not_measured_anew(tmp_path: Path) -> None:
    folder, build = tmp_path / "reports", tmp_path / "build"
    (build / "results" / "unet").mkdir(parents=True)
    folder.mkdir()
    old = report(row("optimised 0.4", 40.0, 35.0), row("deepcache", 45.0, 33.0), row("full", 100.0))
    (folder / "caching-2026-01-02.json").write_text(json.dumps(old), encoding="utf-8")
    older = report(row("pab", 1.0, 1.0))
    (folder / "caching-2026-01-01.json").write_text(json.dumps(older), encoding="utf-8")
    new = [row("deepcache", 41.0, 34.0), row("5 steps", 10.0, 9.0), row("25 steps", 50.0, 30.0)]
    for at, one in enumerate(new):
        (build / "results" / "unet" / f"{at}.json").write_text(json.dumps(one), encoding="utf-8")
    made = caching.aggregate(folder, build)
    names = [one["entry"] for one in made["entries"]]
    assert names == ["full", "25 steps", "5 steps", "deepcache", "optimised 0.4"]
    assert made["entries"][3]["ms"] == 41.0
    assert made["environment"]["processor"]
    assert json.loads((folder / f"caching-{made['date']}.json").read_bytes()) == made
    assert "| optimised 0.4 | 40.0 |" in (folder / "caching.md").read_text(encoding="utf-8")


def test_every_method_is_measured_and_every_preset_is_a_valid_pass() -> None:
    presets = [fields for model in caching.PRESETS.values() for fields in model.values()]
    assert {Cache(**fields).method for fields in presets} == set(METHODS)
    run = caching.Run("unet", OWN, 50)
    assert run.fewer() == [25, 20, 15, 10, 7, 5]
    assert run.entries([0.4], ["pab", "25 steps", "optimised 0.4"]) == ["full", "25 steps", "pab", "optimised 0.4"]
    assert caching.Run("unet", OWN, 10).fewer() == [5, 4, 3, 2, 1]


def test_default_samplers_are_the_models_own() -> None:
    assert {model: next(iter(names)) for model, names in caching.SAMPLERS.items()} == caching_tables.DEFAULTS
    assert [run.sampler for run in caching.runs(["unet"], "default", [50])] == [OWN]
    assert len(list(caching.runs(["unet", "mmdit"], "all", [50, 20]))) == 12
