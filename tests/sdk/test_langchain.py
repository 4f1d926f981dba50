"""LangChain's standard tests of a chat model, with ChatOpenAI and our server behind it."""

import pytest
from langchain_core.language_models import BaseChatModel
from langchain_openai import ChatOpenAI
from langchain_tests.integration_tests import ChatModelIntegrationTests

from tests.sdk.conftest import API_KEY, MODEL

# The client keeps connections, which must not outlive the loop they were made in.
pytestmark = pytest.mark.asyncio(loop_scope="module")


class _Standard(ChatModelIntegrationTests):
    """What both protocols have in common."""

    @pytest.fixture(autouse=True)
    def _server(self, base_url: str) -> None:
        self._base_url = base_url

    @property
    def chat_model_class(self) -> type[BaseChatModel]:
        return ChatOpenAI

    @property
    def chat_model_params(self) -> dict:
        return {
            "model": MODEL,
            "base_url": self._base_url,
            "api_key": API_KEY,
            "max_retries": 0,
            "timeout": 60,
            "stream_usage": True,
        }

    @property
    def standard_chat_model_params(self) -> dict:
        return {"temperature": 0, "max_tokens": 60}

    @property
    def model_override_value(self) -> str:
        return "another-name"

    @property
    def supports_json_mode(self) -> bool:
        return True

    @property
    def supports_anthropic_inputs(self) -> bool:
        return True


class TestChat(_Standard):
    """/v1/chat/completions with the demo model."""


class TestResponses(_Standard):
    """/v1/responses with the demo model."""

    @property
    def chat_model_params(self) -> dict:
        return super().chat_model_params | {"use_responses_api": True}


class TestScriptedChat(TestChat):
    """What only a model that understands the question can answer."""

    @pytest.fixture(autouse=True)
    def _server(self, scripted_url: str) -> None:
        self._base_url = scripted_url


class TestScriptedResponses(TestResponses):
    """The same through /v1/responses."""

    @pytest.fixture(autouse=True)
    def _server(self, scripted_url: str) -> None:
        self._base_url = scripted_url
