"""What Prometheus reads at `/metrics`."""

from collections.abc import Callable, Iterator

import numpy as np
from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector

from kvc_jax.engine.request import EngineStats

_FIRST_TOKEN = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120)
_NEXT_TOKEN = (0.0025, 0.005, 0.01, 0.02, 0.03, 0.05, 0.075, 0.1, 0.2, 0.5, 1, 2.5)
_REQUEST = (0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300, 600)

_GAUGES = {
    "running": ("kvc_requests_running", "Sequences that hold a slot"),
    "waiting": ("kvc_requests_waiting", "Sequences that wait for a slot or for blocks"),
    "free_blocks": ("kvc_blocks_free", "Free blocks of the pool"),
    "num_blocks": ("kvc_blocks", "Blocks of the pool that can be allocated"),
}
_COUNTERS = {
    "prompt_tokens": ("kvc_prompt_tokens", "Prompt tokens prefilled"),
    "generated_tokens": ("kvc_generated_tokens", "Tokens generated"),
    "preemptions": ("kvc_preemptions", "Sequences that gave way to others"),
    "swaps": ("kvc_swaps", "Preemptions whose blocks went to host memory"),
    "compressions": ("kvc_compressions", "Compressions of a sequence"),
    "prefix_queries": ("kvc_prefix_queries", "Prompts looked up among cached prefixes"),
    "prefix_hits": ("kvc_prefix_hits", "Prompts found among cached prefixes"),
    "prefix_tokens": ("kvc_prefix_tokens", "Prompt tokens not prefilled because they were cached"),
}


class Metrics:
  """Counters and histograms of one server; safe to use from any thread."""

  def __init__(self, stats: Callable[[], EngineStats]):
    """Takes a function that returns the engine's newest counts."""
    self.registry = CollectorRegistry()
    self._engine = _EngineCollector(stats)
    self.registry.register(self._engine)
    self._answers = Counter(
        "kvc_http_requests", "HTTP requests by what became of them; 499 where the client went away",
        ["endpoint", "status"], registry=self.registry)
    self._first = Histogram(
        "kvc_time_to_first_token_seconds", "From a request's acceptance to its first token",
        buckets=_FIRST_TOKEN, registry=self.registry)
    self._next = Histogram(
        "kvc_inter_token_latency_seconds", "From one token to the next", buckets=_NEXT_TOKEN, registry=self.registry)
    self._whole = Histogram(
        "kvc_request_seconds", "From a request's acceptance to its end", buckets=_REQUEST, registry=self.registry)

  def first_token(self, seconds: float) -> None:
    """A request's first token has come."""
    self._first.observe(seconds)

  def next_tokens(self, seconds: float, count: int) -> None:
    """`count` further tokens have come together, so long behind those before."""
    for _ in range(count):
      self._next.observe(seconds / count)

  def answered(self, endpoint: str, status: int) -> None:
    """An HTTP request has ended."""
    self._answers.labels(endpoint, str(status)).inc()

  def ended(self, seconds: float) -> None:
    """A generation has come to its end."""
    self._whole.observe(seconds)

  def render(self, kvs_kept: np.ndarray | None) -> bytes:
    """All of it in Prometheus' text format.

    Args:
      kvs_kept: i32 [L, H] KVs held by each head; None where that is not known.
    """
    self._engine.kvs_kept = kvs_kept
    return generate_latest(self.registry)


class _EngineCollector(Collector):
  """Reads the engine's own counts whenever they are asked for."""

  def __init__(self, stats: Callable[[], EngineStats]):
    self._stats = stats
    self.kvs_kept: np.ndarray | None = None

  def collect(self) -> Iterator[Metric]:
    stats = self._stats()
    for field, (name, about) in _GAUGES.items():
      yield GaugeMetricFamily(name, about, value=getattr(stats, field))
    for field, (name, about) in _COUNTERS.items():
      yield CounterMetricFamily(name, about, value=getattr(stats, field))
    if self.kvs_kept is not None:
      kept = GaugeMetricFamily("kvc_kvs_kept", "KVs held by a layer's heads over all running sequences",
                               labels=["layer"])
      for layer, count in enumerate(self.kvs_kept.sum(axis=1)):
        kept.add_metric([str(layer)], float(count))
      yield kept
