"""One real server with the demo model for all end-to-end tests that only need one."""

from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest

from headrace.engine.runtime import Runtime

API_KEY = "test-key"


@pytest.fixture(scope="session")
def demo_server() -> Iterator[Runtime]:
    with Runtime(api_key=API_KEY, max_running_requests=16, random_seed=1) as runtime:
        yield runtime


@pytest.fixture
def tmp_path() -> Iterator[Path]:
    """As pytest's, with a path that is short enough for sockets in every test process."""
    with TemporaryDirectory(prefix="e2e-", ignore_cleanup_errors=True) as folder:
        yield Path(folder)
