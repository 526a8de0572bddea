"""Counters and histograms of the server, in the format of Prometheus."""

from typing import Any

from beit3.serve.extra import import_extra

SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30)
BATCH_SIZES = (1, 2, 4, 8, 16, 32, 64, 128)


class Metrics:
    """The metrics of one server, in a registry of their own."""

    def __init__(self) -> None:
        client: Any = import_extra("prometheus_client")
        self._client = client
        self.registry = registry = client.CollectorRegistry()
        self.requests = client.Counter(
            "beit3_requests",
            "Requests by endpoint and status",
            ("endpoint", "status"),
            registry=registry,
        )
        self.seconds = client.Histogram(
            "beit3_request_seconds",
            "Seconds from the body's arrival to the answer",
            ("endpoint",),
            registry=registry,
            buckets=SECONDS,
        )
        self.hang_ups = client.Counter(
            "beit3_hang_ups", "Clients that did not wait for the answer", registry=registry
        )
        self.batch_size = client.Histogram(
            "beit3_batch_size",
            "Requests computed together",
            ("model",),
            registry=registry,
            buckets=BATCH_SIZES,
        )
        self.batch_seconds = client.Histogram(
            "beit3_batch_seconds",
            "Seconds of a batch in the network",
            ("model",),
            registry=registry,
            buckets=SECONDS,
        )
        self.waiting = client.Gauge(
            "beit3_waiting",
            "Requests that are prepared, wait or are computed",
            ("model",),
            registry=registry,
        )
        self.ready = client.Gauge(
            "beit3_ready", "1 while the server takes requests", registry=registry
        )

    def render(self) -> tuple[bytes, str]:
        """Returns the metrics as text, and its content type."""
        return self._client.generate_latest(self.registry), self._client.CONTENT_TYPE_LATEST
