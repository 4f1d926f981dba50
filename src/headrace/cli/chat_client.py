"""A small client of /v1/chat/completions for the terminal: streams one answer and times it.

Plain standard library, so that it also shows what the wire looks like. Knows nothing of the engine.
"""

import http.client
import json
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

from headrace.core.errors import HeadraceError


@dataclass
class Answer:
    """One streamed answer. Times in seconds from the moment the request was sent."""

    text: str = ""
    first_token: float = 0.0
    duration: float = 0.0
    prompt_tokens: int = 0
    output_tokens: int = 0

    @property
    def tokens_per_second(self) -> float:
        """Speed after the first token."""
        decode = self.duration - self.first_token
        return (self.output_tokens - 1) / decode if self.output_tokens > 1 and decode > 0 else 0.0


def stream_chat(
    url: str,
    messages: list[dict[str, Any]],
    show: Callable[[str], None],
    api_key: str = "",
    **fields: Any,
) -> Answer:
    """Ask the server at `url`; calls `show` with each piece of text.

    Raises:
        HeadraceError: the server cannot be reached or answers with an error.
    """
    body = {
        "model": "default",
        "messages": messages,
        "stream": True,
        "stream_options": {"include_usage": True},
        **fields,
    }
    answer = Answer()
    started = time.perf_counter()
    for event in _events(url, body, api_key):
        if "error" in event:
            raise HeadraceError(event["error"].get("message", "the server failed"))
        for choice in event.get("choices", []):
            piece = choice.get("delta", {}).get("content") or ""
            if piece and not answer.text:
                answer.first_token = time.perf_counter() - started
            answer.text += piece
            show(piece)
        usage = event.get("usage")
        if usage:
            answer.prompt_tokens = usage["prompt_tokens"]
            answer.output_tokens = usage["completion_tokens"]
    answer.duration = time.perf_counter() - started
    return answer


def _events(url: str, body: dict[str, Any], api_key: str) -> Iterator[dict[str, Any]]:
    parts = urlsplit(url)
    connect = http.client.HTTPSConnection if parts.scheme == "https" else http.client.HTTPConnection
    connection = connect(parts.hostname or "127.0.0.1", parts.port)
    headers = {"Content-Type": "application/json"}
    if api_key:
        headers["Authorization"] = f"Bearer {api_key}"
    try:
        path = parts.path.rstrip("/").removesuffix("/v1") + "/v1/chat/completions"
        connection.request("POST", path, json.dumps(body), headers)
        response = connection.getresponse()
        if response.status != 200:
            raise HeadraceError(_error_text(response.status, response.read()))
        for line in response:
            if line.startswith(b"data: ") and line.strip() != b"data: [DONE]":
                yield json.loads(line[6:])
    except OSError as error:
        raise HeadraceError(f"no server answers at {url}: {error}") from error
    finally:
        connection.close()


def _error_text(status: int, body: bytes) -> str:
    try:
        return f"the server answered {status}: {json.loads(body)['error']['message']}"
    except (ValueError, KeyError, TypeError):
        return f"the server answered {status}: {body[:200].decode(errors='replace')}"
