"""A real Prometheus reads the metrics of a real server and evaluates our rules on them."""

import json
import shutil
import subprocess
import urllib.error
import urllib.parse
import urllib.request
from pathlib import Path

import pytest
import yaml

from headrace.core.ports import free_port
from tests.e2e.conftest import API_KEY
from tests.support.servers import wait_for

FILES = Path(__file__).parents[2] / "deploy" / "prometheus"
PROMETHEUS = shutil.which("prometheus") or ""


class Prometheus:
    """The configuration and rules of deploy/, with another address and shorter intervals."""

    def __init__(self, target: str, folder: Path) -> None:
        self.port = free_port()
        config = yaml.safe_load((FILES / "prometheus.yml").read_text())
        config["global"] |= {"scrape_interval": "1s", "evaluation_interval": "1s"}
        (job,) = config["scrape_configs"]
        job["static_configs"] = [{"targets": [target]}]
        job["authorization"] = {"credentials": API_KEY}
        shutil.copy(FILES / "rules.yml", folder)
        (folder / "prometheus.yml").write_text(yaml.safe_dump(config))
        self.log = (folder / "log").open("w")
        self.process = subprocess.Popen(
            [
                PROMETHEUS,
                f"--config.file={folder / 'prometheus.yml'}",
                f"--storage.tsdb.path={folder / 'data'}",
                f"--web.listen-address=127.0.0.1:{self.port}",
            ],
            stderr=self.log,
        )

    def ask(self, what: str, **query: str):
        """The data of an answer; None while there is none."""
        url = f"http://127.0.0.1:{self.port}/api/v1/{what}?{urllib.parse.urlencode(query)}"
        try:
            with urllib.request.urlopen(url, timeout=10) as answer:
                return json.load(answer)["data"]
        except (urllib.error.URLError, ConnectionError):
            return None

    def value(self, query: str) -> float | None:
        data = self.ask("query", query=query)
        found = data["result"] if data else []
        return float(found[0]["value"][1]) if found else None

    def close(self) -> None:
        self.process.terminate()
        self.process.wait(30)
        self.log.close()


@pytest.mark.skipif(not PROMETHEUS, reason="no prometheus is installed")
def test_prometheus_scrapes_and_evaluates(demo_server, tmp_path):
    demo_server.generate("What is the capital of France?", {"max_new_tokens": 8})
    prometheus = Prometheus(demo_server.url.removeprefix("http://"), tmp_path)
    try:
        wait_for(lambda: (prometheus.value("headrace_num_requests_total") or 0) >= 1, 60)
        assert prometheus.value('up{job="headrace"}') == 1
        (target,) = prometheus.ask("targets")["activeTargets"]
        assert target["health"] == "up" and target["lastError"] == ""

        def rules():
            groups = (prometheus.ask("rules") or {"groups": []})["groups"]
            return [rule for group in groups for rule in group["rules"]]

        wanted = yaml.safe_load((FILES / "rules.yml").read_text())["groups"]
        names = [rule["alert"] for group in wanted for rule in group["rules"]]
        wait_for(lambda: [r for r in rules() if r["health"] == "ok"] == rules() != [], 60)
        assert [rule["name"] for rule in rules()] == names
        quantile = "histogram_quantile(0.5, headrace_time_to_first_token_seconds_bucket)"
        assert 0 < prometheus.value(quantile) < 60
    finally:
        prometheus.close()
