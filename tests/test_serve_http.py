"""The server over HTTP: what it draws, what it refuses and how, what it tells, and what it never logs."""

from __future__ import annotations

import base64
import io
import json
import logging
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from export.engine import Engine

pytest.importorskip("fastapi", reason="the extra `server` is not installed: fastapi is missing")
pytest.importorskip("prometheus_client", reason="the extra `server` is not installed: prometheus-client is missing")
httpx = pytest.importorskip("httpx", reason="httpx, with which the tests ask the server, is not installed")

from serve.app import application  # noqa: E402
from serve.hosted import Hosted  # noqa: E402
from serve.keys import read_keys  # noqa: E402
from serve.limits import Limits  # noqa: E402
from serve.logs import JsonLines  # noqa: E402
from tests.asgi import Server  # noqa: E402

SIDE = 16
KEY = "correct-horse-battery-staple"
ASKED = {"prompt": "a red circle", "seed": 7}
LIMITS = Limits(pictures=3, queue=4, prompt=200, pixels=4096, body_bytes=20_000, body_s=0.5, deadline_s=60.0)


@pytest.fixture(scope="module")
def engine(tiny_engine: Path) -> Engine:
    return Engine.open(tiny_engine, "onnxruntime-cpu", threads=1)


@pytest.fixture(scope="module")
def hosted(engine: Engine) -> Hosted:
    return Hosted("toy", engine, most=4)


@pytest.fixture(scope="module")
def server(hosted: Hosted) -> Iterator[Server]:
    with Server(application({"toy": hosted, "second": hosted}, LIMITS)) as server:
        yield server


@pytest.fixture
def client(server: Server) -> Iterator[Any]:
    with httpx.Client(base_url=server.url, timeout=60.0) as client:
        yield client


def png(array: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(array).save(buffer, format="PNG")
    return buffer.getvalue()


def text(data: bytes) -> str:
    return base64.b64encode(data).decode()


def pixels(data: bytes) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(data)))


IMAGE = np.random.default_rng(0).integers(0, 256, (SIDE, SIDE, 3), np.uint8)
MASK = np.where(np.arange(SIDE)[:, None] < 8, 255, 0).astype(np.uint8) * np.ones((1, SIDE), np.uint8)


def test_a_picture_is_that_of_the_engine_and_the_same_every_time(client: Any, engine: Engine) -> None:
    first, again = (client.post("/v1/pictures", json={**ASKED, "n": 2}) for _ in range(2))
    assert first.status_code == 200
    assert first.content == again.content
    got = first.json()
    assert (got["engine"], got["engine_hash"]) == ("toy", engine.manifest.engine_hash)
    expected = engine.generate(["a red circle"] * 2, [7, 8])
    for row, picture, seed in zip(got["pictures"], expected, (7, 8), strict=True):
        assert row["seed"] == seed
        assert np.array_equal(pixels(base64.b64decode(row["png"])), picture)


def test_a_picture_as_it_is(client: Any, engine: Engine) -> None:
    got = client.post("/v1/pictures", json=ASKED, headers={"Accept": "image/png"})
    assert (got.headers["content-type"], got.headers["x-seed"]) == ("image/png", "7")
    assert np.array_equal(pixels(got.content), engine.generate(["a red circle"], [7])[0])


def test_a_seed_drawn_by_lot_is_told_and_draws_the_same_again(client: Any) -> None:
    first = client.post("/v1/pictures", json={"prompt": "a red circle"}).json()["pictures"][0]
    assert client.post("/v1/pictures", json={**ASKED, "seed": first["seed"]}).json()["pictures"][0] == first


def test_image_to_image_and_inpainting(client: Any, engine: Engine) -> None:
    body = {**ASKED, "image": text(png(IMAGE)), "strength": 0.5}
    got = client.post("/v1/pictures", json=body, headers={"Accept": "image/png"})
    expected = engine.generate(["a red circle"], [7], image=IMAGE[None], strength=0.5)[0]
    assert np.array_equal(pixels(got.content), expected)
    body = {**ASKED, "image": f"data:image/png;base64,{text(png(IMAGE))}", "mask": text(png(MASK))}
    got = client.post("/v1/pictures", json=body, headers={"Accept": "image/png"})
    expected = engine.generate(["a red circle"], [7], image=IMAGE[None], mask=MASK[None] > 0)[0]
    assert np.array_equal(pixels(got.content), expected)


