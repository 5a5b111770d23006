"""Engines of machine code: traced on any machine, refused without a GPU or the word of the user, equal once built."""

from __future__ import annotations

import json
import logging
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from compress.cli import main
from compress.engine.export_engine import export_engine
from compress.engine.jobs import Job, jobs_of
from compress.engine.packages import trace_functions
from compress.model.latent_diffusion import load
from compress.passes.base import PassContext
from compress.passes.fuse import Fuse
from export.backends import available, backend
from export.device_loop import DeviceLoop
from export.engine import Engine
from export.errors import EngineError, ExportError
from export.gpu import gpu_here
from export.manifest import read_manifest
from export.quant_plan import QuantPlan
from export.step_plan import Gate
from export.target import TARGETS, require_buildable
from export.to_aotinductor import build_package, trace_module
from kernels.operators import gelu
from tests import tiny_engine as toy
from tests.test_gate import gated_plan

ROOT = Path(__file__).parent.parent
CUDA = TARGETS["torch-cuda"]
ON_CPU = replace(CUDA, name="torch-cpu", device="cpu")
"""What a GPU engine is, but for the device: it shows all that needs no GPU."""

FAST = {"aot_inductor.precompile_headers": False, "cpp.simdlen": 1, "aot_inductor.compile_wrapper_opt_level": "O0"}
no_gpu = pytest.mark.skipif(gpu_here(), reason="there is a GPU here")
compiler = pytest.mark.skipif(shutil.which("g++") is None, reason="there is no C++ compiler g++")


