"""Sends one request to a server and times its streamed answer.

Three backends: `native` (/generate of headrace and SGLang), `completions` and `chat` (any
OpenAI-compatible server). A failed request is a `Sample` with an error, never an exception; only a
server that cannot be reached at all raises. Bodies are encoded before the clock starts.
"""

import dataclasses
import time
from typing import Any

import aiohttp
import msgspec

from headrace.bench.datasets import Form, Prompt
from headrace.bench.stream import Sample, StreamMeter, error_message
from headrace.core.errors import BadRequest, HeadraceError

ROUTES = {
    "native": "/generate",
    "completions": "/v1/completions",
    "chat": "/v1/chat/completions",
}
"""Backend -> route."""

BACKENDS = {name: name for name in ROUTES} | {
    "sglang": "native",
    "sglang-native": "native",
    "sglang-oai": "completions",
    "sglang-oai-chat": "chat",
    "vllm": "completions",
    "vllm-chat": "chat",
}
"""Accepted names (with those of sglang.bench_serving) -> backend."""

# Shorter than the keep-alive of the usual servers (5 s), which could otherwise close a connection
# in the moment it is reused.
_KEEP_ALIVE = 2.0


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Target:
    """Where requests go, and what all of them have in common."""

    base_url: str
    backend: str = "native"
    model: str = "default"
    api_key: str = ""
    ignore_eos: bool = True
    extra_body: dict[str, Any] = dataclasses.field(default_factory=dict)
    timeout: float = 3600.0
    """Seconds a request may take from connect to last byte."""
    reconnect: bool = False
    """A new connection for every request: some servers close theirs without a word."""

    @property
    def url(self) -> str:
        """Address of the backend's route; a base URL may end in /v1, as OpenAI clients have it."""
        return self.root + ROUTES[self.backend]

    @property
    def root(self) -> str:
        """The base URL without a final slash or /v1."""
        return self.base_url.rstrip("/").removesuffix("/v1")

    def prompt_form(self, as_text: bool = False) -> Form:
        """What prompts the backend takes; ids where it can, for exact lengths."""
        if self.backend == "chat":
            return "chat"
        return "text" if as_text else "ids"


def open_session(target: Target) -> aiohttp.ClientSession:
    """A session without limits, cookies or proxies of its own; close it after use."""
    return aiohttp.ClientSession(
        connector=aiohttp.TCPConnector(
            limit=0,
            force_close=target.reconnect,
            keepalive_timeout=None if target.reconnect else _KEEP_ALIVE,
        ),
        cookie_jar=aiohttp.DummyCookieJar(),
        timeout=aiohttp.ClientTimeout(total=target.timeout),
        headers={"Authorization": f"Bearer {target.api_key}"} if target.api_key else None,
        read_bufsize=1 << 20,
    )


def request_body(target: Target, prompt: Prompt) -> bytes:
    """The JSON body for `prompt`; objects in `extra_body` are merged one level deep.

    Raises:
        BadRequest: the extra fields ask for several samples in one answer.
    """
    body = _base_body(target, prompt)
    for key, value in target.extra_body.items():
        both = isinstance(value, dict) and isinstance(body.get(key), dict)
        body[key] = {**body[key], **value} if both else value
    if (body.get("n") or body.get("sampling_params", {}).get("n") or 1) != 1:
        raise BadRequest(
            "extra request body: 'n' must be 1 in a benchmark; send more prompts instead",
            field="extra_request_body",
        )
    return msgspec.json.encode(body)


def _base_body(target: Target, prompt: Prompt) -> dict[str, Any]:
    if target.backend == "native":
        sampling: dict[str, Any] = {"temperature": 0.0, "max_new_tokens": prompt.output_len}
        if target.ignore_eos:
            sampling["ignore_eos"] = True
        content: dict[str, Any] = (
            {"input_ids": prompt.token_ids} if prompt.token_ids else {"text": prompt.text}
        )
        return {**content, "sampling_params": sampling, "stream": True}
    body: dict[str, Any] = {
        "model": target.model,
        "temperature": 0.0,
        "max_tokens": prompt.output_len,
        "stream": True,
        "stream_options": {"include_usage": True},
    }
    if target.ignore_eos:
        body["ignore_eos"] = True
    if target.backend == "chat":
        body["messages"] = prompt.messages or [{"role": "user", "content": prompt.text}]
    else:
        body["prompt"] = prompt.token_ids or prompt.text
    return body


async def send(
    session: aiohttp.ClientSession, target: Target, body: bytes, keep_text: bool = False
) -> Sample:
    """Post `body` and follow the stream to its end."""
    clock = time.perf_counter
    meter = StreamMeter(target.backend == "native", keep_text)
    start = clock()
    try:
        async with session.post(
            target.url, data=body, headers={"Content-Type": "application/json"}
        ) as response:
            if response.status != 200:
                error = _http_error(target, response.status, await response.read())
                return Sample(ok=False, start=start, error=error, e2e=clock() - start)
            async for data in response.content.iter_any():
                meter.feed(clock(), data)
    except TimeoutError:
        error = f"no complete answer within {target.timeout:g} s"
        return Sample(ok=False, start=start, error=error, e2e=clock() - start)
    except (aiohttp.ClientError, OSError) as problem:
        error = f"{type(problem).__name__}: {problem}"
        return Sample(ok=False, start=start, error=error, e2e=clock() - start)
    return meter.finish(start, clock())


async def first_model(session: aiohttp.ClientSession, target: Target) -> str:
    """Name of the first model served, "default" where /v1/models does not tell.

    Raises:
        HeadraceError: nothing listens at the address.
    """
    try:
        async with session.get(
            target.root + "/v1/models", timeout=aiohttp.ClientTimeout(total=30)
        ) as response:
            body = await response.read() if response.status == 200 else b"{}"
    except (aiohttp.ClientError, TimeoutError) as error:
        raise HeadraceError(
            f"no server at {target.root} ({error}); start one with `headrace serve`, "
            "or name it with --base-url or --host and --port"
        ) from None
    try:
        return str(msgspec.json.decode(body)["data"][0]["id"])
    except (msgspec.DecodeError, UnicodeDecodeError, LookupError, TypeError):
        return "default"


async def flush_cache(session: aiohttp.ClientSession, target: Target) -> None:
    """Empty the server's prefix cache (headrace and SGLang)."""
    async with session.post(target.root + "/flush_cache") as response:
        if response.status != 200:
            reason = _http_error(target, response.status, await response.read())
            raise HeadraceError(f"--flush-cache: {target.root}/flush_cache failed: {reason}")


def _http_error(target: Target, status: int, body: bytes) -> str:
    message = f"HTTP {status}: {error_message(body) or 'no message'}"
    if status == 404:
        others = " or ".join(name for name in ROUTES if name != target.backend)
        return (
            f"{message}; {target.url} is not there or does not know model {target.model!r}: "
            f"try --backend {others}"
        )
    if status in (401, 403):
        return f"{message}; is --api-key right?"
    return message
