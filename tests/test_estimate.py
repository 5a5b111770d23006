"""Tests of the estimate that a run begins with: its pieces, and the limits that refuse beforehand."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from compress import compiler
from compress.cli import main
from compress.cost import Cost
from compress.errors import RecipeError, RefusedError
from compress.estimate import Estimate, estimate
from compress.peak_memory import PeakMemory, resident_bytes
from compress.recipe.schema import Recipe

RECIPE = """\
schema_version: 1
model: {model}
sampler: {{steps: 2, guidance_scale: 2.0}}
passes:
  - quantize: {{scheme: int8-w8a8}}
targets: [onnxruntime-cpu]
shapes: {{height: 16, width: 16}}
calibration: {{prompts: {prompts}, samples: {samples}}}
out: {out}
"""


@pytest.fixture
def recipe(tiny_folder: Callable[[str], Path], tmp_path: Path) -> Callable[[int, str], Path]:
    """Calibration samples and more keys -> a recipe file of the toy UNet."""

    def write(samples: int, more: str = "") -> Path:
        prompts, path = tmp_path / "prompts.txt", tmp_path / "recipe.yaml"
        prompts.write_text("a red circle\n" * 64)
        text = RECIPE.format(model=tiny_folder("unet"), prompts=prompts, samples=samples, out=tmp_path / "engine")
        path.write_text(text + more)
        return path

    return write


def test_each_piece_is_measured_and_calibration_grows_with_its_samples(recipe: Callable[..., Path]) -> None:
    found = []
    for samples in (4, 32):
        made = compiler.opened(told := Recipe.load(recipe(samples)))
        before = made.original.state_hash()
        found.append({one.what: one for one in estimate(told, made.original, made.edits, made.context).work})
        assert made.original.state_hash() == before
        assert not any(module._forward_hooks for module in made.original.denoiser.modules())
    assert set(found[0]) == {"calibration", "going backwards", "quantizing layers", "hashes", "export"}
    assert all(one.seconds > 0 for one in found[0].values())
    assert 3.0 < found[1]["calibration"].seconds / found[0]["calibration"].seconds < 20.0


@pytest.mark.parametrize(
    ("limits", "names", "way"),
    [
        ("limits: {minutes: 0.0001}\n", "limits.minutes", "fewer"),
        ("limits: {memory_gib: 0.05}\n", "limits.memory_gib", "smaller model"),
    ],
)
def test_a_limit_refuses_before_anything_is_made(
    limits: str,
    names: str,
    way: str,
    recipe: Callable[..., Path],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    words = [str(recipe(4, limits)), "--cache", str(tmp_path / "cache")]
    assert main(words) == 3
    said = capsys.readouterr().err.strip().splitlines()[-1]
    assert said.startswith("compress: this needs about ")
    assert names in said
    assert way in said
    assert not (tmp_path / "engine").exists()
    assert not any((tmp_path / "cache" / "store").glob("*/*"))
    assert main([*words, "--dry-run"]) == 3
    assert main([*words, "--dry-run", "--set", "limits={minutes: 600, memory_gib: 64}"]) == 0


def test_a_refusal_names_what_takes_most() -> None:
    cost = Estimate((Cost("calibration", 60.0, 2**30, "fewer samples"), Cost("export", 30.0, 2**31, "time")), 2**30, 0)
    cost.refuse_beyond(None, None)
    cost.refuse_beyond(3.0, 1.5)
    with pytest.raises(RefusedError, match=r"1\.5 minutes.*minutes is 1: calibration takes most \(1\).*fewer samples"):
        cost.refuse_beyond(None, 1.0)
    with pytest.raises(RefusedError, match=r"3 GiB.*memory_gib is 2\.5: export \(2\) takes most, less with time"):
        cost.refuse_beyond(2.5, None)


@pytest.mark.parametrize("limits", ["{minutes: 0}", "{memory_gib: -1}", "{hours: 3}"])
def test_a_wrong_limit_is_refused_with_its_key(limits: str, recipe: Callable[..., Path]) -> None:
    with pytest.raises(RecipeError, match="limits"):
        Recipe.load(recipe(4, f"limits: {limits}\n"))


def test_the_peak_of_memory_is_seen() -> None:
    before = resident_bytes()
    with PeakMemory() as peak:
        held = np.ones(16 * 2**20)
        assert held.sum() > 0
        del held
    assert peak.bytes - before > 100 * 2**20