@pytest.mark.parametrize("family", ["unet", "sd3", "dit", "flux"])
def test_every_function_is_traced_with_a_dynamic_batch(family: str, tiny_folder: Callable[[str], Path]) -> None:
    model = load(tiny_folder(family))
    model = toy.cached(model, cut=1)
    jobs = list(jobs_of(model, {**toy.SHAPES, "prompt_tokens": (12, 12, 12)}))
    programs = trace_functions(model, ON_CPU, jobs)
    assert set(programs) == {job.function for job in jobs}
    for job in jobs:
        program = programs[job.function]
        assert list(program.inputs) == list(job.inputs)
        assert list(program.outputs) == list(job.outputs)
        larger = {name: _repeated(value, job, name) for name, value in job.example.items()}
        with torch.no_grad():
            expected, got = job.module(**larger), program.exported.module()(**larger)
        for value, wanted in zip(got, expected, strict=True):
            torch.testing.assert_close(value, wanted, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("family", ["unet", "sd3"])
def test_a_fused_denoiser_keeps_our_operators(family: str, tiny_folder: Callable[[str], Path]) -> None:
    model = load(tiny_folder(family))
    Fuse().apply(model, Fuse().plan(model, [CUDA]), PassContext([], 0, toy.SIDE, toy.SIDE))
    model = toy.cached(model, cut=1)
    jobs = [job for job in jobs_of(model, {**toy.SHAPES, "prompt_tokens": (12, 12, 12)}) if job.part == "denoiser"]
    kept = set()
    for program in trace_functions(model, ON_CPU, jobs).values():
        kept |= {str(node.target) for node in program.exported.graph.nodes if str(node.target).startswith("latent.")}
    own = {"unet": ("gelu", "group_norm_silu"), "sd3": ("adaln", "gated_residual")}[family]
    assert kept == {f"latent.{name}.default" for name in ("attention", *own)}
    plain = trace_functions(replace(model, fusions={}), ON_CPU, jobs).values()
    assert not [node for program in plain for node in program.exported.graph.nodes if "latent." in str(node.target)]


def _repeated(value: Tensor, job: Job, name: str) -> Tensor:
    """Three times the batch, where the input has one."""
    return torch.cat([value] * 3) if 0 in job.axes[name] else value


def test_a_denoiser_in_bf16_takes_and_gives_bf16_and_its_timestep_in_float32(
    tiny_folder: Callable[[str], Path],
) -> None:
    model = toy.sampled(load(tiny_folder("unet")))
    model.quant_plans["denoiser"] = QuantPlan({}, inference_precision="bfloat16")
    jobs = [job for job in jobs_of(model, {**toy.SHAPES, "prompt_tokens": (12, 12, 12)}) if job.part == "denoiser"]
    before = {name: value.clone() for name, value in model.denoiser.state_dict().items()}
    (program,) = trace_functions(model, ON_CPU, jobs).values()
    kinds = {name: dtype for name, (dtype, _) in {**program.inputs, **program.outputs}.items()}
    assert {kinds["sample"], kinds["encoder_hidden_states"], kinds[jobs[0].outputs[0]]} == {"bfloat16"}
    assert kinds["timestep"] == "float32"
    for name, value in model.denoiser.state_dict().items():
        assert torch.equal(value, before[name])


@no_gpu
def test_without_a_gpu_the_target_is_refused_in_one_sentence(
    tiny_folder: Callable[[str], Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert not available("aotinductor")
    with pytest.raises(
        EngineError, match=r"torch-cuda is compiled on the machine that runs it.*run the same recipe there"
    ):
        require_buildable(CUDA)
    model = toy.sampled(load(tiny_folder("unet")))
    with pytest.raises(EngineError, match="no NVIDIA GPU"):
        export_engine(model, [CUDA], toy.SHAPES, tmp_path / "engine")
    assert not (tmp_path / "engine").exists()
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(
        f"schema_version: 1\nmodel: {tiny_folder('unet')}\nsampler: {{steps: 4}}\ntargets: [torch-cuda]\n"
        f"shapes: {{batch: 1, height: 16, width: 16}}\nout: {tmp_path / 'out'}\n"
    )
    assert main([str(recipe)]) == 3
    assert "run the same recipe there" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
    assert main([str(recipe), "--dry-run"]) == 0


def test_machine_code_is_opened_on_the_users_word_alone(tiny_engine: Path, tmp_path: Path) -> None:
    folder = tmp_path / "engine"
    shutil.copytree(tiny_engine, folder)
    raw = json.loads((folder / "manifest.json").read_text())
    raw["targets"] = {"torch-cuda": {**raw["targets"]["onnxruntime-cpu"], "backend": "aotinductor", "options": {}}}
    (folder / "manifest.json").write_text(json.dumps(raw))
    from export.manifest import Manifest

    manifest = Manifest.from_json(json.dumps(raw))
    replace(manifest, engine_hash=manifest.digest(), golden=None).write(folder)
    with pytest.raises(EngineError, match=r"is machine code.*say so with trusted=True \(--trusted"):
        Engine.open(folder, "torch-cuda")
    if not gpu_here():
        with pytest.raises(EngineError, match="compiled for an NVIDIA GPU"):
            Engine.open(folder, "torch-cuda", trusted=True)
        with pytest.raises(EngineError, match="no runtime of this engine"):
            Engine.open(folder)


class Affine(nn.Module):
    """y = gelu(x @ weight) + t, by an operator of ours, and twice x."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(8, 8, generator=torch.Generator().manual_seed(0)))

    def forward(self, x: Tensor, timestep: Tensor) -> tuple[Tensor, Tensor]:
        return gelu(x @ self.weight) + timestep[:, None].to(x.dtype), 2 * x


def traced(module: nn.Module, **more: Any) -> Any:
    inputs = {rows: {"x": torch.randn(rows, 8), "timestep": torch.rand(rows)} for rows in (2, 3)}
    axes = {"x": {0: "batch"}, "timestep": {0: "batch"}}
    return trace_module(module, inputs[2], axes, ("y", "double"), inputs[3], name="affine", **more)


def test_a_program_that_is_wrong_at_another_size_is_refused() -> None:
    class Fixed(Affine):
        def forward(self, x: Tensor, timestep: Tensor) -> tuple[Tensor, Tensor]:
            y, double = super().forward(x, timestep)
            return y * float(torch.tensor(len(x)) if isinstance(len(x), int) else 2), double

    with pytest.raises(ExportError, match="affine"):
        traced(Fixed())


@compiler
def test_a_package_is_built_and_computes_in_a_fresh_process(tmp_path: Path) -> None:
    module = Affine()
    path = tmp_path / "affine.pt2"
    build_package(traced(module, dtype=torch.bfloat16), path, FAST)
    x, t = np.random.default_rng(0).standard_normal((5, 8)).astype(np.float32), np.arange(5, dtype=np.float32)
    np.savez(tmp_path / "in.npz", x=x, timestep=t)
    script = """
import sys
from pathlib import Path
import numpy as np
from export.backends import backend
package = backend("aotinductor").load(Path(sys.argv[1]), 1, {"device": "cpu"})
given = dict(np.load(sys.argv[2]))
first, again = package(given), package(given)
np.savez(sys.argv[3], again=again["y"], **first)
print({name: (spec.dtype, spec.shape) for name, spec in {**package.inputs, **package.outputs}.items()})
"""
    words = [sys.executable, "-c", script, str(path), str(tmp_path / "in.npz"), str(tmp_path / "out.npz")]
    done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "'x': ('float32', (None, 8))" in done.stdout
    got = np.load(tmp_path / "out.npz")
    low = {"x": torch.from_numpy(x).bfloat16(), "timestep": torch.from_numpy(t)}
    with torch.no_grad():
        expected = module.bfloat16()(**low)
    np.testing.assert_allclose(got["y"], expected[0].float().numpy(), rtol=2e-2, atol=2e-2)
    np.testing.assert_array_equal(got["double"], expected[1].float().numpy())
    np.testing.assert_array_equal(got["y"], got["again"])
    (tmp_path / "other.pt2").write_bytes(b"no package")
    with pytest.raises(EngineError, match="no package of this project"):
        backend("aotinductor").load(tmp_path / "other.pt2", None, {"device": "cpu"})


def test_a_package_of_another_pytorch_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from export.backends import aotinductor

    said = json.dumps({"inputs": {}, "outputs": {}, "torch": "1.0"})
    loader = torch._C._aoti.AOTIModelPackageLoader
    monkeypatch.setattr(loader, "load_metadata_from_package", lambda path, name: {"latent_compress": said})
    with pytest.raises(EngineError, match=r"compiled by torch 1\.0.*build the engine again"):
        aotinductor.load(tmp_path / "a.pt2", None, {"device": "cpu"})


def test_a_gated_plan_takes_the_ordinary_loop_and_the_log_says_why(caplog: pytest.LogCaptureFixture) -> None:
    from export.backends import aotinductor

    plan = gated_plan(Gate("skip", 0.5, 3), 0)
    with caplog.at_level(logging.WARNING, "export"):
        assert aotinductor.whole_loop(plan, {}, "sample", 1) is None
    assert "row by row, with one CUDA graph per segment: a gate decides while it runs" in caplog.text


@pytest.mark.slow
@compiler
def test_a_whole_engine_of_packages_samples_as_the_ordinary_loop_does(
    tiny_folder: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = toy.cached(load(tiny_folder("unet")), cut=1)
    Fuse().apply(model, Fuse().plan(model, [CUDA]), PassContext([], 0, toy.SIDE, toy.SIDE))
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "inductor"))
    folder = tmp_path / "engine"
    export_engine(model, [ON_CPU], toy.SHAPES, folder)
    manifest = read_manifest(folder)
    assert {Path(path).suffix for path in manifest.targets["torch-cpu"].graphs.values()} == {".pt2"}
    with pytest.raises(EngineError, match="is machine code"):
        Engine.open(folder, "torch-cpu")
    engine = Engine.open(folder, "torch-cpu", 1, trusted=True)
    prompts, seeds = ["a red circle", "a large blue ring"], [3, 4]
    latents = engine.sample(prompts, seeds)
    assert isinstance(engine.runtime._whole(0), DeviceLoop)
    ordinary = engine.sample(prompts, seeds, on_step=lambda *_: None)
    expected = toy.torch_runtime(model).sample(prompts, seeds, toy.SIDE, toy.SIDE)
    np.testing.assert_allclose(latents, ordinary, rtol=0, atol=1e-5 * np.abs(ordinary).max())
    np.testing.assert_allclose(latents, expected, rtol=0, atol=1e-4 * np.abs(expected).max())
    assert engine.generate(prompts, seeds).shape == (2, toy.SIDE, toy.SIDE, 3)
    path = folder / manifest.targets["torch-cpu"].graphs["vae_decoder"]
    opened = Engine.open(folder, "torch-cpu", 1, trusted=True)
    path.write_bytes(path.read_bytes() + b"more")
    with pytest.raises(EngineError, match="was changed after the engine was opened"):
        opened.decode(latents)
