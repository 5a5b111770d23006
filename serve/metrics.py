"""Numbers for Prometheus: what was asked, what was drawn, how long it took and how long it waited."""

from __future__ import annotations

from collections.abc import Callable

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, ProcessCollector

from serve.batching import Drawn

SECONDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0)


class Meters:
    """The metrics of one server, in a registry of its own."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        ProcessCollector(registry=self.registry)
        self._requests = Counter("compress_requests", "Requests", ["route", "status"], registry=self.registry)
        self._accepted = Counter(
            "compress_requests_accepted", "Requests whose pictures got a place in the queue", registry=self.registry
        )
        self._latency = Histogram(
            "compress_request_seconds", "Seconds to answer", ["route"], buckets=SECONDS, registry=self.registry
        )
        self._pictures = Counter("compress_pictures", "Pictures", ["engine", "outcome"], registry=self.registry)
        self._batches = Histogram(
            "compress_batch_pictures",
            "Pictures of a batch",
            ["engine"],
            buckets=(1, 2, 4, 8, 16),
            registry=self.registry,
        )
        self._drawing = Histogram(
            "compress_drawing_seconds", "Seconds to draw a batch", ["engine"], buckets=SECONDS, registry=self.registry
        )
        self._waiting = Histogram(
            "compress_waiting_seconds", "Seconds in the queue", ["engine"], buckets=SECONDS, registry=self.registry
        )

    def request(self, route: str, status: int, seconds: float) -> None:
        """Count an answered request."""
        self._requests.labels(route, str(status)).inc()
        self._latency.labels(route).observe(seconds)

    def accepted(self) -> None:
        """Count a request that will be drawn."""
        self._accepted.inc()

    def batch(self, drawn: Drawn) -> None:
        """Count a batch."""
        self._pictures.labels(drawn.engine, drawn.outcome).inc(drawn.pictures)
        self._batches.labels(drawn.engine).observe(drawn.pictures)
        self._drawing.labels(drawn.engine).observe(drawn.seconds)
        for seconds in drawn.waited:
            self._waiting.labels(drawn.engine).observe(seconds)

    def queue(self, waiting: Callable[[], int], capacity: int) -> None:
        """Show how full the queue is, whenever that is read."""
        Gauge("compress_queue_pictures", "Pictures waiting", registry=self.registry).set_function(waiting)
        Gauge("compress_queue_capacity", "Pictures that may wait", registry=self.registry).set(capacity)
