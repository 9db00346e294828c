"""Prometheus metrics: measurements of the HTTP layer, and the engine's statistics at each scrape.

Each app has its own registry, so nothing is global. The number of labels is limited. Routes are those of the
app. The first ``MAX_ADAPTERS`` adapters that are used have labels of their own. All later ones share
``_other``.
"""

from __future__ import annotations

from collections import Counter as Tally
from collections.abc import Iterator

from prometheus_client import CollectorRegistry, Counter, Histogram, Metric
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, InfoMetricFamily
from prometheus_client.exposition import CONTENT_TYPE_PLAIN_0_0_4, generate_latest
from prometheus_client.registry import Collector

from server.engine.interface import EngineStats, Service
from server.http.record import Record
from server.version import VERSION

MAX_ADAPTERS = 200
BASE, OTHER = "_base", "_other"

_SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120)
_TOKEN_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.02, 0.03, 0.05, 0.075, 0.1, 0.15, 0.25, 0.5, 1, 2.5)


class AdapterLabels:
    """At most ``most`` label values for adapters. The first adapters that are used get them."""

    def __init__(self, most: int) -> None:
        self.most = most
        self.own: set[str] = set()

    def label(self, adapter: str | None) -> str:
        """The label of a request for ``adapter`` (None: the base)."""
        if adapter is None:
            return BASE
        if adapter not in self.own and len(self.own) < self.most:
            self.own.add(adapter)
        return adapter if adapter in self.own else OTHER


class Metrics:
    """All metrics of ``/metrics``."""

    def __init__(self, service: Service, max_adapters: int = MAX_ADAPTERS) -> None:
        self._registry = registry = CollectorRegistry()
        self._labels = AdapterLabels(max_adapters)
        self._requests = Counter(
            "manylora_requests",
            "HTTP requests by route and final status",
            ["route", "status"],
            registry=registry,
        )
        self._prompt_tokens = Counter("manylora_prompt_tokens", "Prompt tokens received", registry=registry)
        self._generation_tokens = Counter("manylora_generation_tokens", "Tokens generated", registry=registry)
        self._ttft = _histogram("time_to_first_token", "From arrival to the first token", _SECONDS, registry)
        self._itl = _histogram("inter_token", "Between tokens of an answer", _TOKEN_SECONDS, registry)
        self._queue = _histogram("queue", "From submission to the first step", _SECONDS, registry)
        self._e2e = _histogram("request", "From arrival to the end of the answer", _SECONDS, registry)
        self._adapter_requests = _by_adapter("requests", "Generation requests", registry)
        self._adapter_prompt_tokens = _by_adapter("prompt_tokens", "Prompt tokens", registry)
        self._adapter_generation_tokens = _by_adapter("generation_tokens", "Tokens generated", registry)
        registry.register(EngineCollector(service, self._labels))

    def add(self, collector: Collector) -> None:
        """Add another source of metrics."""
        self._registry.register(collector)

    def first_token(self, seconds: float) -> None:
        """Observe a first token, ``seconds`` after the request arrived."""
        self._ttft.observe(seconds)

    def next_tokens(self, seconds: float) -> None:
        """Observe further tokens of an answer. ``seconds`` is the mean time for each of them."""
        self._itl.observe(seconds)

    def request(self, route: str, record: Record, duration: float) -> None:
        """Observe the end of a request, ``duration`` seconds after it arrived."""
        self._requests.labels(route, str(record.status or 499)).inc()
        if not record.generated:
            return
        self._e2e.observe(duration)
        if record.queue_seconds is not None:
            self._queue.observe(record.queue_seconds)
        self._prompt_tokens.inc(record.prompt_tokens)
        self._generation_tokens.inc(record.completion_tokens)
        label = self._labels.label(record.adapter)
        self._adapter_requests.labels(label).inc()
        self._adapter_prompt_tokens.labels(label).inc(record.prompt_tokens)
        self._adapter_generation_tokens.labels(label).inc(record.completion_tokens)

    def exposition(self) -> tuple[bytes, str]:
        """The text that Prometheus reads, and its content type."""
        return generate_latest(self._registry), CONTENT_TYPE_PLAIN_0_0_4


# Field of ``EngineStats``, metric name, help text. Gauges can fall; counters cannot.
_GAUGES = (
    ("running", "requests_running", "Requests that are being processed"),
    ("waiting", "requests_waiting", "Requests in the queue"),
    ("kv_blocks_total", "kv_blocks", "KV blocks in total"),
    ("kv_blocks_used", "kv_blocks_used", "KV blocks in use"),
    ("pool_rows_total", "lora_pool_rows", "Rank rows of the device pool in total"),
    ("pool_rows_used", "lora_pool_rows_used", "Rank rows of the device pool in use"),
)
_COUNTERS = (
    ("prefix_queries_tokens", "prefix_cache_queries_tokens", "Prompt tokens looked up in the prefix cache"),
    ("prefix_hit_tokens", "prefix_cache_hit_tokens", "Prompt tokens found in the prefix cache"),
    ("preemptions", "preemptions", "Preempted requests, which are recomputed later"),
    ("adapter_loads", "lora_loads", "Adapters loaded to the device"),
    ("adapter_load_seconds", "lora_load_seconds", "Time spent on loading adapters to the device"),
    ("adapter_evictions", "lora_evictions", "Adapters evicted from the device"),
    ("steps", "engine_steps", "Forward passes"),
)


class EngineCollector(Collector):
    """Reads the service's statistics at each scrape."""

    def __init__(self, service: Service, labels: AdapterLabels) -> None:
        self._service = service
        self._labels = labels

    def collect(self) -> Iterator[Metric]:
        yield from _engine(self._service.stats())
        yield from self._adapters()
        base = self._service.base
        info = {
            "model": base.name,
            "digest": base.digest,
            "quantization": base.quantization,
            "head_quantization": base.head_quantization,
            "version": VERSION,
        }
        yield InfoMetricFamily("manylora_base", "The base that is served", info)
        yield GaugeMetricFamily(
            "manylora_up", "Whether the engine's loop runs", 0 if self._service.failure() else 1
        )

    def _adapters(self) -> Iterator[Metric]:
        statuses = self._service.adapters()
        counts = GaugeMetricFamily("manylora_adapters", "Known adapters", labels=["state", "tier"])
        for (state, tier), number in Tally((each.state, each.tier or "none") for each in statuses).items():
            counts.add_metric([state, tier], number)
        yield counts
        tiers = GaugeMetricFamily(
            "manylora_adapter_tier", "Where the weights of a used adapter are now", labels=["adapter", "tier"]
        )
        for status in statuses:
            if status.name in self._labels.own and status.tier is not None:
                tiers.add_metric([status.name, status.tier], 1)
        yield tiers


def _engine(stats: EngineStats) -> Iterator[Metric]:
    for field, name, text in _GAUGES:
        yield GaugeMetricFamily(f"manylora_{name}", text, getattr(stats, field))
    for field, name, text in _COUNTERS:
        yield CounterMetricFamily(f"manylora_{name}", text, getattr(stats, field))


def _histogram(name: str, text: str, buckets: tuple[float, ...], registry: CollectorRegistry) -> Histogram:
    return Histogram(f"manylora_{name}_seconds", text, buckets=buckets, registry=registry)


def _by_adapter(name: str, text: str, registry: CollectorRegistry) -> Counter:
    return Counter(f"manylora_adapter_{name}", f"{text} by adapter", ["adapter"], registry=registry)