def test_a_png_is_redrawn_and_painted_where_it_is_transparent(client: Any, engine: Engine) -> None:
    asked = {**ASKED, "strength": 0.5}
    got = client.post("/v1/pictures/png", params=asked, content=png(IMAGE), headers={"Accept": "image/png"})
    expected = engine.generate(["a red circle"], [7], image=IMAGE[None], strength=0.5)[0]
    assert np.array_equal(pixels(got.content), expected)
    clear = np.dstack([IMAGE, 255 - MASK])
    got = client.post("/v1/pictures/png", params=ASKED, content=png(clear), headers={"Accept": "image/png"})
    expected = engine.generate(["a red circle"], [7], image=IMAGE[None], mask=MASK[None] > 0)[0]
    assert np.array_equal(pixels(got.content), expected)


def events(answer: Any) -> list[tuple[str, dict[str, Any]]]:
    blocks = answer.text.strip().split("\n\n")
    pairs = [block.split("\n") for block in blocks]
    return [(name.removeprefix("event: "), json.loads(data.removeprefix("data: "))) for name, data in pairs]


def test_a_stream_tells_every_step_shows_previews_and_ends_with_the_picture(client: Any) -> None:
    whole = client.post("/v1/pictures", json=ASKED).json()["pictures"][0]
    got = client.post("/v1/pictures", json={**ASKED, "stream": True, "previews": 2})
    assert got.headers["content-type"].startswith("text/event-stream")
    told = events(got)
    assert [name for name, _ in told] == ["step"] * 4 + ["picture"]
    assert [(data["row"], "preview" in data) for _, data in told[:-1]] == [(1, False), (2, True), (3, False), (4, True)]
    assert told[-1][1] == {"index": 0, **whole}


def test_openai_routes(client: Any) -> None:
    whole = client.post("/v1/pictures", json=ASKED).json()["pictures"][0]["png"]
    asked = {"model": "toy", "prompt": "a red circle", "seed": 7, "size": "16x16", "quality": "high", "user": "me"}
    got = client.post("/v1/images/generations", json=asked).json()
    assert got["data"] == [{"b64_json": whole}]
    got = client.post("/v1/images/generations", json={**asked, "response_format": "url"}).json()
    assert got["data"] == [{"url": f"data:image/png;base64,{whole}"}]
    told = events(client.post("/v1/images/generations", json={**asked, "stream": True, "partial_images": 2}))
    assert [(name, data.get("partial_image_index")) for name, data in told] == [
        ("image_generation.partial_image", 0),
        ("image_generation.partial_image", 1),
        ("image_generation.completed", None),
    ]
    assert told[-1][1]["b64_json"] == whole
    assert [row["id"] for row in client.get("/v1/models").json()["data"]] == ["toy", "second"]


BOMB = io.BytesIO()
Image.new("L", (3000, 3000)).save(BOMB, format="PNG")

REFUSED = {
    "no prompt": ({}, 422, "prompt"),
    "a field that is not there": ({**ASKED, "promt": "x"}, 422, "promt"),
    "a field with half a name": ({**ASKED, "\ud800": 1}, 422, "unicode"),
    "an unknown engine": ({**ASKED, "engine": "x"}, 404, "toy, second"),
    "too many pictures": ({**ASKED, "n": 4}, 422, "n may be 3 at most"),
    "no pictures": ({**ASKED, "n": 0}, 422, "n: "),
    "a long prompt": ({**ASKED, "prompt": "x" * 201}, 422, "200 characters"),
    "half a character": ({**ASKED, "prompt": "\ud800"}, 422, "prompt"),
    "another size": ({**ASKED, "height": 32}, 422, "height 16, not 32"),
    "other steps": ({**ASKED, "steps": 50}, 422, "draws in 4 steps"),
    "a negative seed": ({**ASKED, "seed": -1}, 422, "seed"),
    "no number": ({**ASKED, "strength": float("nan")}, 422, "strength"),
    "strength without image": ({**ASKED, "strength": 0.5}, 422, "needs an image"),
    "a mask without image": ({**ASKED, "mask": text(png(MASK))}, 422, "needs an image"),
    "no base64": ({**ASKED, "image": "?"}, 422, "not base64"),
    "no picture": ({**ASKED, "image": text(b"GIF89a")}, 422, "not a picture"),
    "a damaged picture": ({**ASKED, "image": text(png(IMAGE)[:-40])}, 422, "damaged"),
    "a picture that unpacks to millions": ({**ASKED, "image": text(BOMB.getvalue())}, 422, "3000 x 3000"),
    "a mask of another size": (
        {**ASKED, "image": text(png(IMAGE)), "mask": text(png(MASK[:8]))},
        422,
        "size of the image",
    ),
    "too little strength": ({**ASKED, "image": text(png(IMAGE)), "strength": 0.01}, 422, "none of the 4 steps"),
}


