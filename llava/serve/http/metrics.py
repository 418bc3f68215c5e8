"""Metrics of a server, in the text format of Prometheus.

In: events as they happen; the backend's gauges when the page is read. Out: one page of text.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import GaugeMetricFamily, Metric

from llava.engine.request import Timings, Usage

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
Gauge = float | Mapping[str, float]  # a mapping has a number for each worker
SECONDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300, 600)


class Metrics:
    """The counters of one server, in a registry of their own."""

    def __init__(self, gauges: Callable[[], Mapping[str, Gauge]] = dict) -> None:
        self.registry = registry = CollectorRegistry()
        registry.register(_Gauges(gauges))
        self.responses = Counter(
            "llava_http_responses", "Responses by path and status", ["path", "status"], registry=registry
        )
        self.response_s = Histogram(
            "llava_http_response_seconds", "Time to the last byte", ["path"], buckets=SECONDS, registry=registry
        )
        self.errors = Counter(
            "llava_errors", "Requests that failed or were refused, by kind", ["kind"], registry=registry
        )
        self.finished = Counter("llava_requests", "Requests to the model by how they ended", ["end"], registry=registry)
        self.prompt_tokens = Counter("llava_prompt_tokens", "Tokens read, by kind", ["kind"], registry=registry)
        self.new_tokens = Counter("llava_generated_tokens", "Tokens written", registry=registry)
        self.first_token_s = Histogram(
            "llava_first_token_seconds", "Time from a request to its first token", buckets=SECONDS, registry=registry
        )
        self.queued_s = Histogram("llava_queued_seconds", "Time in the queue", buckets=SECONDS, registry=registry)

    def record_answer(self, usage: Usage, timings: Timings) -> None:
        self.finished.labels("finished").inc()
        self.prompt_tokens.labels("text").inc(usage.num_text_tokens)
        self.prompt_tokens.labels("image").inc(usage.num_image_tokens)
        self.prompt_tokens.labels("cached").inc(usage.num_cached_tokens)
        self.new_tokens.inc(usage.num_new_tokens)
        self.queued_s.observe(timings.queued_s)
        if timings.first_token_s is not None:
            self.first_token_s.observe(timings.first_token_s)

    def render(self) -> bytes:
        return generate_latest(self.registry)


class _Gauges:
    """A collector that reads gauges when the page is rendered."""

    def __init__(self, read: Callable[[], Mapping[str, Gauge]]) -> None:
        self._read = read

    def collect(self) -> Iterator[Metric]:
        for name, value in self._read().items():
            title = name.replace("_", " ").capitalize()
            if isinstance(value, Mapping):
                family = GaugeMetricFamily(f"llava_{name}", title, labels=["worker"])
                for worker, number in value.items():
                    family.add_metric([worker], float(number))
                yield family
            else:
                yield GaugeMetricFamily(f"llava_{name}", title, value=float(value))
