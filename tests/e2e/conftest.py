"""One real server with the demo model for all end-to-end tests that only need one."""

from collections.abc import Iterator

import pytest

from headrace.engine.runtime import Runtime

API_KEY = "test-key"


@pytest.fixture(scope="session")
def demo_server() -> Iterator[Runtime]:
    with Runtime(api_key=API_KEY, max_running_requests=16, random_seed=1) as runtime:
        yield runtime
