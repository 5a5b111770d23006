"""A model repository of Triton: its configuration, and the Python model behind a stand-in for the server's module."""

from __future__ import annotations

import importlib
import json
import re
import subprocess
import sys
import tarfile
import types
import venv
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from compress.cli import main
from compress.deploy.triton import package_for_triton
from compress.deploy.triton_config import ModelConfig, Tensor
from compress.errors import RefusedError
from export.backends import backend
from export.engine import Engine
from export.errors import EngineError
from export.manifest import FILE, read_manifest
from tests.tiny_engine import SIDE

TARGET = "onnxruntime-cpu"
TOKEN = re.compile(r'\s*("(?:[^"\\]|\\.)*"|[\[\]{}:,]|[A-Za-z0-9_.+-]+)')


def parsed(text: str) -> dict[str, Any]:
    """Read protobuf text: fields of messages, lists and scalars; a field that is there twice is refused."""
    tokens = TOKEN.findall(text)
    assert re.sub(TOKEN, "", text).strip() == ""

    def value() -> Any:
        token = tokens.pop(0)
        if token == "{":
            return message("}")
        if token == "[":
            entries = []
            while tokens[0] != "]":
                entries.append(value())
                if tokens[0] == ",":
                    tokens.pop(0)
            tokens.pop(0)
            return entries
        return json.loads(token) if token[0] == '"' or token.lstrip("-").isdigit() else token

    def message(end: str) -> dict[str, Any]:
        fields: dict[str, Any] = {}
        while tokens and tokens[0] != end:
            name = tokens.pop(0)
            assert name not in fields
            if tokens[0] == ":":
                tokens.pop(0)
            fields[name] = value()
        if end:
            tokens.pop(0)
        return fields

    return message("")


def unpacked(engine: Path, folder: Path, **options: Any) -> Path:
    """The folder `models` of a package."""
    package_for_triton(engine, folder / "it.tar.gz", **options)
    with tarfile.open(folder / "it.tar.gz") as tar:
        tar.extractall(folder, filter="data")
    return next(folder.glob("triton-*")) / "models"


