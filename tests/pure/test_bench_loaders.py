"""bench load on the demo model: every row, the limits beside it, and a table for people."""

import json

import pytest

from headrace.bench import loaders
from headrace.cli.main import main


def test_the_table_compares_with_the_right_plain_read():
    load = {"loader": "auto", "bytes": 2e9, "seconds": 2.0, "peak": 5e6, "held": 2e9, "plain": 0.5}
    result = {"bytes": 2e9, "disk": 5e8, "page_cache": 4e9, "copy": 5e9, "loads": [load]}
    warm, cold = (loaders.table(result, cold) for cold in (False, True))
    assert "disk 0.50 GB/s, page cache 4.00 GB/s, copy 5.00 GB/s" in warm
    assert warm.splitlines()[-1].split()[1:5] == ["2.00", "1.00", "25%", "5"]
    assert "2.00 GB, cold" in cold and "from the page cache" in warm


@pytest.mark.slow
def test_loads_are_measured(capsys, monkeypatch):
    monkeypatch.setattr("sys.argv", ["headrace", "bench", "load"])
    assert main(["bench", "load", "--json", "--runs", "1", "--loaders", "auto"]) == 0
    found = json.loads(capsys.readouterr().out)
    (load,) = found["loads"]
    assert load["loader"] == "auto" and 0 < load["seconds"] < 60
    assert load["held"] > 0.9 * found["bytes"] / 2
    assert min(found[name] for name in ("disk", "page_cache", "copy")) > 1e6
