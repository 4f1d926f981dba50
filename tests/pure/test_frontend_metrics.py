"""Metrics: catalog, arithmetic, and the text, read back by Prometheus' own parser."""

import re

from prometheus_client.parser import text_string_to_metric_families

from headrace.core.messages import SchedulerStats
from headrace.metrics.catalog import CATALOG, PREFIX, Sources
from headrace.metrics.prometheus import Exporter, cumulative
from headrace.metrics.record import Histogram, RequestMetrics


def test_histogram_counts_by_bucket():
    histogram = Histogram((1.0, 2.0, 5.0))
    for value, times in ((0.5, 1), (1.0, 2), (1.5, 1), (5.0, 3), (9.0, 1)):
        histogram.observe(value, times)
    assert histogram.counts == [3, 1, 3, 1]
    assert histogram.sum == 0.5 + 2.0 + 1.5 + 15.0 + 9.0
    assert cumulative(histogram) == [("1", 3.0), ("2", 4.0), ("5", 7.0), ("+Inf", 8.0)]


def test_the_text_says_what_was_measured():
    requests = RequestMetrics()
    requests.requests = 3
    requests.time_to_first_token.observe(0.015)
    requests.time_to_first_token.observe(300.0)
    stats = SchedulerStats(
        running=2,
        used_tokens=50,
        max_total_tokens=200,
        prompt_tokens_total=40,
        cached_tokens_total=10,
        grammar_waiting=4,
        grammar_mask_counts=[0, 2, 1, *[0] * 12],
        grammar_mask_seconds_total=0.25,
    )
    exporter = Exporter(lambda: Sources(stats, requests), {"model_name": 'a "model"'})
    families = {f.name: f for f in text_string_to_metric_families(exporter.render().decode())}
    samples = {
        (sample.name, sample.labels.get("le")): sample
        for family in families.values()
        for sample in family.samples
    }
    assert all(s.labels["model_name"] == 'a "model"' for s in samples.values())

    def value(name, le=None):
        return samples[f"headrace_{name}", le].value

    assert value("num_requests_total") == 3
    assert value("num_running_reqs") == 2
    assert value("token_usage") == 0.25
    assert value("cache_hit_rate") == 0.25
    ttft = "time_to_first_token_seconds"
    assert value(f"{ttft}_bucket", "0.01") == 0
    assert value(f"{ttft}_bucket", "0.02") == 1
    assert value(f"{ttft}_bucket", "+Inf") == value(f"{ttft}_count") == 2
    assert value(f"{ttft}_sum") == 300.015
    assert value("num_grammar_queue_reqs") == 4
    mask = "grammar_mask_time_seconds"
    assert value(f"{mask}_bucket", "2e-05") == 2
    assert (value(f"{mask}_count"), value(f"{mask}_sum")) == (3, 0.25)
    assert value("grammar_compilation_time_seconds_count") == 0
    kinds = {metric.name.removesuffix("_total"): metric.kind for metric in CATALOG}
    assert {name: family.type for name, family in families.items()} == kinds


def test_values_are_those_of_the_moment():
    requests = RequestMetrics()
    exporter = Exporter(lambda: Sources(SchedulerStats(), requests), {})
    assert b"headrace_num_requests_total 0.0" in exporter.render()
    requests.requests = 7
    assert b"headrace_num_requests_total 7.0" in exporter.render()


def test_names_follow_the_conventions():
    names = [metric.name for metric in CATALOG]
    assert len(set(names)) == len(names)
    for metric in CATALOG:
        assert re.fullmatch(PREFIX + r"[a-z][a-z0-9_]*", metric.name)
        assert metric.name.endswith("_total") == (metric.kind == "counter")
        assert metric.help.endswith(".")