@pytest.fixture(scope="module")
def models(tiny_engine: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return unpacked(tiny_engine, tmp_path_factory.mktemp("triton"), target=TARGET)


@pytest.fixture(scope="module")
def split(tiny_engine: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The graphs as models of their own."""
    return unpacked(tiny_engine, tmp_path_factory.mktemp("triton"), target=TARGET, backends=True)


def test_the_configuration_of_the_pictures(models: Path) -> None:
    text = {"data_type": "TYPE_STRING", "dims": [1]}
    pixels = {"data_type": "TYPE_INT32", "dims": [1], "optional": "true"}
    assert parsed((models / "pictures" / "config.pbtxt").read_text()) == {
        "name": "pictures",
        "backend": "python",
        "max_batch_size": 4,
        "input": [
            {"name": "prompt", **text},
            {"name": "seed", "data_type": "TYPE_UINT64", "dims": [1]},
            {"name": "negative_prompt", **text, "optional": "true"},
            {"name": "height", **pixels},
            {"name": "width", **pixels},
        ],
        "output": [{"name": "picture", "data_type": "TYPE_UINT8", "dims": [SIDE, SIDE, 3]}],
        "instance_group": [{"count": 1, "kind": "KIND_CPU"}],
        "dynamic_batching": {"max_queue_delay_microseconds": 0},
    }


def test_the_configurations_of_the_graphs_are_what_the_graphs_take(split: Path, tiny_engine: Path) -> None:
    types = {"float32": "TYPE_FP32", "int64": "TYPE_INT64"}
    row = read_manifest(tiny_engine).targets[TARGET]
    told = json.loads((split / "pictures" / "1" / "graphs.json").read_text())
    assert set(told) == set(row.graphs) - {"vae_encoder"}
    for function, found in told.items():
        config = parsed((split / found["model"] / "config.pbtxt").read_text())
        graph = backend("onnxruntime").load(tiny_engine / row.graphs[function], None, {})
        for key, specs in (("input", graph.inputs), ("output", graph.outputs)):
            assert config.pop(key) == [
                {
                    "name": name,
                    "data_type": types[spec.dtype],
                    "dims": [-1 if size is None else size for size in spec.shape],
                }
                for name, spec in specs.items()
            ]
        assert config == {
            "name": f"pictures-{function}",
            "backend": "onnxruntime",
            "max_batch_size": 0,
            "instance_group": [{"count": 1, "kind": "KIND_CPU"}],
        }


def test_an_engine_of_classic_tensorrt_is_run_by_its_back_end(tiny_engine: Path, tmp_path: Path) -> None:
    """The library is not to be had here, so engines are stood in for by bytes; the record is that of the builder."""
    folder = tmp_path / "engine"
    whole = read_manifest(tiny_engine)
    content = json.loads((tiny_engine / FILE).read_text())
    graphs = {name: path.replace(".onnx", ".tensorrt.engine") for name, path in whole.targets[TARGET].graphs.items()}
    tensors = {"inputs": {"sample": ["float32", [None, 4, 8, 8]]}, "outputs": {"out": ["float32", [None, 4, 8, 8]]}}
    content["targets"]["tensorrt"] = {
        **content["targets"][TARGET],
        **{"backend": "tensorrt", "graphs": graphs, "build": {"tensors": dict.fromkeys(graphs, tensors)}},
    }
    _rebuilt(tiny_engine, folder, content, {path: b"engine" for path in graphs.values()})
    place = unpacked(folder, tmp_path, target="tensorrt", backends=True)
    assert (place / "pictures-vae_decoder" / "1" / "model.plan").read_bytes() == b"engine"
    config = parsed((place / "pictures-vae_decoder" / "config.pbtxt").read_text())
    assert config["backend"] == "tensorrt"
    assert config["instance_group"] == [{"count": 1, "kind": "KIND_GPU"}]
    assert config["input"] == [{"name": "sample", "data_type": "TYPE_FP32", "dims": [-1, 4, 8, 8]}]
    del content["targets"]["tensorrt"]["build"]["tensors"]
    _rebuilt(tiny_engine, folder, content, {path: b"engine" for path in graphs.values()})
    with pytest.raises(RefusedError, match="build it again"):
        package_for_triton(folder, tmp_path / "b.tar.gz", "tensorrt", backends=True)


def _rebuilt(engine: Path, folder: Path, content: dict[str, Any], files: dict[str, bytes]) -> None:
    """A copy of an engine with other content and more files, its hashes right."""
    import shutil

    from export.manifest import Manifest

    shutil.copytree(engine, folder, dirs_exist_ok=True)
    for path, data in files.items():
        (folder / path).write_bytes(data)
    content = json.loads(json.dumps(content))
    for path in files:
        content["files"][path] = {"sha256": "", "bytes": 0, "run": True}
    manifest = Manifest.from_json(json.dumps(content))
    run = {path for path, entry in manifest.files.items() if entry.run}
    manifest.sealed(folder, run).write(folder)


NAMES = ("", "a/b", "..", ".hidden", "a b", 'a"b', "é", "a" * 129, "a\n")


@pytest.mark.parametrize("name", NAMES)
def test_names_that_are_no_folder_or_route_are_refused(name: str, tiny_engine: Path, tmp_path: Path) -> None:
    with pytest.raises(RefusedError, match="cannot be called"):
        package_for_triton(tiny_engine, tmp_path / "it.tar.gz", name=name)
    with pytest.raises(RefusedError, match="cannot be called"):
        ModelConfig(name, "python", [], [], "KIND_CPU").text()
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("tensor", [Tensor("x", "bfloat16", (1,)), Tensor("x", "float32", ())])
def test_tensors_that_triton_has_not_are_refused(tensor: Tensor) -> None:
    with pytest.raises(RefusedError, match="no tensor like 'x'"):
        tensor.text()


WRONG = {
    "no server named": (("--name", "a"), 2, "say --for triton-server"),
    "no back end": (("--for", "triton-server", "--backends", "--target", "openvino-cpu"), 3, "no back end"),
    "a bad name": (("--for", "triton-server", "--name", "a b"), 3, "cannot be called 'a b'"),
    "an unknown target": (("--for", "triton-server", "--backends", "--target", "x"), 3, "not built for 'x'"),
}


@pytest.mark.parametrize(("words", "code", "sentence"), WRONG.values(), ids=WRONG)
def test_refusals(
    words: Sequence[str],
    code: int,
    sentence: str,
    tiny_engine: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert main(["package", str(tiny_engine), "-o", str(tmp_path / "a.tar.gz"), *words]) == code
    assert sentence in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


@dataclass
class FakeTensor:
    """As the server's: a name and an array."""

    called: str
    array: np.ndarray

    def name(self) -> str:
        return self.called

    def as_numpy(self) -> np.ndarray:
        return self.array


@dataclass
class FakeError(Exception):
    """As the server's: a message, and a code."""

    INVALID_ARG = 3
    text: str
    code: int = 0

    def message(self) -> str:
        return self.text


@dataclass
class FakeResponse:
    """As the server's: tensors, or an error."""

    output_tensors: list[FakeTensor] = field(default_factory=list)
    error_: FakeError | None = None

    def has_error(self) -> bool:
        return self.error_ is not None

    def error(self) -> FakeError | None:
        return self.error_


class FakeServer(types.ModuleType):
    """The module that the server gives its Python models, with the ONNX models of a repository to ask.

    Attributes:
        repository: of the models.
        asked: the names of the models that were asked, in order.
    """

    Tensor, TritonError, TritonModelException = FakeTensor, FakeError, type("TritonModelException", (Exception,), {})
    TRITONSERVER_MEMORY_CPU = 0

    def __init__(self, repository: Path) -> None:
        super().__init__("triton_python_backend_utils")
        self.repository, self.asked = repository, list[str]()

    def InferenceResponse(self, output_tensors: Any = (), error: Any = None) -> FakeResponse:
        return FakeResponse(list(output_tensors), error)

    def InferenceRequest(self, model_name: str, inputs: Any, requested_output_names: Any, **_: Any) -> Any:
        file = self.repository / model_name / "1" / "model.onnx"

        def run() -> FakeResponse:
            self.asked.append(model_name)
            if not file.is_file():
                return FakeResponse(error_=FakeError(f"Request for unknown model: {model_name}\n is not found"))
            computed = backend("onnxruntime").load(file, 1, {})({each.called: each.array for each in inputs})
            return FakeResponse([FakeTensor(name, computed[name]) for name in requested_output_names])

        return types.SimpleNamespace(exec=run)

    def PreferredMemory(self, kind: int, device: int) -> tuple[int, int]:
        return kind, device

    def get_input_tensor_by_name(self, request: dict[str, np.ndarray], name: str) -> FakeTensor | None:
        return FakeTensor(name, request[name]) if name in request else None

    def get_output_tensor_by_name(self, response: FakeResponse, name: str) -> FakeTensor:
        return next(each for each in response.output_tensors if each.called == name)


@pytest.fixture
def server(models: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeServer]:
    fake = FakeServer(models)
    monkeypatch.setitem(sys.modules, fake.__name__, fake)
    monkeypatch.delitem(sys.modules, "serve.triton_model", raising=False)
    yield fake
    sys.modules.pop("serve.triton_model", None)


def loaded(repository: Path) -> Any:
    """The Python model, initialized as the server does it."""
    model = importlib.import_module("serve.triton_model").TritonPythonModel()
    config = json.dumps({"name": "pictures", "max_batch_size": 4})
    model.initialize({"model_config": config, "model_repository": str(repository / "pictures"), "model_version": "1"})
    return model


def request(*prompts: str | bytes, seed: int = 0, **given: Any) -> dict[str, np.ndarray]:
    """One request with an entry for each prompt; seeds count up."""
    texts = [each if isinstance(each, bytes) else each.encode() for each in prompts]
    row = {"prompt": np.array(texts, np.object_)[:, None]}
    row["seed"] = np.arange(seed, seed + len(texts), dtype=np.uint64)[:, None]
    for name, value in given.items():
        dtype = np.object_ if name == "negative_prompt" else np.int32
        values = value if isinstance(value, list) else [value] * len(texts)
        row[name] = np.array(values, dtype)[:, None]
    return row


def alone(engine: Engine, prompt: str, seed: int, **options: Any) -> np.ndarray:
    return engine.generate([prompt], [seed], **options)[0]


@pytest.fixture(scope="module")
def engine(tiny_engine: Path) -> Engine:
    return Engine.open(tiny_engine, TARGET)


def test_requests_are_drawn_together_and_have_the_bytes_they_have_alone(
    models: Path, server: FakeServer, engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = loaded(models)
    sizes, plain = [], model._hosted.draw
    monkeypatch.setattr(model._hosted, "draw", lambda orders: (sizes.append(len(orders)), plain(orders))[1])
    answers = model.execute(
        [
            request("a red circle", seed=5),
            request("a blue cross", seed=6, negative_prompt=b"a red circle"),
            request("a red", "a blue", seed=7),
            request("a circle", seed=9, height=SIDE, width=SIDE),
        ]
    )
    assert sizes == [4, 1]
    assert not any(answer.has_error() for answer in answers)
    pictures = [answer.output_tensors[0].as_numpy() for answer in answers]
    assert [each.shape for each in pictures] == [(1, SIDE, SIDE, 3)] * 2 + [(2, SIDE, SIDE, 3), (1, SIDE, SIDE, 3)]
    assert {each.dtype for each in pictures} == {np.dtype(np.uint8)}
    assert np.array_equal(
        np.concatenate(pictures),
        [
            alone(engine, "a red circle", 5),
            alone(engine, "a blue cross", 6, negative_prompts=["a red circle"]),
            alone(engine, "a red", 7),
            alone(engine, "a blue", 8),
            alone(engine, "a circle", 9),
        ],
    )


BAD = {
    "height": (request("a", height=SIDE + 1), f"pictures of the height {SIDE}, not {SIDE + 1}"),
    "negative width": (request("a", width=-8), f"pictures of the width {SIDE}, not -8"),
    "two heights": (request("a", "b", height=[SIDE, SIDE + 8]), f"have one height, not {SIDE} and {SIDE + 8}"),
    "no text": (request(b"\xff"), "prompt is not text in UTF-8"),
    "no negative text": (request("a", negative_prompt=b"\xff"), "negative_prompt is not text in UTF-8"),
    "a long prompt": (request("a" * 4001), "prompt may have 4000 characters at most"),
}


@pytest.mark.parametrize(("bad", "sentence"), BAD.values(), ids=BAD)
def test_a_wrong_request_fails_alone(
    bad: dict[str, np.ndarray], sentence: str, models: Path, server: FakeServer, engine: Engine
) -> None:
    first, failed, last = loaded(models).execute([request("a red", seed=1), bad, request("a blue", seed=2)])
    assert sentence in failed.error().message()
    assert failed.error().code == FakeError.INVALID_ARG
    assert not failed.output_tensors
    assert np.array_equal(first.output_tensors[0].as_numpy()[0], alone(engine, "a red", 1))
    assert np.array_equal(last.output_tensors[0].as_numpy()[0], alone(engine, "a blue", 2))


@pytest.mark.parametrize(
    ("failure", "sentence"),
    [(EngineError("no such class"), "no such class"), (KeyError("x"), "the engine failed (KeyError)")],
    ids=["refused", "broken"],
)
def test_what_fails_while_it_is_drawn_fails_alone(
    failure: Exception,
    sentence: str,
    models: Path,
    server: FakeServer,
    engine: Engine,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model = loaded(models)
    plain = model._hosted.draw

    def drawn(orders: Sequence[Any]) -> Any:
        if any(order.prompt == "bad" for order in orders):
            raise failure
        return plain(orders)

    monkeypatch.setattr(model._hosted, "draw", drawn)
    first, failed, last = model.execute([request("a red", seed=1), request("bad"), request("a blue", seed=2)])
    assert failed.error().message().startswith(sentence)
    assert np.array_equal(first.output_tensors[0].as_numpy()[0], alone(engine, "a red", 1))
    assert np.array_equal(last.output_tensors[0].as_numpy()[0], alone(engine, "a blue", 2))


def test_a_damaged_engine_is_no_model(tiny_engine: Path, server: FakeServer, tmp_path: Path) -> None:
    place = unpacked(tiny_engine, tmp_path, target=TARGET)
    (place / "pictures" / "1" / "engine" / "step_plan.json").write_text("{}")
    with pytest.raises(server.TritonModelException, match="the engine is damaged"):
        loaded(place)


def test_graphs_of_the_server_give_the_same_pictures(split: Path, server: FakeServer, engine: Engine) -> None:
    server.repository = split
    model = loaded(split)
    assert not server.asked, "no other model answers before all are loaded"
    (answer,) = model.execute([request("a red", "a blue", seed=3)])
    assert set(server.asked) == {path.name for path in split.iterdir()} - {"pictures"}
    expected = [alone(engine, "a red", 3), alone(engine, "a blue", 4)]
    assert np.array_equal(answer.output_tensors[0].as_numpy(), expected)


def test_a_graph_that_the_server_cannot_run_is_one_sentence(split: Path, server: FakeServer, tmp_path: Path) -> None:
    server.repository = tmp_path
    answers = loaded(split).execute([request("a red"), request("a blue")])
    assert {answer.error().message() for answer in answers} == {
        "the model pictures-text_encoder did not run: Request for unknown model: pictures-text_encoder is not found"
    }


ALONE = """
import json, sys, types
fake = types.ModuleType("triton_python_backend_utils")
sys.modules[fake.__name__] = fake
sys.path.append("{version}")  # as the server does it
import model
args = {{"model_config": json.dumps({{"name": "pictures", "max_batch_size": 2}}), "model_version": "1"}}
opened = model.TritonPythonModel()
opened.initialize({{**args, "model_repository": "{folder}"}})
print(sorted({{"torch", "onnx", "compress", "fastapi", "PIL"}} & set(sys.modules)), sys.modules["export"].__file__)
"""


def test_it_takes_along_all_that_it_needs(models: Path, tmp_path: Path) -> None:
    """Even where the server is started from a folder that holds packages of the same names."""
    for name in ("serve", "export"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "__init__.py").write_text("")
    folder = models / "pictures"
    code = ALONE.format(version=folder / "1", folder=folder)
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["[]", str(folder / "1" / "export" / "__init__.py")]


def test_equal_engines_give_equal_repositories(tiny_engine: Path, tmp_path: Path) -> None:
    for backends in (False, True):
        made = [package_for_triton(tiny_engine, tmp_path / f"{k}.tar.gz", TARGET, backends=backends) for k in range(2)]
        assert made[0] == made[1]
        assert (tmp_path / "0.tar.gz").read_bytes() == (tmp_path / "1.tar.gz").read_bytes()


@pytest.mark.slow
@pytest.mark.network
@pytest.mark.parametrize("backends", [False, True])
def test_a_real_server_answers(backends: bool, tiny_engine: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    from recipes.benchmarks.triton_server import checked

    place = tmp_path_factory.getbasetemp() / "triton-server"
    python = place / "bin" / "python"
    if not python.exists():
        venv.create(place, with_pip=True)
        wanted = ["nvidia-pytriton==0.7.0", "onnxruntime", "tokenizers"]
        words = [str(python), "-m", "pip", "install", "--quiet", *wanted]
        done = subprocess.run(words, capture_output=True, text=True, check=False)
        if done.returncode:
            pytest.skip(f"the server cannot be installed: {' '.join(done.stderr.split())[-200:]}")
    found = checked(tiny_engine, python, TARGET, 40, backends)
    assert found["pictures"] == {"http": 20, "grpc": 20}
    assert found["equal_to_python"] == 40
    assert found["refused_alone"] == 2
    assert max(map(int, found["executions_by_batch"])) > 1
