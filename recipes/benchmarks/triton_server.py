"""Serves a packaged model repository with a real Triton Inference Server, and compares its pictures with Python's.

The server is the one that the package nvidia-pytriton 0.7.0 carries: Triton 2.51, with the back end `python` alone. It
needs an environment of its own: pip install nvidia-pytriton onnxruntime openvino tokenizers
"""

from __future__ import annotations

import argparse
import contextlib
import datetime
import json
import os
import shutil
import socket
import subprocess
import tarfile
import tempfile
import time
import urllib.request
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from compress.deploy.triton import package_for_triton
from compress.measure.environment import environment
from export.engine import Engine

NAME = "pictures"
PROMPTS = (
    "a large red circle at the left on a plain teal background",
    "a small white square left of a large blue cross on a dotted brown background",
    "a large green triangle at the left on a dotted purple background",
)
CLIENT = Path(__file__).parent / "triton_client.py"
START_S = 180.0
STAND_IN = '''"""Runs the graph beside it with the package onnxruntime, in place of the back end of that name."""

import json
from pathlib import Path

import numpy as np
import onnxruntime
import triton_python_backend_utils as pb_utils


class TritonPythonModel:
    def initialize(self, args):
        file = Path(args["model_repository"]) / args["model_version"] / "model.onnx"
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = 1
        self.session = onnxruntime.InferenceSession(
            str(file), options, providers=["CPUExecutionProvider"], disabled_optimizers=["MatMulAddFusion"]
        )
        self.inputs = [each["name"] for each in json.loads(args["model_config"])["input"]]

    def execute(self, requests):
        answers = []
        for request in requests:
            given = {name: pb_utils.get_input_tensor_by_name(request, name).as_numpy() for name in self.inputs}
            wanted = list(request.requested_output_names())
            computed = self.session.run(wanted, given)
            tensors = [pb_utils.Tensor(*pair) for pair in zip(wanted, map(np.ascontiguousarray, computed))]
            answers.append(pb_utils.InferenceResponse(tensors))
        return answers
'''


class Server:
    """A running server."""

    def __init__(self, http: int, grpc: int) -> None:
        self.http, self.grpc = http, grpc

    def told(self, path: str, body: bytes | None = None) -> Any:
        """The JSON behind a route."""
        asked = urllib.request.Request(f"http://127.0.0.1:{self.http}/v2{path}", body)
        with urllib.request.urlopen(asked, timeout=60) as answer:
            text = answer.read()
        return json.loads(text) if text else {}


