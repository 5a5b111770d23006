"""Drawing together: no byte depends on who is in the batch, and nobody is lost, passed over or drawn for nothing."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from concurrent.futures import CancelledError
from contextlib import closing
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from export.backends import available
from export.engine import Engine
from export.errors import EngineError
from export.target import built_anywhere
from serve.batching import Batcher, Closing, Drawn, Overloaded
from serve.hosted import Hosted
from serve.order import Job, Order, Step

HERE = [row.name for row in built_anywhere() if available(row.backend)]
SIDE = 16
SECONDS = 60.0


@pytest.fixture(scope="module", params=HERE)
def hosted(request: pytest.FixtureRequest, tiny_engine: Path) -> Hosted:
    return Hosted("toy", Engine.open(tiny_engine, request.param, threads=1), most=4)


class Bench:
    """A batcher, and the batches it drew."""

    def __init__(self, hosted: Hosted, capacity: int = 32) -> None:
        self.drawn: list[Drawn] = []
        self.held: list[threading.Event] = []
        self.batcher = Batcher({"toy": hosted}, capacity, self.drawn.append)

    def busy(self) -> threading.Event:
        """Keep the drawing thread at its first row until the event is set."""
        begun, go = threading.Event(), threading.Event()
        self.held.append(go)

        def hold(_: Step) -> None:
            begun.set()
            go.wait(SECONDS)

        self.batcher.submit([Job(order(seed=99), hold)])
        assert begun.wait(SECONDS)
        return go

    def close(self) -> None:
        for go in self.held:
            go.set()
        self.batcher.close()


@pytest.fixture
def bench(hosted: Hosted) -> Iterator[Bench]:
    with closing(Bench(hosted)) as made:
        yield made


@pytest.fixture
def small(hosted: Hosted) -> Iterator[Bench]:
    with closing(Bench(hosted, capacity=3)) as made:
        yield made


def order(prompt: str = "a red circle", seed: int = 0, **changes: object) -> Order:
    return replace(Order("toy", prompt, seed, SIDE, SIDE), **changes)  # type: ignore[arg-type]


def image(seed: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (SIDE, SIDE, 3), np.uint8)


def test_all_sizes_of_batch_are_proved(hosted: Hosted) -> None:
    assert hosted.sizes == (1, 2, 4)


MIXED = [
    *(order("a red circle", seed) for seed in range(5)),
    order("small blue square", 1, negative="a red circle"),
    order("small blue square", 1),
    *(order("a red circle", seed, image=image(seed), start=2) for seed in range(3)),
    *(order("a red circle", seed, image=image(seed), mask=image(seed)[..., 0] > 99) for seed in range(2)),
]


def test_every_picture_has_the_bytes_it_has_alone(hosted: Hosted, bench: Bench) -> None:
    alone = [hosted.draw([one])[0] for one in MIXED]
    go = bench.busy()
    jobs = [Job(one) for one in (*MIXED, *MIXED[::-1])]
    bench.batcher.submit(jobs)
    go.set()
    together = [job.future.result(SECONDS) for job in jobs]
    assert all(np.array_equal(got, one) for got, one in zip(together, (*alone, *alone[::-1]), strict=True))
    assert max(drawn.pictures for drawn in bench.drawn) == 4
    assert len({picture.tobytes() for picture in alone}) == len(MIXED)


def test_a_watched_and_previewed_picture_has_the_same_bytes(hosted: Hosted, bench: Bench) -> None:
    seen: list[Step] = []
    job = Job(order(), seen.append, previews=(2, 4))
    bench.batcher.submit([job])
    assert np.array_equal(job.future.result(SECONDS), hosted.draw([order()])[0])
    assert [(step.row, step.rows, step.preview is not None) for step in seen] == [
        (1, 4, False),
        (2, 4, True),
        (3, 4, False),
        (4, 4, True),
    ]
    assert seen[1].preview is not None
    assert seen[1].preview.shape == (SIDE, SIDE, 3)


def test_what_is_not_alike_is_not_drawn_together() -> None:
    kinds = {one.kind for one in (*MIXED, order(engine="other"), order(height=32), order(width=32))}
    assert len(kinds) == 6


def test_a_size_that_changes_bytes_is_not_used(tiny_engine: Path) -> None:
    class Drifting(Hosted):
        def draw(self, orders, watch=None):  # type: ignore[no-untyped-def]
            pictures = super().draw(orders, watch)
            return pictures ^ 1 if len(orders) == 4 else pictures

    assert Drifting("toy", Engine.open(tiny_engine, HERE[0], threads=1), most=4).sizes == (1, 2)


def test_an_order_the_engine_refuses_costs_its_mates_nothing(hosted: Hosted, bench: Bench) -> None:
    go = bench.busy()
    jobs = [Job(order(seed=0)), Job(order(seed=-1)), Job(order(seed=2))]
    bench.batcher.submit(jobs)
    go.set()
    with pytest.raises(EngineError, match="whole number of at least 0"):
        jobs[1].future.result(SECONDS)
    for job in (jobs[0], jobs[2]):
        assert np.array_equal(job.future.result(SECONDS), hosted.draw([job.order])[0])


def test_the_queue_is_bounded_and_recovers(small: Bench) -> None:
    go = small.busy()
    accepted = [Job(order(seed=seed)) for seed in range(3)]
    small.batcher.submit(accepted)
    with pytest.raises(Overloaded) as refused:
        small.batcher.submit([Job(order())])
    assert refused.value.retry_after >= 1
    accepted[0].future.cancel()
    late = Job(order(seed=7))
    small.batcher.submit([late])  # a place that was given back is free at once
    go.set()
    assert late.future.result(SECONDS).shape == (SIDE, SIDE, 3)


def test_a_request_is_accepted_whole_or_not_at_all(small: Bench) -> None:
    small.busy()
    with pytest.raises(Overloaded):
        small.batcher.submit([Job(order(seed=seed)) for seed in range(4)])
    assert small.batcher.waiting == 0


def test_a_batch_that_nobody_waits_for_ends_at_its_next_row(bench: Bench) -> None:
    rows: list[int] = []

    def leave(step: Step) -> None:
        rows.append(step.row)
        if step.row == 2:
            job.future.cancel()

    job = Job(order(), leave)
    bench.batcher.submit([job])
    after = Job(order(seed=1, image=image(1), start=1))
    bench.batcher.submit([after])
    after.future.result(SECONDS)
    with pytest.raises(CancelledError):
        job.future.result()
    assert rows == [1, 2]
    assert bench.drawn[0].outcome == "abandoned"


def test_cancelled_jobs_leave_the_queue(bench: Bench) -> None:
    go = bench.busy()
    jobs = [Job(order(seed=seed)) for seed in range(4)]
    bench.batcher.submit(jobs)
    for job in jobs[:3]:
        job.future.cancel()
    assert bench.batcher.waiting == 1
    go.set()
    jobs[3].future.result(SECONDS)
    bench.batcher.close()
    assert sum(drawn.pictures for drawn in bench.drawn) == 2  # the one that kept it busy, and the one wanted


def test_first_come_first_served(bench: Bench) -> None:
    done: list[int] = []
    go = bench.busy()
    jobs = [Job(order(seed=0, image=image(0), start=1)), *(Job(order(seed=seed)) for seed in range(1, 6))]
    for k, job in enumerate(jobs):
        job.future.add_done_callback(lambda _, k=k: done.append(k))  # type: ignore[misc]
    bench.batcher.submit(jobs)
    go.set()
    for job in jobs:
        job.future.result(SECONDS)
    assert done == [0, 1, 2, 3, 4, 5]


def test_closing_draws_what_was_accepted_and_accepts_no_more(bench: Bench) -> None:
    go = bench.busy()
    jobs = [Job(order(seed=seed)) for seed in range(6)]
    bench.batcher.submit(jobs)
    ending = threading.Thread(target=bench.batcher.close)
    ending.start()
    while bench.batcher.alive:
        try:
            bench.batcher.submit([Job(order())])
        except Closing:
            break
        time.sleep(0.001)
    go.set()
    ending.join(SECONDS)
    assert not bench.batcher.alive
    assert all(job.future.done() and job.future.exception() is None for job in jobs)


def test_an_error_nobody_foresaw_fails_its_batch_and_not_the_server(hosted: Hosted, bench: Bench) -> None:
    def break_down(_: Step) -> None:
        raise ZeroDivisionError

    broken = Job(order(), break_down)
    bench.batcher.submit([broken])
    with pytest.raises(ZeroDivisionError):
        broken.future.result(SECONDS)
    after = Job(order(seed=1))
    bench.batcher.submit([after])
    assert np.array_equal(after.future.result(SECONDS), hosted.draw([after.order])[0])
