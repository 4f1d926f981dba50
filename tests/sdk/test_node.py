"""The packages for Node (`openai`, Vercel's `ai`): each file of tests/sdk/node is a suite."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.sdk.conftest import API_KEY

FOLDER = Path(__file__).with_name("node")
NODE = Path(sys.executable).with_name("node")


@pytest.mark.parametrize("suite", ["openai.mjs", "ai.mjs"])
def test_suite(demo_server, suite):
    result = subprocess.run(
        [NODE, "--test", "--test-reporter=tap", suite],
        cwd=FOLDER,
        env={**os.environ, "HEADRACE_URL": demo_server.url, "HEADRACE_KEY": API_KEY},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert result.returncode == 0, result.stdout + result.stderr
    assert "# fail 0" in result.stdout
