"""The server as a process: what it refuses to start with, and what a signal or a kill does to those it serves."""

from __future__ import annotations

import http.client
import json
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from compress.cli import main

ROOT = Path(__file__).parent.parent


def test_a_missing_extra_is_said(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tiny_engine: Path
) -> None:
    monkeypatch.setitem(sys.modules, "fastapi", None)
    assert main(["serve", str(tiny_engine)]) == 3
    assert 'fastapi is not installed; run: pip install "latent-compress[server]"' in capsys.readouterr().err


WRONG = {
    "others without keys": (("ENGINE", "--host", "0.0.0.0"), 3, "give the keys they must send"),
    "no keys in the file": (("ENGINE", "--keys", "empty"), 3, "holds no key"),
    "a short key": (("ENGINE", "--keys", "short"), 3, "short:2: this key is shorter than 16"),
    "no file of keys": (("ENGINE", "--keys", "absent"), 3, "cannot be read"),
    "no engine": (("nothing",), 3, "no engine at nothing"),
    "two of one name": (("ENGINE", "ENGINE"), 2, "a name of its own"),
    "no queue": (("ENGINE", "--queue", "0"), 2, "--queue must be at least 1"),
    "requests that never fit": (("ENGINE", "--queue", "4"), 2, "never fit into --queue 4"),
    "no port": (("ENGINE", "--port", "99999"), 2, "--port must be from 0"),
}


@pytest.mark.parametrize(("words", "code", "sentence"), WRONG.values(), ids=WRONG)
def test_what_it_does_not_start_with(
    words: tuple[str, ...],
    code: int,
    sentence: str,
    tiny_engine: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    for package in ("fastapi", "uvicorn", "prometheus_client"):
        pytest.importorskip(package, reason=f"the extra `server` is not installed: {package} is missing")
    (tmp_path / "empty").write_text("# nothing yet\n")
    (tmp_path / "short").write_text("\nsecret\n")
    monkeypatch.chdir(tmp_path)
    assert main(["serve", *(str(tiny_engine) if word == "ENGINE" else word for word in words)]) == code
    assert sentence in capsys.readouterr().err


def test_a_port_in_use_is_said_before_an_engine_is_opened(capsys: pytest.CaptureFixture[str]) -> None:
    for package in ("fastapi", "uvicorn", "prometheus_client"):
        pytest.importorskip(package, reason=f"the extra `server` is not installed: {package} is missing")
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        assert main(["serve", "nothing", "--port", str(taken.getsockname()[1])]) == 3
    assert "cannot be listened at" in capsys.readouterr().err


Start = Callable[[int], tuple[subprocess.Popen[str], int]]


@pytest.fixture
def start(tiny_engine: Path) -> Iterator[Start]:
    """Start a server at a port (0 takes a free one); gives the process, ready, and its port."""
    for package in ("fastapi", "uvicorn", "prometheus_client"):
        pytest.importorskip(package, reason=f"the extra `server` is not installed: {package} is missing")
    running: list[subprocess.Popen[str]] = []

    def begin(port: int) -> tuple[subprocess.Popen[str], int]:
        words = ["serve", f"toy={tiny_engine}", "--port", str(port), "--target", "onnxruntime-cpu", "--threads", "1"]
        process = subprocess.Popen(
            [sys.executable, "-u", "-m", "compress", *words],
            cwd=ROOT,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
        )
        running.append(process)
        assert process.stdout is not None
        line = process.stdout.readline()
        assert "serving toy at" in line
        return process, int(line.rpartition(":")[2])

    yield begin
    for process in running:
        process.kill()
        process.wait()
        assert process.stdout is not None
        process.stdout.close()


def crowd(port: int, count: int) -> tuple[list[int], list[threading.Thread], threading.Semaphore]:
    """Requests on their way: their statuses (0 is none), their threads, and how many have been sent."""
    statuses: list[int] = []
    sent = threading.Semaphore(0)

    def ask(seed: int) -> None:
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
        try:
            body = json.dumps({"prompt": "a red circle", "seed": seed, "n": 4})
            connection.request("POST", "/v1/pictures", body, {"Content-Type": "application/json"})
            sent.release()
            answer = connection.getresponse()
            statuses.append(answer.status if len(json.loads(answer.read())["pictures"]) == 4 else 0)
        except (OSError, http.client.HTTPException, ValueError):
            statuses.append(0)
        finally:
            connection.close()

    threads = [threading.Thread(target=ask, args=(seed,)) for seed in range(count)]
    for thread in threads:
        thread.start()
    for _ in range(count):
        assert sent.acquire(timeout=60)
    return statuses, threads, sent


def accepted(port: int, count: int) -> None:
    """Wait until the server has put so many requests into its queue."""
    while True:
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
        connection.request("GET", "/metrics")
        said = connection.getresponse().read().decode()
        connection.close()
        counted = [line for line in said.splitlines() if line.startswith("compress_requests_accepted_total ")]
        if counted and float(counted[0].split()[1]) >= count:
            return


def test_sigterm_finishes_what_was_accepted(start: Start) -> None:
    process, port = start(0)
    statuses, threads, _ = crowd(port, 8)
    accepted(port, 8)
    process.send_signal(signal.SIGTERM)
    assert process.wait(60) == 0
    for thread in threads:
        thread.join(60)
    assert statuses == [200] * 8


def test_a_kill_is_an_error_for_clients_and_a_restart_is_clean(start: Start) -> None:
    process, port = start(0)
    statuses, threads, _ = crowd(port, 8)
    process.kill()
    process.wait()
    for thread in threads:
        thread.join(60)
    assert 0 in statuses
    assert set(statuses) <= {0, 200}
    _, again = start(port)
    assert again == port
    after, threads, _ = crowd(port, 1)
    threads[0].join(60)
    assert after == [200]
