"""Measures a server as its clients meet it: batching, overhead, a soak, overload, and what kills and signals lose."""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import datetime
import itertools
import json
import random
import re
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import psutil

from compress.measure.environment import environment

ROOT = Path(__file__).parent.parent.parent
PROMPT = "a large red circle at the left on a plain teal background"
CLIENTS = 16
LOST = 0
"""The status of a request that got no answer."""


@dataclass(frozen=True)
class Answer:
    """What a request met."""

    status: int
    seconds: float
    retry_after: str


@dataclass
class Server:
    """A server process and its port."""

    process: subprocess.Popen[str]
    port: int

    async def ask(self, seed: int) -> Answer:
        """Ask for one picture over a connection of its own."""
        body = json.dumps({"prompt": PROMPT, "seed": seed}).encode()
        began = time.perf_counter()
        try:
            head, _ = await self._exchange("POST", "/v1/pictures", body)
        except (OSError, asyncio.IncompleteReadError, ValueError):
            return Answer(LOST, time.perf_counter() - began, "")
        after = re.search(rb"(?i)retry-after: *(\d+)", head)
        return Answer(int(head.split()[1]), time.perf_counter() - began, after[1].decode() if after else "")

    async def sums(self) -> dict[str, float]:
        """The server's own counters, and the sums of its histograms, in seconds, with how many there are."""
        _, body = await self._exchange("GET", "/metrics", b"")
        found = re.findall(r"^(compress_\w+_(?:sum|count|total))(?:\{[^}]*\})? (\S+)$", body.decode(), re.MULTILINE)
        total: Counter[str] = Counter()
        for name, value in found:
            total[name] += float(value)  # type: ignore[assignment]
        return dict(total)

    async def accepting(self, requests: int) -> None:
        """Wait until as many have been accepted."""
        while (await self.sums()).get("compress_requests_accepted_total", 0.0) < requests:
            await asyncio.sleep(0.01)

    async def _exchange(self, method: str, path: str, body: bytes) -> tuple[bytes, bytes]:
        reader, writer = await asyncio.open_connection("127.0.0.1", self.port)
        try:
            head = f"{method} {path} HTTP/1.1\r\nHost: 127.0.0.1\r\nConnection: close\r\n"
            head += f"Content-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
            writer.write(head.encode() + body)
            answer = await reader.read()
            first, blank, rest = answer.partition(b"\r\n\r\n")
            said = re.search(rb"(?i)content-length: *(\d+)", first)
            if not blank or (said is not None and len(rest) < int(said[1])):
                raise ValueError("half an answer")
            return first, rest
        finally:
            writer.close()


@contextlib.asynccontextmanager
async def started(engine: Path, threads: int, *options: str, port: int = 0) -> AsyncIterator[Server]:
    """A server of the engine, ready; killed in the end where it has not ended before."""
    words = [
        sys.executable,
        "-m",
        "serve",
        f"engine={engine}",
        "--port",
        str(port),
        "--threads",
        str(threads),
        *options,
    ]
    process = subprocess.Popen(
        [words[0], "-u", *words[1:]], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    )
    try:
        line = await asyncio.to_thread(process.stdout.readline) if process.stdout is not None else ""
        if "serving" not in line:
            raise SystemExit("the server did not start")
        yield Server(process, int(line.rpartition(":")[2]))
    finally:
        process.kill()
        process.wait()


async def closed_loop(server: Server, seconds: float, clients: int) -> list[Answer]:
    """As many clients at a time, each asking again as soon as it has its answer."""
    until, seeds, answers = time.monotonic() + seconds, itertools.count(), list[Answer]()

    async def client() -> None:
        while time.monotonic() < until:
            answers.append(await server.ask(next(seeds)))

    await asyncio.gather(*(client() for _ in range(clients)))
    return answers


async def open_loop(server: Server, seconds: float, rate: float, memory: list[tuple[float, float]]) -> list[Answer]:
    """Requests at random moments (a Poisson process), `rate` a second, whether or not there are answers.

    `memory` receives (seconds since the start, resident MiB) once a second.
    """
    began, dice, asked = time.monotonic(), random.Random(0), list[asyncio.Task[Answer]]()
    process, due, looked = psutil.Process(server.process.pid), 0.0, -1.0
    while due < seconds:
        now = time.monotonic() - began
        if now - looked >= 1.0:
            looked = now
            memory.append((now, process.memory_info().rss / 2**20))
        if now < due:
            await asyncio.sleep(due - now)
        asked.append(asyncio.create_task(server.ask(len(asked))))
        due += dice.expovariate(rate)
    return list(await asyncio.gather(*asked))


def told(answers: Sequence[Answer]) -> dict[str, Any]:
    """Statuses, and the milliseconds of those that were served."""
    good = [answer.seconds * 1e3 for answer in answers if answer.status == 200]
    row: dict[str, Any] = {"statuses": {str(k): n for k, n in sorted(Counter(a.status for a in answers).items())}}
    if good:
        row |= dict(
            zip(("p50_ms", "p95_ms", "p99_ms"), np.percentile(good, (50, 95, 99)).round(1).tolist(), strict=True)
        )
    return row


