"""The catalog in Prometheus' text format.

Values are read when someone asks, from a registry of our own: nothing is kept twice, and an
application that embeds the engine keeps its own registry to itself.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import groupby

from prometheus_client import CONTENT_TYPE_PLAIN_0_0_4, CollectorRegistry, generate_latest
from prometheus_client.metrics_core import (
    CounterMetricFamily,
    GaugeMetricFamily,
    HistogramMetricFamily,
)
from prometheus_client.metrics_core import Metric as Family
from prometheus_client.registry import Collector

from headrace.metrics.catalog import CATALOG, Metric, Sources
from headrace.metrics.compat import TABLES
from headrace.metrics.record import Histogram

CONTENT_TYPE = CONTENT_TYPE_PLAIN_0_0_4


class Exporter(Collector):
    """Renders what `sources` gives at the time, with `labels` on every sample; also under the names
    of another server, if `names` (of `headrace.metrics.compat`) is one."""

    def __init__(
        self, sources: Callable[[], Sources], labels: Mapping[str, str], names: str = "none"
    ) -> None:
        self._sources = sources
        self._labels = dict(labels)
        self._table = TABLES[names]
        self._registry = CollectorRegistry()
        self._registry.register(self)

    def render(self) -> bytes:
        """The body of /metrics."""
        return generate_latest(self._registry)

    def collect(self) -> Iterable[Family]:
        """Called by the registry."""
        sources, table = self._sources(), self._table
        for metric in CATALOG:
            yield _family(metric.name, [(metric, self._labels)], sources)
        theirs = {**self._labels, **table.labels}
        for name, aliases in groupby(table.aliases, lambda alias: alias.name):
            samples = [(alias.metric, {**theirs, **alias.labels}) for alias in aliases]
            yield _family(name, samples, sources)
        for info in table.infos:
            labels = {**theirs, **info.labels(sources)}
            family = GaugeMetricFamily(info.name, info.help, labels=list(labels))
            family.add_metric(list(labels.values()), 1.0)
            yield family


def _family(
    name: str, samples: Sequence[tuple[Metric, Mapping[str, str]]], sources: Sources
) -> Family:
    """Samples of one name; metrics of a kind, told apart by their labels."""
    first, labels = samples[0]
    if first.kind == "histogram":
        histograms = HistogramMetricFamily(name, first.help, labels=list(labels))
        for metric, found in samples:
            value = metric.read(sources)
            assert isinstance(value, Histogram)
            histograms.add_metric(list(found.values()), cumulative(value), value.sum)
        return histograms
    kind = CounterMetricFamily if first.kind == "counter" else GaugeMetricFamily
    family = kind(name, first.help, labels=list(labels))
    for metric, found in samples:
        number = metric.read(sources)
        assert not isinstance(number, Histogram)
        family.add_metric(list(found.values()), number)
    return family


def cumulative(histogram: Histogram) -> list[tuple[str, float]]:
    """(upper bound, count of values up to it), ending with +Inf."""
    bounds = [*(f"{bound:g}" for bound in histogram.bounds), "+Inf"]
    total = 0
    buckets = []
    for bound, count in zip(bounds, histogram.counts, strict=True):
        total += count
        buckets.append((bound, float(total)))
    return buckets
