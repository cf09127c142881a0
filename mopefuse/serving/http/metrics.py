"""What ``GET /metrics`` reports, in the format of Prometheus. Labels have few values, whatever clients send."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
_MOST_MODELS = 200  # with a label of their own
_OTHER = "other"
_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0)
_SIZES = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512)
_COUNTERS = ("worker_restarts", "model_loads")  # among the numbers of `stats`, those that only grow


class Metrics:
    """The metrics of one server.

    Args:
        stats: numbers of the queue, the workers and their engines, by name; see `mopefuse.serving.workers.batching.Predictor`.
    """

    def __init__(self, stats: Callable[[], Mapping[str, float]]) -> None:
        self._registry = CollectorRegistry()
        self._models: set[str] = set()
        self._rows = Counter(
            "mopefuse_rows", "Rows that were answered, by model and HTTP status", ["model", "status"], registry=self._registry
        )
        self._requests = Counter(
            "mopefuse_http_requests", "HTTP requests, by path and status", ["path", "status"], registry=self._registry
        )
        self._latency = Histogram(
            "mopefuse_predict_seconds", "Time to answer POST /predict", buckets=_SECONDS, registry=self._registry
        )
        self._queued = Histogram(
            "mopefuse_queue_seconds", "Time until the batch of a row was started", buckets=_SECONDS, registry=self._registry
        )
        self._sizes = Histogram("mopefuse_batch_rows", "Rows in a batch", buckets=_SIZES, registry=self._registry)
        self._batches = Histogram(
            "mopefuse_batch_seconds", "Time that a worker took for a batch", buckets=_SECONDS, registry=self._registry
        )
        self._registry.register(_Stats(stats))

    def count_row(self, model: str, status: int, queued: float | None) -> None:
        """Count the answer to one row.

        Args:
            model: a model that is served, or empty. queued: seconds until its batch was started; None if it never was.
        """
        if len(self._models) < _MOST_MODELS and model:
            self._models.add(model)
        self._rows.labels(model if model in self._models or not model else _OTHER, str(status)).inc()
        if queued is not None:
            self._queued.observe(queued)

    def count_request(self, path: str, status: int, seconds: float) -> None:
        """Count an HTTP request.

        Args:
            path: a path of the interface, or "other".
        """
        self._requests.labels(path, str(status)).inc()
        if path == "/predict":
            self._latency.observe(seconds)

    def count_batch(self, size: int, seconds: float) -> None:
        """Count a batch that a worker has computed."""
        self._sizes.observe(size)
        self._batches.observe(seconds)

    def render(self) -> bytes:
        """The metrics as text."""
        return generate_latest(self._registry)


class _Stats(Collector):
    """Numbers that others count."""

    def __init__(self, stats: Callable[[], Mapping[str, float]]) -> None:
        self._stats = stats

    def collect(self) -> Iterator[Metric]:
        """The numbers at this moment."""
        for name, value in self._stats().items():
            kind = CounterMetricFamily if name in _COUNTERS else GaugeMetricFamily
            yield kind(f"mopefuse_{name}", name.replace("_", " ").capitalize(), value=value)