async def throughput(engine: Path, threads: int, seconds: float) -> dict[str, Any]:
    """Pictures a second with and without batches, in turns; and what a request costs beside its picture."""
    rows: dict[str, list[float]] = {"8": [], "1": []}
    overhead = []
    for _, most in itertools.product(range(2), rows):
        async with started(engine, threads, "--batch", most) as server:
            await closed_loop(server, 1.0, 1)
            before = await server.sums()
            await closed_loop(server, seconds / 2, 1)
            after = await server.sums()
            spent = {name: after[name] - before[name] for name in after}
            requests = spent["compress_drawing_seconds_count"]
            drawing = spent["compress_drawing_seconds_sum"]
            # What is asked besides, for metrics, is counted: it makes the overhead look larger, by a thousandth.
            overhead.append(
                {
                    "drawing_ms": drawing / requests * 1e3,
                    "overhead_ms": (spent["compress_request_seconds_sum"] - drawing) / requests * 1e3,
                    "overhead_share": spent["compress_request_seconds_sum"] / drawing - 1,
                }
            )
            began = time.monotonic()
            answers = await closed_loop(server, seconds, CLIENTS)
            rows[most].append(sum(a.status == 200 for a in answers) / (time.monotonic() - began))
    batched, alone = (float(np.mean(rows[most])) for most in ("8", "1"))
    return {
        "pictures_per_s": {"batches up to 8": rows["8"], "one at a time": rows["1"]},
        "ratio": batched / alone,
        "overhead": overhead,
    }


async def soak(engine: Path, threads: int, seconds: float, sample: float) -> dict[str, Any]:
    """At 90 % of the capacity, which `sample` seconds of asking tell; then ten times the capacity; then 90 % again."""
    memory: list[tuple[float, float]] = []
    async with started(engine, threads) as server:
        began = time.monotonic()
        capacity = len(await closed_loop(server, sample, CLIENTS)) / (time.monotonic() - began)
        calm = await open_loop(server, seconds, 0.9 * capacity, memory)
        edge = seconds / 6
        first, last = (
            float(np.mean([size for at, size in memory if low <= at <= high]))
            for low, high in ((min(10.0, edge / 2), edge), (seconds - edge, seconds))
        )
        storm = await open_loop(server, 10.0, 10 * capacity, [])
        after = await open_loop(server, 20.0, 0.9 * capacity, [])
    return {
        "capacity_per_s": capacity,
        "rate_per_s": 0.9 * capacity,
        "seconds": seconds,
        "soak": told(calm),
        "memory_mib": {"first sixth": first, "last sixth": last, "ratio": last / first},
        "overload": told(storm) | {"without retry-after": sum(a.status == 429 and not a.retry_after for a in storm)},
        "after the overload": told(after),
    }


async def ended(engine: Path, threads: int) -> dict[str, Any]:
    """SIGTERM with requests on their way; kill -9 likewise, and a new server at the same port."""
    async with started(engine, threads) as server:
        asked = [asyncio.create_task(server.ask(seed)) for seed in range(24)]
        await server.accepting(len(asked))
        server.process.send_signal(signal.SIGTERM)
        graceful = told(await asyncio.gather(*asked))
        code = await asyncio.to_thread(server.process.wait, 60)
    async with started(engine, threads) as server:
        asked = [asyncio.create_task(server.ask(seed)) for seed in range(24)]
        await server.accepting(len(asked))
        server.process.kill()
        killed = told(await asyncio.gather(*asked))
        port = server.port
    async with started(engine, threads, port=port) as server:
        restarted = (await server.ask(0)).status
    return {"sigterm": graceful | {"exit_code": code}, "kill": killed, "after the kill, same port": restarted}


async def measure(engine: Path, threads: int, seconds: float, minutes: float) -> dict[str, Any]:
    """Everything, in order."""
    found: dict[str, Any] = {"throughput": await throughput(engine, threads, seconds)}
    print(json.dumps(found["throughput"], indent=1), flush=True)
    found["ended"] = await ended(engine, threads)
    print(json.dumps(found["ended"], indent=1), flush=True)
    found["soak"] = await soak(engine, threads, minutes * 60, 2 * seconds)
    print(json.dumps(found["soak"], indent=1), flush=True)
    return found


def main() -> None:
    """Measure, print, and keep the result."""
    parser = argparse.ArgumentParser("python -m recipes.benchmarks.serving", description=__doc__)
    parser.add_argument("engine", type=Path, help="an engine folder")
    parser.add_argument("--threads", type=int, default=1, help="of the runtime (default: %(default)s)")
    parser.add_argument("--seconds", type=float, default=20.0, help="of each throughput (default: %(default)s)")
    parser.add_argument("--minutes", type=float, default=30.0, help="of the soak (default: %(default)s)")
    parser.add_argument("--out", type=Path, help="a JSON file for the result")
    given = parser.parse_args()
    load = psutil.getloadavg()[0]
    found = asyncio.run(measure(given.engine.resolve(), given.threads, given.seconds, given.minutes))
    found |= {
        "date": datetime.date.today().isoformat(),
        "environment": environment(),
        "load before": load,
        "threads": given.threads,
        "minutes": given.minutes,
    }
    if given.out is not None:
        given.out.write_text(json.dumps(found, indent=1, default=str) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
