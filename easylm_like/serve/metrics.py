"""What /metrics tells Prometheus: the engines' own counters, read when asked for, and how long clients waited."""

from collections.abc import Iterator, Mapping

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.metrics_core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from easylm_like.serve.engine import Engine

FIRST = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60)  # seconds
EACH = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1)
WHOLE = (0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300, 600)
GAUGES = {
    "slots": "places in the running batch",
    "running": "answers that are being written",
    "queued": "requests that wait for a slot",
    "cache_bytes": "memory of the KV cache",
}
COUNTERS = {
    "prompt_tokens": "tokens of prompts",
    "cached_tokens": "tokens of prompts that were still in the cache",
    "answer_tokens": "tokens generated",
    "steps": "steps of the running batch",
    "compilations": "programs compiled since the warm-up: anything but 0 is a defect",
}


class Measures:
    """The numbers of a server, in a registry of its own."""

    def __init__(self, engines: Mapping[str, Engine]) -> None:
        self.registry = CollectorRegistry()
        self.registry.register(_Engines(engines))

        def histogram(name: str, text: str, buckets: tuple[float, ...]) -> Histogram:
            name = f"easylm_like_{name}_seconds"
            return Histogram(name, text, ["model"], registry=self.registry, buckets=buckets)

        self.first_token = histogram("time_to_first_token", "from the request to its first token", FIRST)
        self.each_token = histogram("time_per_output_token", "between tokens, the mean of an answer", EACH)
        self.whole = histogram("request", "from the request to the end of its answers", WHOLE)
        self.statuses = Counter(
            "easylm_like_http_requests", "HTTP requests", ["path", "status"], registry=self.registry
        )

    def text(self) -> bytes:
        """Return all of it in Prometheus' text format."""
        return generate_latest(self.registry)


class _Engines(Collector):
    """Reads every engine's snapshot when the registry is asked."""

    def __init__(self, engines: Mapping[str, Engine]) -> None:
        self._engines = engines

    def collect(self) -> Iterator[Metric]:
        snapshots = {name: engine.snapshot() for name, engine in list(self._engines.items())}
        for field, text in GAUGES.items():
            gauge = GaugeMetricFamily(f"easylm_like_{field}", text, labels=["model"])
            for name, snapshot in snapshots.items():
                gauge.add_metric([name], getattr(snapshot, field))
            yield gauge
        for field, text in COUNTERS.items():
            counter = CounterMetricFamily(f"easylm_like_{field}", text, labels=["model"])
            for name, snapshot in snapshots.items():
                counter.add_metric([name], getattr(snapshot, field))
            yield counter
        ended = CounterMetricFamily("easylm_like_answers", "answers by how they ended", labels=["model", "finish"])
        for name, snapshot in snapshots.items():
            for finish, number in snapshot.finished.items():
                ended.add_metric([name, str(finish)], number)
        yield ended