@pytest.mark.parametrize(("body", "status", "sentence"), REFUSED.values(), ids=REFUSED)
def test_what_is_wrong_is_said(client: Any, body: dict[str, Any], status: int, sentence: str) -> None:
    got = client.post("/v1/pictures", content=json.dumps(body), headers={"Content-Type": "application/json"})
    assert got.status_code == status
    error = got.json()["error"]
    assert sentence in error["message"]
    assert error["type"] == "invalid_request_error"


def test_malformed_bodies(client: Any) -> None:
    for body in (b"", b"{", b"[]", b"\xff\xfe", b"[" * 5000, b'{"prompt": 1e999}'):
        got = client.post("/v1/pictures", content=body, headers={"Content-Type": "application/json"})
        assert got.status_code in (400, 422)
        assert got.json()["error"]["message"]


def test_bodies_are_bounded_in_size_and_time(client: Any, server: Server) -> None:
    def endless() -> Iterator[bytes]:
        while True:
            yield b"x" * 1000

    assert client.post("/v1/pictures", content=b"x" * 20_001).status_code == 413
    assert server.raw(b"POST /v1/pictures HTTP/1.1\r\nHost: x\r\nContent-Length: 999999999\r\n\r\n").startswith(
        b"HTTP/1.1 413"
    )
    with pytest.raises(httpx.HTTPError):  # refused while it still sends, so it may never read the answer
        client.post("/v1/pictures", content=endless()).raise_for_status()
    slow = server.raw(b"POST /v1/pictures HTTP/1.1\r\nHost: x\r\nContent-Length: 10\r\n\r\n{")
    assert slow.startswith(b"HTTP/1.1 408")
    assert client.post("/v1/pictures", json=ASKED).status_code == 200


def test_a_deadline_ends_a_request(client: Any) -> None:
    got = client.post("/v1/pictures", json={**ASKED, "deadline_s": 1e-6})
    assert (got.status_code, got.json()["error"]["code"]) == (408, "deadline_passed")
    told = events(client.post("/v1/pictures", json={**ASKED, "deadline_s": 1e-6, "stream": True}))
    assert (told[-1][0], told[-1][1]["error"]["code"]) == ("error", "deadline_passed")


class Held(Hosted):
    """An engine that draws only when told to; of the real one, all else."""

    def __init__(self, hosted: Hosted) -> None:
        self.__dict__.update(vars(hosted))
        self.begun, self.go = threading.Semaphore(0), threading.Event()
        self.rows_drawn: list[int] = []

    def draw(self, orders: Any, watch: Any = None) -> np.ndarray:
        self.begun.release()
        self.go.wait(60)

        def noted(row: int, look: Any) -> None:
            watch(row, look)
            self.rows_drawn.append(row)

        return super().draw(orders, noted)


@pytest.fixture
def held(hosted: Hosted) -> Iterator[tuple[Held, Server]]:
    engine = Held(hosted)
    with Server(application({"toy": engine}, LIMITS)) as server:
        yield engine, server
        engine.go.set()


def ask(server: Server, answers: list[Any], **more: Any) -> threading.Thread:
    def work() -> None:
        answers.append(httpx.post(f"{server.url}/v1/pictures", json={**ASKED, **more}, timeout=60.0))

    thread = threading.Thread(target=work)
    thread.start()
    return thread


def test_a_full_queue_answers_429_and_recovers(held: tuple[Held, Server]) -> None:
    engine, server = held
    answers: list[Any] = []
    threads = [ask(server, answers)]
    assert engine.begun.acquire(timeout=60)
    threads += [ask(server, answers) for _ in range(8)]
    while len(answers) < 4:
        threads[0].join(0.01)
    assert [answer.status_code for answer in answers] == [429] * 4
    assert int(answers[0].headers["retry-after"]) >= 1
    assert answers[0].json()["error"]["code"] == "queue_full"
    assert httpx.get(f"{server.url}/readyz").status_code == 503
    assert httpx.get(f"{server.url}/healthz").status_code == 200
    engine.go.set()
    for thread in threads:
        thread.join(60)
    assert sorted(answer.status_code for answer in answers) == [200] * 5 + [429] * 4
    assert len({answer.content for answer in answers if answer.status_code == 200}) == 1
    assert httpx.get(f"{server.url}/readyz").status_code == 200


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_goes_away_is_not_drawn_for(held: tuple[Held, Server], stream: bool) -> None:
    engine, server = held
    body = json.dumps({**ASKED, "stream": stream}).encode()
    head = b"POST /v1/pictures HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
    with server.connection() as connection:
        connection.sendall(head + b"Content-Length: %d\r\n\r\n" % len(body) + body)
        assert engine.begun.acquire(timeout=60)
    answers: list[Any] = []
    other = ask(server, answers, n=2)
    while "compress_requests_total" not in (said := httpx.get(f"{server.url}/metrics").text) or 'pictures"' not in said:
        other.join(0.01)  # until the server has seen it go
    engine.go.set()
    other.join(60)
    assert answers[0].status_code == 200
    assert engine.rows_drawn == [1, 2, 3, 4]  # of the other; at the abandoned one's first row nobody waited
    said = httpx.get(f"{server.url}/metrics").text
    assert 'compress_pictures_total{engine="toy",outcome="abandoned"} 1.0' in said
    assert 'compress_pictures_total{engine="toy",outcome="drawn"} 2.0' in said


