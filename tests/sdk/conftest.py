"""One real server with the demo model for client packages that live in a venv of their own.

`make test-sdk` runs this folder; its packages would pin others of the main venv.
"""

from collections.abc import Iterator

import pytest

from headrace.engine.runtime import Runtime
from tests.sdk.scripted import Speaker
from tests.support.api_server import serve

API_KEY = "test-key"
MODEL = "headrace-demo"


@pytest.fixture(scope="session")
def demo_server() -> Iterator[Runtime]:
    options = {"max_running_requests": 16, "enable_response_store": True, "random_seed": 1}
    with Runtime(api_key=API_KEY, **options) as runtime:
        yield runtime


@pytest.fixture(scope="session")
def base_url(demo_server: Runtime) -> str:
    """What OpenAI's clients take."""
    return f"{demo_server.url}/v1"


@pytest.fixture(scope="session")
def scripted_url() -> Iterator[str]:
    """The same routes with `scripted.RULES` as the model."""
    with serve(Speaker(), tool_call_parser="hermes") as url:
        yield f"{url}/v1"


# LangChain's tests of what is no text, and of recorded traffic of a paid service.
_NO_TEXT = ("pdf", "audio", "image", "test_stream_time")
# What a model must understand; the demo model is far too small, a script stands in for it.
_CLEVER = (
    "test_tool_calling",
    "test_json_mode",
    "test_unicode_tool_call_integration",
)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Choose which of LangChain's tests meet which model."""
    kept = [item for item in items if _fits(item)]
    config.hook.pytest_deselected(items=[item for item in items if item not in kept])
    items[:] = kept


def _fits(item: pytest.Item) -> bool:
    if item.module.__name__ != "tests.sdk.test_langchain":
        return True
    clever = item.name.startswith(_CLEVER)
    return not any(part in item.name for part in _NO_TEXT) and clever == (
        "Scripted" in item.cls.__name__
    )


def pytest_configure(config: pytest.Config) -> None:
    """The marks of langchain-tests that belong to plug-ins we do not need."""
    for name in ("benchmark", "vcr", "codspeed"):
        config.addinivalue_line("markers", f"{name}: of langchain-tests")
    # A module's mark that gives all its async tests one loop is told for every other test.
    config.addinivalue_line("filterwarnings", "ignore:The test .* is marked with")
