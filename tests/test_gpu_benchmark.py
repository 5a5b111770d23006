"""The measurement of kernels on a GPU runs from end to end on a CPU, and keeps what it has when it is cut off."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch

from kernels import gemm_w8a8
from recipes.benchmarks.gpu import tune
from recipes.benchmarks.gpu.__main__ import SECTIONS, TUNING, main
from recipes.benchmarks.gpu.bench import Bar, Bench, judged
from recipes.benchmarks.gpu.clock import Clock
from recipes.benchmarks.gpu.networks import TINY_MMDIT, TINY_UNET, Eager, MMDiT, UNet
from tests.test_house import imports

FOLDER = Path(__file__).parent.parent / "recipes" / "benchmarks" / "gpu"
CPU = ["--device", "cpu", "--tiny"]
NEEDED = {"torch", "numpy", "kernels", "recipes"}


def bench(**more: Any) -> Bench:
    device = torch.device("cpu")
    return Bench(device, True, False, Clock(device, 0.0, 1), **more)


def test_it_needs_torch_triton_and_numpy_alone() -> None:
    """No diffusers and nothing of `compress` or `export` is on such a machine."""
    from sys import stdlib_module_names

    for path in sorted(FOLDER.glob("*.py")):
        foreign = {name.partition(".")[0] for name in imports(path)} - set(stdlib_module_names) - NEEDED
        assert not foreign, f"{path.name} imports {foreign}"
        assert all(name.startswith("recipes.benchmarks.gpu") for name in imports(path) if name.startswith("recipes"))


def test_every_section_runs_to_its_end_on_a_cpu(tmp_path: Path) -> None:
    out = tmp_path / "gpu.json"
    assert main([*CPU, "--out", str(out), "--limit", "5"]) == 0
    result = json.loads(out.read_text())
    assert result["versions"]["torch"] == torch.__version__
    sections = result["sections"]
    assert list(sections) == [name for name, row in SECTIONS.items() if row.part != TUNING]
    assert {section["state"] for section in sections.values()} == {"complete"}
    checks = sections["correctness"]["rows"]
    assert len(checks) >= 38
    assert not [row for row in checks if not row["passed"]]
    contests = [row for name in ("steps", "heads", "rows", "products") for row in sections[name]["rows"]]
    assert len(contests) >= 19
    for row in contests:
        assert row["ms"]["ours"] > 0.0
        assert "failed" not in row, row
        assert row["times_the_floor"]["ours"] == pytest.approx(row["ms"]["ours"] / row["floor_ms"])
    for name in ("unet", "mmdit"):
        ways = {row["way"]: row for row in sections[name]["rows"]}
        assert list(ways) == ["eager", "ours", "ours fp8", "ours fp8 cached", "verdict"]
        assert ways["ours"]["error"] < 0.1
        assert ways["ours"]["error"] < ways["ours fp8"]["error"] < 0.5
        assert ways["ours"]["error"] < ways["ours fp8 cached"]["error"] < 0.5
    assert "plain torch" in " ".join(sections["rows"]["chosen"]) or "reference" in " ".join(sections["rows"]["chosen"])
    assert not list(tmp_path.glob("*.jsonl"))


def test_configurations_are_tried_and_put_back(tmp_path: Path) -> None:
    out = tmp_path / "gpu.json"
    before = dict(gemm_w8a8.CONFIGURATIONS)
    assert main([*CPU, "--out", str(out), "--part", str(TUNING), "--limit", "5"]) == 0
    tried = [row for section in json.loads(out.read_text())["sections"].values() for row in section["rows"]]
    assert {row["operation"] for row in tried} > {"attention_int8", "gemm_int8", "gemm_w4a16", "group_norm_silu fp8"}
    assert all(row["ms"] > 0.0 for row in tried)
    for row in tune.products(bench()):
        assert "reason" not in row
    assert before == gemm_w8a8.CONFIGURATIONS


def test_kernels_are_compiled_beforehand_and_nothing_is_kept(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "gpu.json"
    assert main([*CPU, "--out", str(out), "--warm", "--sections", "steps", "products", "--limit", "5"]) == 0
    assert capsys.readouterr().out.splitlines() == ["steps: complete", "products: complete"]
    assert not list(tmp_path.iterdir())
    assert main([*CPU, "--out", str(out), "--warm", "--sections", "steps", "--limit", "0.001"]) == 1


def test_a_section_that_takes_too_long_is_stopped_and_the_others_are_kept(tmp_path: Path) -> None:
    out = tmp_path / "gpu.json"
    kept = ["--compiled", str(tmp_path / "kept")]
    assert main([*CPU, "--out", str(out), "--sections", "ceilings", "--limit", "5", *kept]) == 0
    assert main([*CPU, "--out", str(out), "--sections", "unet", "--limit", "0.001"]) == 1
    sections = json.loads(out.read_text())["sections"]
    assert len(sections["ceilings"]["rows"]) == 4
    assert sections["unet"]["state"].startswith("stopped after")
    with pytest.raises(SystemExit, match="another tiny"):
        main(["--device", "cpu", "--out", str(out), "--sections", "ceilings"])


def test_without_a_gpu_it_says_what_can_be_done(tmp_path: Path) -> None:
    if torch.cuda.is_available():
        pytest.skip("there is a GPU here")
    with pytest.raises(SystemExit, match="--device cpu --tiny"):
        main(["--out", str(tmp_path / "gpu.json")])


def test_a_contest_survives_a_peer_that_fails_and_tells_the_floor() -> None:
    def broken() -> None:
        raise RuntimeError("not on this device")

    one = bench(ceilings={"copy": 1000.0, "bfloat16": 1.0})
    given = torch.ones(4)
    row = one.contest(
        "twice", "toy", "4", {"ours": lambda: 2 * given, "theirs": broken}, moved=1e9, truth=torch.full((4,), 2.0)
    )
    assert row["failed"] == {"theirs": "RuntimeError: not on this device"}
    assert row["error"] == {"ours": 0.0}
    assert row["floor_ms"] == pytest.approx(1.0)
    assert row["bound"] == "memory"
    assert one.floor_ms(1e9, 2e10) == pytest.approx(20.0)
    assert one.floor_ms(1e9, 2e10, "int8") is None


def test_a_missed_bar_has_its_reason() -> None:
    row = {"ms": {"ours": 2.0, "theirs": 3.0}, "floor_ms": 1.0, "bound": "memory"}
    assert judged(row, Bar(1.5, "theirs"))["passed"]
    missed = judged(row, Bar(2.0, "theirs"))
    assert not missed["passed"]
    assert missed["reached"] == pytest.approx(1.5)
    assert missed["reason"] == "1.50 was reached; ours takes 2.00 times the memory floor, theirs 3.00 times"
    assert not judged(row, Bar(1.25))["passed"]
    assert judged({**row, "ms": {"ours": 1.2}}, Bar(1.25))["passed"]
    assert judged(row, Bar(1.5, "others"))["passed"] is None
    failed = judged({"ms": {}, "floor_ms": None, "failed": {"ours": "no"}}, Bar(2.0, "theirs"))
    assert failed["reason"] == "ours did not run: no"


@pytest.mark.parametrize(("make", "sizes"), [(UNet, TINY_UNET), (MMDiT, TINY_MMDIT)])
def test_a_network_with_what_it_kept_of_the_same_call_is_the_whole_network(make: Any, sizes: Any) -> None:
    torch.manual_seed(0)
    network = make(sizes).eval()
    x, text = torch.randn(2, *sizes.latent), torch.randn(2, *sizes.text)
    with torch.no_grad():
        whole, deep = network(x, torch.full((2,), 500.0), text, Eager())
        again, _ = network(x, torch.full((2,), 500.0), text, Eager(), deep)
        other, _ = network(x, torch.full((2,), 500.0), 2 * text, Eager(), deep)
    assert whole.shape == x.shape
    assert math.isfinite(float(whole.std()))
    torch.testing.assert_close(again, whole, rtol=1e-4, atol=1e-5)
    if make is UNet:  # only the lower levels read the text
        assert torch.equal(other, again)
