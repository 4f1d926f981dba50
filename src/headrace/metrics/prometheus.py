"""The catalog in Prometheus' text format.

Values are read when someone asks, from a registry of our own: nothing is kept twice, and an
application that embeds the engine keeps its own registry to itself.
"""

from collections.abc import Callable, Iterable, Mapping

from prometheus_client import CONTENT_TYPE_PLAIN_0_0_4, CollectorRegistry, generate_latest
from prometheus_client.metrics_core import (
    CounterMetricFamily,
    GaugeMetricFamily,
    HistogramMetricFamily,
    Metric,
)
from prometheus_client.registry import Collector

from headrace.metrics.catalog import CATALOG, Sources
from headrace.metrics.record import Histogram

CONTENT_TYPE = CONTENT_TYPE_PLAIN_0_0_4


class Exporter(Collector):
    """Renders what `sources` gives at the time, with `labels` on every sample."""

    def __init__(self, sources: Callable[[], Sources], labels: Mapping[str, str]) -> None:
        self._sources = sources
        self._labels = dict(labels)
        self._registry = CollectorRegistry()
        self._registry.register(self)

    def render(self) -> bytes:
        """The body of /metrics."""
        return generate_latest(self._registry)

    def collect(self) -> Iterable[Metric]:
        """Called by the registry."""
        sources = self._sources()
        names, values = list(self._labels), list(self._labels.values())
        for metric in CATALOG:
            value = metric.read(sources)
            if isinstance(value, Histogram):
                family = HistogramMetricFamily(metric.name, metric.help, labels=names)
                family.add_metric(values, cumulative(value), value.sum)
                yield family
                continue
            kind = CounterMetricFamily if metric.kind == "counter" else GaugeMetricFamily
            plain = kind(metric.name, metric.help, labels=names)
            plain.add_metric(values, value)
            yield plain


def cumulative(histogram: Histogram) -> list[tuple[str, float]]:
    """(upper bound, count of values up to it), ending with +Inf."""
    bounds = [*(f"{bound:g}" for bound in histogram.bounds), "+Inf"]
    total = 0
    buckets = []
    for bound, count in zip(bounds, histogram.counts, strict=True):
        total += count
        buckets.append((bound, float(total)))
    return buckets
