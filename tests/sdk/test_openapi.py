"""schemathesis over the OpenAPI document: whatever is sent to any route, no answer is a 5xx.

The model is `--runner fake`, which writes made-up tokens at once. No route is left out. Stateful
runs are left out: the document has no links, so they would repeat the other two phases.
"""

import subprocess
import sys
import urllib.request

import pytest

from tests.support.servers import Server

# Per route, beside thousands of boundary values that do not depend on it.
EXAMPLES = 2
OPTIONS = (
    *("--runner", "fake", "--enable-response-store", "--log-level", "warning"),
    *("--context-length", "256", "--preferred-sampling-params", '{"max_new_tokens": 4}'),
)


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    folder = tmp_path_factory.mktemp("openapi")
    with Server(folder, *OPTIONS, "--batch-store", str(folder / "batches.db")) as running:
        yield running.wait_ready()


# They make whoever comes next wait or go, as they should: fuzzed alone, after all others.
SLOWING = ("/pause_generation", "/slow_down", "/drain")


def fuzz(server, *paths: str) -> None:
    result = subprocess.run(
        [
            *(sys.executable, "-m", "schemathesis.cli", "run", f"{server.url}/openapi.json"),
            *("--checks", "not_a_server_error", "--phases", "coverage,fuzzing", *paths),
            *("--max-examples", str(EXAMPLES), "--generation-deterministic"),
            *("--request-timeout", "120", "--continue-on-failure", "--warnings", "off"),
        ],
        cwd=server.base,  # it keeps a folder of what it has found
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert result.returncode == 0, result.stdout + result.stderr


@pytest.mark.timeout(900)
def test_nothing_is_a_server_error(server):
    fuzz(server, *(word for path in SLOWING for word in ("--exclude-path", path)))
    assert server.status("/health_generate") == 200
    with urllib.request.urlopen(f"{server.url}/v1/loads", timeout=120) as answer:
        assert b'"num_running_reqs":0' in answer.read().replace(b" ", b"")
    fuzz(server, *(word for path in SLOWING for word in ("--include-path", path)))
    assert "Traceback" not in server.text
