"""Names of other servers, and the alerts and dashboard that are shipped: all of them exist."""

import json
import re
import shutil
import subprocess
from pathlib import Path

import pytest
import yaml
from prometheus_client.parser import text_string_to_metric_families

from headrace.core.config import Limits
from headrace.core.messages import SchedulerStats
from headrace.metrics.catalog import CATALOG, Sources
from headrace.metrics.compat import TABLES
from headrace.metrics.prometheus import Exporter
from headrace.metrics.record import RequestMetrics

DEPLOY = Path(__file__).parents[2] / "deploy"
RULES = yaml.safe_load((DEPLOY / "prometheus" / "rules.yml").read_text(encoding="utf-8"))
BOARD = json.loads((DEPLOY / "grafana" / "headrace.json").read_text(encoding="utf-8"))
PROMTOOL = shutil.which("promtool")
LIMITS = Limits(max_total_tokens=1600, max_running_requests=8, context_length=256, page_size=16)


def sources():
    requests = RequestMetrics()
    requests.stopped, requests.cut_short, requests.aborted = 5, 3, 2
    requests.time_to_first_token.observe(0.015)
    requests.prefill_time.observe(0.01)
    stats = SchedulerStats(
        running=2, waiting=7, used_tokens=400, max_total_tokens=1600, retracted_total=4,
        prompt_tokens_total=100, cached_tokens_total=25,
    )  # fmt: skip
    return Sources(stats, requests, LIMITS)


def exposition(names):
    return Exporter(sources, {"model_name": "m"}, names).render().decode()


def samples(names):
    return [s for f in text_string_to_metric_families(exposition(names)) for s in f.samples]


def value(found, name, **labels):
    (sample,) = [s for s in found if s.name == name and labels.items() <= s.labels.items()]
    return sample.value


# What the endpoint picker of the Gateway API Inference Extension asks of each engine.
PROTOCOL = {
    "vllm": ("vllm:num_requests_waiting", "vllm:num_requests_running", "vllm:kv_cache_usage_perc"),
    "sglang": ("sglang:num_queue_reqs", "sglang:num_running_reqs", "sglang:token_usage"),
}


@pytest.mark.parametrize("names", ["sglang", "vllm"])
def test_the_model_server_protocol(names):
    found = samples(names)
    assert [value(found, name) for name in PROTOCOL[names]] == [7, 2, 0.25]
    pages = {"vllm": ("block_size", "num_gpu_blocks"), "sglang": ("page_size", "num_pages")}
    labels = dict(zip(pages[names], ("16", "100"), strict=True))
    assert value(found, f"{names}:cache_config_info", **labels) == 1


def test_vllm_names():
    found = samples("vllm")
    ours = {s.name for s in samples("none")}
    assert ours < {s.name for s in found}
    theirs = [s for s in found if s.name.startswith("vllm:")]
    assert all(s.labels["engine"] == "0" and s.labels["model_name"] == "m" for s in theirs)
    for reason, count in (("stop", 5), ("length", 3), ("abort", 2)):
        assert value(found, "vllm:request_success_total", finished_reason=reason) == count
    assert value(found, "vllm:prefix_cache_queries_total") == 100
    assert value(found, "vllm:prefix_cache_hits_total") == 25
    assert value(found, "vllm:num_preemptions_total") == 4
    assert value(found, "vllm:time_to_first_token_seconds_bucket", le="0.02") == 1
    assert value(found, "vllm:request_prefill_time_seconds_count") == 1


def test_sglang_names():
    found = [s for s in samples("sglang") if s.name.startswith("sglang:")]
    labels = {"engine_type": "unified", "tp_rank": "0", "pp_rank": "0", "moe_ep_rank": "0"}
    assert all(labels.items() <= s.labels.items() for s in found)
    assert value(found, "sglang:num_retracted_requests_total") == 4
    assert value(found, "sglang:time_to_first_token_seconds_sum") == 0.015


def test_aliases_have_the_kind_and_the_suffix_of_theirs():
    for table in TABLES.values():
        names = [alias.name for alias in table.aliases if not alias.labels]
        assert len(set(names)) == len(names)
        for alias in table.aliases:
            assert alias.name.endswith("_total") == (alias.metric.kind == "counter")


def exported() -> set[str]:
    """Every name of a sample that a query may use."""
    return {sample.name for sample in samples("none")}


def queries():
    for group in RULES["groups"]:
        yield from ((rule["alert"], rule["expr"]) for rule in group["rules"])
    for panel in BOARD["panels"]:
        yield from ((panel["title"], target["expr"]) for target in panel["targets"])


@pytest.mark.parametrize(("where", "query"), queries())
def test_queries_name_only_metrics_that_exist(where, query):
    named = set(re.findall(r"\bheadrace_\w+", query))
    assert named or "up{" in query
    assert named <= exported()


def test_the_dashboard_is_whole():
    ids = [panel["id"] for panel in BOARD["panels"]]
    assert len(set(ids)) == len(ids)
    places = [tuple(panel["gridPos"].values()) for panel in BOARD["panels"]]
    assert len(set(places)) == len(places)
    variables = {variable["name"] for variable in BOARD["templating"]["list"]}
    used = set(re.findall(r"\$\{?(\w+)", json.dumps(BOARD["panels"])))
    assert used - {"__rate_interval"} == variables
    assert re.search(r"\((headrace_\w+),", json.dumps(BOARD["templating"]))[1] in exported()


def promtool(*arguments, text=None, codes=(0,)):
    result = subprocess.run([PROMTOOL, *arguments], capture_output=True, text=True, input=text)
    assert result.returncode in codes, result.stdout + result.stderr
    return result.stdout + result.stderr


def test_prometheus_itself_takes_all_of_it(tmp_path):
    """With Debian's promtool, where there is one; else the form alone."""
    rules = [{"record": f"q:{i}", "expr": resolved(q)} for i, (_, q) in enumerate(queries())]
    assert all("$" not in rule["expr"] for rule in rules)
    if PROMTOOL is None:
        return
    assert "SUCCESS" in promtool("check", "rules", str(DEPLOY / "prometheus" / "rules.yml"))
    assert "SUCCESS" in promtool("check", "config", str(DEPLOY / "prometheus" / "prometheus.yml"))
    path = tmp_path / "queries.yml"
    path.write_text(yaml.safe_dump({"groups": [{"name": "board", "rules": rules}]}))
    promtool("check", "rules", str(path))
    for names in TABLES:
        # 3: it read everything and dislikes names, which are not ours to choose.
        promtool("check", "metrics", text=exposition(names), codes=(0, 3))


def resolved(query: str) -> str:
    """A query of the dashboard with values for Grafana's variables."""
    return query.replace("$__rate_interval", "1m").replace("$model_name", ".*")


def test_every_metric_says_what_it_is():
    text = exposition("none")
    for metric in CATALOG:
        assert f"# HELP {metric.name} {metric.help}" in text
