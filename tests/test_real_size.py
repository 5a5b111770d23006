"""The benchmark of production sizes, on a toy network: what it measures must be there, and its limits must hold."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from export.backends import available
from recipes.benchmarks import real_size

pytestmark = pytest.mark.skipif(not available("openvino"), reason="not installed")


def run(name: str, what: str, folder: Path) -> Any:
    real_size.step(name, what, folder)
    return json.loads((folder / f"{what}.json").read_text())


def test_a_cut_network_is_exported_into_one_pool_and_run_in_both_runtimes(tmp_path: Path) -> None:
    exported = run("toy", "export", tmp_path)
    assert set(exported["paths"]) == {"full", "shallow_0"}
    assert set(exported["export_seconds"]) == set(exported["graph_bytes"])
    assert exported["pool_bytes"] <= 2 * exported["parameters"], "16 bits a weight; small ones are in the graphs"
    (cut,) = exported["cuts"]
    assert 0 < cut["macs_share"] < 1
    assert 0 < cut["parameter_share"] < 1
    for i, (name, _) in enumerate(real_size.CASES["toy"].runtimes):
        ran = run("toy", f"run-{i}", tmp_path)
        assert ran["backend"] == name
        assert all(path["relative_error"] < real_size.TOLERANCE for path in ran["paths"].values())
        assert 0 < ran["peak_rss_gib"] < real_size.LIMIT_GIB


def test_the_same_path_is_timed_in_segments_and_as_one_graph(tmp_path: Path) -> None:
    result = run("overhead-toy", "overhead", tmp_path)
    assert len(result["segments"]) == 3
    assert result["cut"]["pool_bytes"] == pytest.approx(result["whole"]["pool_bytes"], rel=0.01)
    for row in result["runtimes"].values():
        assert row["relative_error"] < 1e-6
        assert row["cpu_ms_ratio"]["min"] > 0


def test_a_step_that_takes_too_much_memory_is_ended(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(real_size, "LIMIT_GIB", 0.05)
    assert "GiB resident" in real_size.process("toy", "export", tmp_path)["ended"]
    assert not (tmp_path / "export.json").exists()
