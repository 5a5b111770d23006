"""A packaged engine: the same bytes every time, whole, without the compiler, and it draws what the engine draws."""

from __future__ import annotations

import ast
import hashlib
import json
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from compress.cli import main
from compress.deploy.package import Packaged, package
from export.engine import Engine

ALONE = """
import runpy, sys
sys.path.insert(0, "{folder}")
sys.argv = ["run.py", "a red circle", "7", "{out}"]
runpy.run_path("{folder}/run.py", run_name="__main__")
foreign = {{"torch", "diffusers", "transformers", "onnx", "compress", "fastapi"}} & set(sys.modules)
print(sys.modules["export.engine"].__file__, sorted(foreign))
"""


@pytest.fixture(scope="module")
def made(tiny_engine: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Packaged, Path, Path]:
    """What was said, the archive, and the folder it unpacks to."""
    folder = tmp_path_factory.mktemp("packaged")
    said = package(tiny_engine, folder / "toy.tar.gz")
    with tarfile.open(folder / "toy.tar.gz") as tar:
        tar.extractall(folder, filter="data")
    return said, folder / "toy.tar.gz", next(path for path in folder.iterdir() if path.is_dir())


def test_equal_engines_give_equal_archives(
    made: tuple[Packaged, Path, Path], tiny_engine: Path, tmp_path: Path
) -> None:
    shutil.copytree(tiny_engine, tmp_path / "elsewhere", copy_function=shutil.copyfile)
    again = package(tmp_path / "elsewhere", tmp_path / "other.tar.gz")
    assert again == made[0]
    assert (tmp_path / "other.tar.gz").read_bytes() == made[1].read_bytes()
    assert hashlib.sha256(made[1].read_bytes()).hexdigest() == again.sha256


def test_every_file_has_its_hash(made: tuple[Packaged, Path, Path]) -> None:
    said, _, folder = made
    lines = (folder / "SHA256SUMS").read_text().splitlines()
    files = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}
    assert {line.partition("  ")[2] for line in lines} == files - {"SHA256SUMS"}
    assert said.files == len(files)
    for line in lines:
        digest, _, path = line.partition("  ")
        assert hashlib.sha256((folder / path).read_bytes()).hexdigest() == digest


def test_it_draws_alone_what_the_engine_draws(
    made: tuple[Packaged, Path, Path], tiny_engine: Path, tmp_path: Path
) -> None:
    out = tmp_path / "circle.png"
    code = ALONE.format(folder=made[2], out=out)
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split(maxsplit=1) == [str(made[2] / "export" / "engine.py"), "[]\n"]
    assert np.array_equal(np.asarray(Image.open(out)), Engine.open(tiny_engine).generate(["a red circle"], [7])[0])


def test_it_takes_along_what_it_imports_and_no_compiler(made: tuple[Packaged, Path, Path]) -> None:
    folder = made[2]
    assert {"export", "serve", "engine"} == {path.name for path in folder.iterdir() if path.is_dir()}
    for path in folder.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] in ("export", "serve"):
                parts = folder.joinpath(*node.module.split("."))
                assert parts.with_suffix(".py").is_file() or (parts / "__init__.py").is_file(), (path, node.module)
    assert not list(folder.glob("export/to_*.py"))


def test_the_engine_hash_stays_where_all_targets_do(made: tuple[Packaged, Path, Path], tiny_engine: Path) -> None:
    manifest = Engine.open(made[2] / "engine").manifest
    assert manifest.engine_hash == Engine.open(tiny_engine).manifest.engine_hash == made[0].engine_hash
    assert not {path for path in manifest.files if path.startswith("report") or path == "recipe.yaml"}


def test_one_target_alone(tiny_engine: Path, tmp_path: Path) -> None:
    package(tiny_engine, tmp_path / "one.tar.gz", "onnxruntime-cpu")
    with tarfile.open(tmp_path / "one.tar.gz") as tar:
        tar.extractall(tmp_path, filter="data")
    (folder,) = (path for path in tmp_path.iterdir() if path.is_dir())
    engine = Engine.open(folder / "engine")
    assert engine.target == "onnxruntime-cpu"
    assert engine.verify()["relative_error"] == 0.0
    assert not list(folder.rglob("*openvino*"))
    asked = (folder / "requirements.txt").read_text()
    assert "onnxruntime==" in asked
    assert not {"openvino", "torch"} & set(asked.replace("==", " ").split())


def test_the_container_and_the_service_start_what_is_there(made: tuple[Packaged, Path, Path]) -> None:
    docker, unit = ((made[2] / name).read_text() for name in ("Dockerfile", "engine.service"))
    words = [line.split()[0] for line in docker.splitlines() if line and not line.startswith(" ")]
    assert words == "FROM WORKDIR COPY RUN COPY USER EXPOSE STOPSIGNAL HEALTHCHECK ENTRYPOINT CMD".split()
    for line in docker.splitlines():
        if line.startswith(("CMD", "ENTRYPOINT")):
            assert all(isinstance(word, str) for word in json.loads(line.partition(" ")[2]))
    assert "-m serve engine --keys ${CREDENTIALS_DIRECTORY}/keys" in unit
    assert "TimeoutStopSec=150" in unit
    assert (made[2] / "serve" / "__main__.py").is_file()


WRONG = {
    "no engine": (("nothing",), 3, "no engine at nothing"),
    "an unknown target": (("ENGINE", "--target", "x", "-o", "a.tar.gz"), 3, "not built for 'x'"),
    "another kind of archive": (("ENGINE", "-o", "a.zip"), 2, "written as NAME.tar.gz"),
    "a place that is a file": (("ENGINE", "-o", "file/a.tar.gz"), 3, "cannot be written"),
}


@pytest.mark.parametrize(("words", "code", "sentence"), WRONG.values(), ids=WRONG)
def test_refusals(
    words: tuple[str, ...],
    code: int,
    sentence: str,
    tiny_engine: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").write_text("")
    assert main(["package", *(str(tiny_engine) if word == "ENGINE" else word for word in words)]) == code
    assert sentence in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["file"]