def test_shutting_down_finishes_what_was_accepted(hosted: Hosted) -> None:
    engine = Held(hosted)
    answers: list[Any] = []
    with Server(application({"toy": engine}, LIMITS)) as server:
        threads = [ask(server, answers, seed=0)]
        assert engine.begun.acquire(timeout=60)
        threads += [ask(server, answers, seed=seed) for seed in (1, 2)]
        while "compress_queue_pictures 2.0" not in httpx.get(f"{server.url}/metrics").text:
            threads[0].join(0.01)
        server.stop()
        engine.go.set()
    for thread in threads:
        thread.join(60)
    assert [answer.status_code for answer in answers] == [200] * 3


def test_keys(hosted: Hosted, tmp_path: Path) -> None:
    file = tmp_path / "keys"
    file.write_text(f"# ours\n\nanother-key-of-the-server\n{KEY}\n")
    with Server(application({"toy": hosted}, LIMITS, read_keys(file))) as server:
        for path, method in (("/v1/pictures", "POST"), ("/v1/images/generations", "POST"), ("/v1/engines", "GET")):
            for header in ({}, {"Authorization": "Bearer wrong"}, {"Authorization": f"Basic {KEY}"}):
                got = httpx.request(method, f"{server.url}{path}", json=ASKED, headers=header)
                assert (got.status_code, got.headers["www-authenticate"]) == (401, "Bearer")
        for path in ("/healthz", "/readyz", "/metrics"):
            assert httpx.get(f"{server.url}{path}").status_code == 200
        got = httpx.post(f"{server.url}/v1/pictures", json=ASKED, headers={"Authorization": f"Bearer {KEY}"})
        assert got.status_code == 200


def test_names_of_other_hosts_are_refused(hosted: Hosted) -> None:
    with Server(application({"toy": hosted}, LIMITS, hosts=("127.0.0.1",))) as server:
        assert httpx.get(f"{server.url}/healthz").status_code == 200
        assert httpx.get(f"{server.url}/healthz", headers={"Host": "evil.example"}).status_code == 400


def test_logs_and_metrics_tell_nothing_of_what_was_asked(client: Any, caplog: pytest.LogCaptureFixture) -> None:
    secret = "zebra crossing"
    with caplog.at_level(logging.INFO, "serve"):
        for body in ({"prompt": secret}, {"prompt": secret, "seed": "x"}, {"prompt": secret * 99}):
            client.post("/v1/pictures", json=body)
        client.post("/v1/pictures/png", params={"prompt": secret}, content=b"x")
    lines = [json.loads(JsonLines().format(record)) for record in caplog.records]
    requests = [line for line in lines if line["event"] == "request"]
    assert [line["status"] for line in requests] == [200, 422, 422, 422]
    assert requests[0]["route"] == "/v1/pictures"
    assert (requests[0]["engine"], requests[0]["pictures"]) == ("toy", 1)
    assert "zebra" not in json.dumps(lines)
    said = client.get("/metrics").text
    assert 'compress_requests_total{route="/v1/pictures",status="200"}' in said
    assert "compress_waiting_seconds_bucket" in said
    assert "zebra" not in said


def test_nothing_is_found_where_nothing_is(client: Any) -> None:
    for path in ("/", "/docs", "/v1/nothing"):
        assert client.get(path).status_code == 404
    assert client.get("/v1/pictures").status_code == 405
    document = client.get("/openapi.json").json()
    assert {"/v1/pictures", "/v1/pictures/png", "/v1/images/generations", "/metrics"} <= set(document["paths"])
