"""An engine with one path opens in Optimum's ONNX pipeline, in that package's own environment, and draws the same."""

from __future__ import annotations

import subprocess
import sys
import venv
from collections.abc import Callable
from importlib import metadata
from pathlib import Path

import numpy as np
import pytest

from export.engine import Engine
from export.noise import INITIAL, noise
from tests import tiny_engine as toy

# Optimum pins older diffusers and transformers than this project, so it cannot be installed beside them.
PACKAGES = ("optimum-onnx[onnxruntime]==0.1.0", "diffusers==0.36.0", "transformers==4.57.6")
PROMPTS = ["a red circle", "small blue square on the left"]

GENERATE = """
import sys
import numpy as np
import torch
from optimum.onnxruntime import ORTDiffusionPipeline
folder, latents, out, side, steps, *prompts = sys.argv[1:]
pipeline = ORTDiffusionPipeline.from_pretrained(folder, local_files_only=True)
options = {"height": int(side), "width": int(side), "num_inference_steps": int(steps), "guidance_scale": 3.0}
pictures = pipeline(prompts, latents=torch.from_numpy(np.load(latents)), output_type="np", **options).images
np.save(out, pictures)
print(type(pipeline).__name__)
"""


@pytest.fixture(scope="module")
def optimum_python(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The interpreter of an environment with Optimum; PyTorch is the one that is here, linked."""
    import torch

    folder = tmp_path_factory.mktemp("optimum") / "environment"
    venv.create(folder, with_pip=True)
    python = folder / "bin" / "python"
    packages = next(folder.glob("lib/python*/site-packages"))
    installed = Path(torch.__file__).parent.parent
    record = next(path.name for path in installed.glob("torch-*.dist-info"))
    for name in ("torch", "torchgen", "functorch", record):
        (packages / name).symlink_to(installed / name)
    subprocess.run([str(python), "-m", "pip", "install", "--quiet", *PACKAGES], check=True)
    done = subprocess.run(
        [str(python), "-c", "import torch; print(torch.__version__)"], capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == metadata.version("torch"), "Optimum must not replace PyTorch"
    assert Path(sys.prefix) != folder
    return python


@pytest.mark.slow
@pytest.mark.network
def test_optimum_draws_the_same_pictures(
    optimum_python: Path, tiny_folder: Callable[[str], Path], tmp_path: Path
) -> None:
    from compress.model.latent_diffusion import load

    toy.build(toy.sampled(load(tiny_folder("unet"))), tmp_path / "engine")
    engine = Engine.open(tmp_path / "engine", "onnxruntime-cpu", threads=1)
    latents = noise([0, 1], INITIAL, (4, toy.SIDE // 2, toy.SIDE // 2))
    np.save(tmp_path / "latents.npy", latents)
    files = [str(tmp_path / name) for name in ("engine", "latents.npy", "pictures.npy")]
    done = subprocess.run(
        [str(optimum_python), "-c", GENERATE, *files, str(toy.SIDE), str(toy.STEPS), *PROMPTS],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.split()[-1] == "ORTStableDiffusionPipeline"
    theirs = np.load(tmp_path / "pictures.npy") * 255
    ours = engine.generate(PROMPTS, noise=latents)
    assert ours.std() > 1
    assert np.abs(ours - theirs).max() <= 2
