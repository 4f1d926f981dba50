"""`bench serving`: how options become flags, and what the table says."""

import pytest

from headrace.bench.serving import Pair, flags_of, table
from headrace.core.errors import BadRequest


def test_options_become_flags() -> None:
    options = {"page_size": 16, "disable_radix_cache": True, "enable_metrics": False, "host": ""}
    assert flags_of(options) == [
        "--page-size",
        "16",
        "--disable-radix-cache",
        "--no-enable-metrics",
    ]


def test_only_plain_values_can_be_flags() -> None:
    with pytest.raises(BadRequest, match="page_size"):
        flags_of({"page_size": [1]})


def test_the_table_shows_the_median_share() -> None:
    lines = table([Pair(100.0, 90.0), Pair(100.0, 95.0), Pair(200.0, 100.0)]).splitlines()
    assert lines[-1].split() == ["median", "100.00", "95.00", "90.0%"]
    assert len(lines) == 5
