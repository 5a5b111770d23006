"""An engine runs with numpy, tokenizers and one runtime: shown in a fresh process, and in a fresh environment."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import venv
from importlib import metadata
from pathlib import Path

import numpy as np
import pytest

from export.backends import BACKENDS, available, holds_machine_code
from export.engine import Engine

ROOT = Path(__file__).parent.parent
ABSENT = ("torch", "diffusers", "transformers", "onnx", "onnxscript", "brevitas", "compress", "recipes", "yaml", "PIL")

GENERATE = """
import json, sys
import numpy as np
from export.engine import Engine
folder, target, out = sys.argv[1:]
engine = Engine.open(folder, target, threads=1)
np.save(out, engine.generate(prompts=["a red circle", ""], seeds=[3, 4]))
print(json.dumps(sorted(name for name in sys.modules if "." not in name)))
"""


def run(python: str, script: str, *arguments: str) -> str:
    """Run a script in a process that sees this project's packages and nothing else from here."""
    done = subprocess.run(
        [python, "-W", "error", "-c", script, *arguments],
        cwd=ROOT / "tests",
        env={"PATH": os.environ["PATH"], "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize("name", [name for name in BACKENDS if available(name) and not holds_machine_code(name)])
def test_opening_an_engine_imports_no_training_framework(name: str) -> None:
    script = (
        "import json, sys; import export.engine; from export.backends import backend; backend(sys.argv[1]);"
        "print(json.dumps(sorted(name for name in sys.modules if '.' not in name)))"
    )
    loaded = set(json.loads(run(sys.executable, script, name)))
    assert {"export", "numpy", name} <= loaded
    assert not loaded & set(ABSENT)
    assert not loaded & (set(BACKENDS) - {name}), "one runtime is enough"


def test_generating_imports_no_training_framework(tiny_engine: Path, tmp_path: Path) -> None:
    loaded = set(
        json.loads(run(sys.executable, GENERATE, str(tiny_engine), "onnxruntime-cpu", str(tmp_path / "p.npy")))
    )
    assert "tokenizers" in loaded
    assert not loaded & set(ABSENT)
    here = Engine.open(tiny_engine, "onnxruntime-cpu", threads=1).generate(["a red circle", ""], [3, 4])
    np.testing.assert_array_equal(np.load(tmp_path / "p.npy"), here)


@pytest.mark.slow
@pytest.mark.network
def test_generates_in_an_environment_of_three_packages(tiny_engine: Path, tmp_path: Path) -> None:
    venv.create(tmp_path / "environment", with_pip=True)
    python = str(tmp_path / "environment" / "bin" / "python")
    wanted = [f"{name}=={metadata.version(name)}" for name in ("numpy", "tokenizers", "onnxruntime")]
    subprocess.run([python, "-m", "pip", "install", "--quiet", *wanted], check=True)
    run(python, GENERATE, str(tiny_engine), "onnxruntime-cpu", str(tmp_path / "pictures.npy"))
    pictures = np.load(tmp_path / "pictures.npy")
    here = Engine.open(tiny_engine, "onnxruntime-cpu", threads=1).generate(["a red circle", ""], [3, 4])
    assert pictures.shape == here.shape
    assert pictures.dtype == np.uint8
    assert np.abs(pictures.astype(int) - here).max() <= 1