@contextlib.contextmanager
def serving(models: Path, python: Path, folder: Path) -> Iterator[Server]:
    """Start the server on a model repository, and wait until it is ready.

    Args:
        models: the repository.
        python: the interpreter of the environment with nvidia-pytriton and what the models need.
        folder: for its own files.

    Raises:
        SystemExit: it does not start; the end of its log is shown.
    """
    asked = (
        "import json, sysconfig, pytriton; print(json.dumps([pytriton.__path__[0], sysconfig.get_config_var('LIBDIR'), "
    )
    asked += "sysconfig.get_python_version()]))"
    place, library, version = json.loads(subprocess.check_output([python, "-c", asked], text=True))
    carried = Path(place) / "tritonserver"
    backend = folder / "backends" / "python"
    shutil.copytree(carried / "backends" / "python", backend)
    stub = "triton_python_backend_stub"
    (backend / stub).symlink_to(carried / "python_backend_stubs" / version / stub)  # it finds its libraries from there
    ports = _free_ports(2)
    words = [
        carried / "bin" / "tritonserver",
        f"--model-repository={models}",
        f"--backend-directory={backend.parent}",
        f"--http-port={ports[0]}",
        f"--grpc-port={ports[1]}",
        "--http-address=127.0.0.1",
        "--grpc-address=127.0.0.1",
        "--allow-metrics=false",
    ]
    # Without its own library the interpreter in the stub meets another one's, and the standard library does not fit.
    around = {"PATH": f"{python.parent}:{os.environ['PATH']}", "LD_LIBRARY_PATH": library, "OMP_NUM_THREADS": "1"}
    log = folder / "server.log"
    with log.open("wb") as file:
        process = subprocess.Popen(words, cwd=folder, env=around, stdout=file, stderr=subprocess.STDOUT)
    server = Server(*ports)
    try:
        until = time.monotonic() + START_S
        while not _ready(server):
            if process.poll() is not None or time.monotonic() > until:
                raise SystemExit(f"the server did not start:\n{log.read_text(errors='replace')[-6000:]}")
            time.sleep(0.2)
        yield server
    finally:
        process.terminate()
        try:
            process.wait(60)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def jobs_of(count: int, height: int) -> list[dict[str, Any]]:
    """Requests of both protocols in turns, every third with a negative prompt; a wrong one for every twentieth."""
    jobs = []
    for k in range(count):
        job: dict[str, Any] = {
            "prompt": PROMPTS[k % len(PROMPTS)],
            "seed": k,
            "protocol": ("http", "grpc")[k // 2 % 2],
        }
        if k % 3 == 0:
            job["negative_prompt"] = PROMPTS[(k + 1) % len(PROMPTS)]
        jobs.append(job)
    wrong = [{**jobs[k], "height": height + 1} for k in range(0, count, 20)]
    return [*jobs[: count // 2], *wrong, *jobs[count // 2 :]]


def checked(folder: Path, python: Path, target: str, count: int, backends: bool) -> dict[str, Any]:
    """Package, unpack, serve, ask, compare.

    Args:
        folder: of the engine.
        python: see `serving`.
        target: of the engine.
        count: good requests.
        backends: graphs as models of their own, in which a stand-in runs in place of the back end.

    Returns:
        What came back, which batches ran, and whether every picture has the bytes that Python's has alone.
    """
    with tempfile.TemporaryDirectory() as made:
        work = Path(made)
        packaged = package_for_triton(folder, work / "it.tar.gz", target, NAME, backends)
        with tarfile.open(work / "it.tar.gz") as tar:
            tar.extractall(work, filter="data")
        models = next(work.glob("triton-*")) / "models"
        engine = Engine.open(folder, target, threads=1)
        jobs = jobs_of(count, engine.manifest.shapes["height"][1])
        (work / "jobs.json").write_text(json.dumps(jobs))
        stood_in = _stand_in(models) if backends else []
        with serving(models, python, work) as server:
            words = [python, CLIENT, str(server.http), str(server.grpc), work / "jobs.json", work / "pictures.npz"]
            errors = json.loads(subprocess.check_output(words, text=True))["errors"]
            statistics = server.told(f"/models/{NAME}/stats")["model_stats"][0]
            served = server.told("")
            instances = server.told("/repository/index", b"")
        batches = {str(row["batch_size"]): row["compute_infer"]["count"] for row in statistics["batch_stats"]}
        pictures = np.load(work / "pictures.npz")
        equal = [
            np.array_equal(pictures[str(k)], engine.generate([job["prompt"]], [job["seed"]], **_negative(job))[0])
            for k, job in enumerate(jobs)
            if str(k) in pictures
        ]
    protocols = {
        name: sum(str(k) in pictures for k, job in enumerate(jobs) if job["protocol"] == name)
        for name in ("http", "grpc")
    }
    return {
        "server": f"{served['name']} {served['version']}",
        "models": {row["name"]: row["state"] for row in instances},
        "stand_ins": stood_in,
        "engine_hash": packaged.engine_hash,
        "requests": len(jobs),
        "pictures": protocols,
        "equal_to_python": sum(equal),
        "refused_alone": len(errors),
        "sentences": sorted(set(errors.values())),
        "executions_by_batch": batches,
    }


def _negative(job: dict[str, Any]) -> dict[str, Any]:
    return {"negative_prompts": [job["negative_prompt"]]} if "negative_prompt" in job else {}


def _stand_in(models: Path) -> list[str]:
    """Let the Python back end run what is the ONNX Runtime back end's, which this server lacks; the rest stays."""
    names = []
    for file in sorted(models.glob("*/config.pbtxt")):
        text = file.read_text()
        if 'backend: "onnxruntime"' in text:
            file.write_text(text.replace('backend: "onnxruntime"', 'backend: "python"'))
            (file.parent / "1" / "model.py").write_text(STAND_IN)
            names.append(file.parent.name)
    return names


def _ready(server: Server) -> bool:
    try:
        server.told("/health/ready")
    except OSError:
        return False
    return True


def _free_ports(count: int) -> list[int]:
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for each in sockets:
            each.bind(("127.0.0.1", 0))
        return [each.getsockname()[1] for each in sockets]


def main(words: Sequence[str] | None = None) -> None:
    """Check, print, write JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("engine", type=Path, help="for onnxruntime-cpu and openvino-cpu")
    parser.add_argument("--python", type=Path, required=True, help="interpreter of the environment with the server")
    parser.add_argument("--requests", type=int, default=200)
    today = datetime.date.today().isoformat()
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / f"triton_server-{today}.json")
    options = parser.parse_args(words)
    cases = {
        "onnxruntime-cpu": ("onnxruntime-cpu", False),
        "openvino-cpu": ("openvino-cpu", False),
        "onnxruntime-cpu, graphs as models": ("onnxruntime-cpu", True),
    }
    found = {}
    for name, (target, backends) in cases.items():
        found[name] = checked(options.engine, options.python, target, options.requests, backends)
        print(json.dumps({name: found[name]}, indent=1), flush=True)
    options.out.write_text(json.dumps({"environment": environment(), "checks": found}, indent=1) + "\n")


if __name__ == "__main__":
    main()
