"""The suites of `headrace bench abuse`, short: what must hold on a busy machine, too."""

import json
import subprocess
import sys

import pytest

pytestmark = pytest.mark.slow


def checks(*arguments: str) -> dict[str, dict]:
    """The checks of some suites by name."""
    command = [sys.executable, "-m", "headrace", "bench", "abuse", *arguments, "--json"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=280)
    found = json.loads(done.stdout)["suites"]
    return {check["what"]: check for suite in found.values() for check in suite}


def test_vanishing_and_hostile_clients_leave_nothing():
    found = checks("disconnects", "hostile", "--count", "96")
    # How fast the others are is measured by the bench, not here.
    wrong = {what: c["value"] for what, c in found.items() if not c["ok"] and "p99" not in what}
    assert wrong == {}
    assert len(found) == 7


def test_a_flood_is_refused_and_a_soak_loses_nothing():
    found = checks("overload", "soak", "--seconds", "4")
    for what in (
        "nothing but 200 and 503",
        "served of those who came",
        "refused with Retry-After",
        "nothing is held",
        "lost answers",
        "other answers than alone",
    ):
        assert found[what]["ok"], found[what]
