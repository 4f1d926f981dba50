"""A server in a process of its own, and a client for it: the Engine's calls over HTTP.

Knows nothing of what happens in the server. The server ends with `shutdown`, at exit, and with the
process that started it.
"""

import asyncio
import atexit
import json
import os
import subprocess
import sys
from collections.abc import AsyncGenerator
from typing import Any

import aiohttp

from headrace.core import errors
from headrace.core.config import Config
from headrace.core.errors import BadRequest, HeadraceError, LoadError
from headrace.core.ports import free_port
from headrace.engine.child import describe, environment
from headrace.engine.loop_thread import LoopThread

_POLL_SECONDS = 0.05
_END_SECONDS = 40.0
_EVENT, _DONE = b"data: ", b"[DONE]"
_LONGEST_EVENT = 1 << 26


class Runtime:
    """`headrace serve` on a free port (or `port`), ready to be asked.

        with Runtime(model_path="...") as runtime:
            print(runtime.url, runtime.generate("Hello", {"max_new_tokens": 8})["text"])

    Takes every server option as a keyword, and the log level "error" unless told otherwise.

    Raises:
        LoadError: the server did not start. BadRequest: a wrong option.
    """

    def __init__(self, **server_args: Any) -> None:
        options = {"log_level": "error", **server_args}
        asked = Config.from_flat(options)
        serve, told = asked.serve, asked.revealed()
        options = {name: told[name] for name in options}
        options["port"] = serve.port if server_args.get("port") else free_port(serve.host)
        host = f"[{serve.host}]" if ":" in serve.host else serve.host
        self.url = f"http://{host}:{options['port']}"
        self._owner = os.getpid()
        self._closed = False
        self._headers = (
            {"Authorization": f"Bearer {serve.api_key.reveal()}"} if serve.api_key else {}
        )
        self._process: subprocess.Popen[bytes] | None = None
        self._client: aiohttp.ClientSession | None = None
        self._thread = LoopThread()
        atexit.register(self.shutdown)
        try:
            self._thread.run(self._start(options))
        except BaseException:
            self.shutdown()
            raise

    def generate(
        self,
        prompt: str | list[str] | None = None,
        sampling_params: dict[str, Any] | list[dict[str, Any]] | None = None,
        input_ids: list[int] | list[list[int]] | None = None,
        **fields: Any,
    ) -> Any:
        """The result of /generate; with `stream=True` an iterator of its events.

        Raises:
            HeadraceError: the server's answer was an error.
        """
        body = _body(prompt, sampling_params, input_ids, fields)
        if body.get("stream"):
            return self._thread.iterate(self._events(body))
        return self._thread.run(self._ask("POST", "/generate", body))

    async def async_generate(
        self,
        prompt: str | list[str] | None = None,
        sampling_params: dict[str, Any] | list[dict[str, Any]] | None = None,
        input_ids: list[int] | list[list[int]] | None = None,
        **fields: Any,
    ) -> Any:
        """`generate` for any running loop; with `stream=True` gives an async iterator."""
        body = _body(prompt, sampling_params, input_ids, fields)
        if body.get("stream"):
            return self._thread.aiterate(self._events(body))
        return await self._thread.arun(self._ask("POST", "/generate", body))

    def encode(
        self,
        prompt: str | list[str] | list[list[str]] | None = None,
        input_ids: list[int] | list[list[int]] | None = None,
        **fields: Any,
    ) -> Any:
        """The result of /encode."""
        body = {"text": prompt, "input_ids": input_ids, **fields}
        given = {name: value for name, value in body.items() if value is not None}
        return self._thread.run(self._ask("POST", "/encode", given))

    def rerank(self, prompt: list[list[str]]) -> Any:
        """The scores of [query, document] pairs by a cross-encoder, in the form of `encode`."""
        return self.encode(prompt)

    def get_server_info(self) -> dict[str, Any]:
        """/server_info."""
        return self._thread.run(self._ask("GET", "/server_info"))

    def get_model_info(self) -> dict[str, Any]:
        """/model_info."""
        return self._thread.run(self._ask("GET", "/model_info"))

    def flush_cache(self) -> bool:
        """Forget all cached prefixes; False while requests run."""
        try:
            self._thread.run(self._ask("POST", "/flush_cache"))
        except BadRequest:
            return False
        return True

    def abort_request(self, rid: str = "", abort_all: bool = False) -> None:
        """End every request whose rid starts with `rid`, or all."""
        self._thread.run(self._ask("POST", "/abort_request", {"rid": rid, "abort_all": abort_all}))

    def shutdown(self) -> None:
        """End the server and wait for it. May be called twice and from any thread."""
        if self._closed or os.getpid() != self._owner:
            return
        self._closed = True
        atexit.unregister(self.shutdown)
        self._thread.close(self._stop())

    def __enter__(self) -> "Runtime":
        return self

    def __exit__(self, *exception: object) -> None:
        self.shutdown()

    # -- on the loop thread -------------------------------------------------------------------

    async def _start(self, options: dict[str, Any]) -> None:
        """Make the server, in the thread that lives as long as we do (see `tied`), and wait."""
        self._process = start_server(options)
        self._client = aiohttp.ClientSession(
            self.url,
            headers=self._headers,
            timeout=aiohttp.ClientTimeout(total=None),
            read_bufsize=_LONGEST_EVENT,
        )
        while not await self._healthy():
            code = self._process.poll()
            if code is not None:
                raise LoadError(f"the server ended while it started ({describe(code)})")
            await asyncio.sleep(_POLL_SECONDS)

    async def _healthy(self) -> bool:
        try:
            async with self._session.get("/health") as response:
                return response.status == 200
        except aiohttp.ClientConnectionError:
            return False

    @property
    def _session(self) -> aiohttp.ClientSession:
        assert self._client is not None
        return self._client

    async def _ask(self, method: str, path: str, body: dict[str, Any] | None = None) -> Any:
        async with self._session.request(method, path, json=body) as response:
            data = await response.read()
            if response.status != 200:
                raise error_from(response.status, data)
            return json.loads(data) if response.content_type == "application/json" else None

    async def _events(self, body: dict[str, Any]) -> AsyncGenerator[dict[str, Any], None]:
        async with self._session.post("/generate", json=body) as response:
            if response.status != 200:
                raise error_from(response.status, await response.read())
            async for line in response.content:
                if not line.startswith(_EVENT):
                    continue
                data = line.removeprefix(_EVENT).strip()
                if data == _DONE:
                    return
                event = json.loads(data)
                if "error" in event:
                    raise error_from(int(event["error"].get("code") or 500), data)
                yield event

    async def _stop(self) -> None:
        if self._client is not None:
            await self._client.close()
        if self._process is None:
            return
        self._process.terminate()
        try:
            await asyncio.to_thread(self._process.wait, _END_SECONDS)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()


def start_server(options: dict[str, Any]) -> "subprocess.Popen[bytes]":
    """The server's process. Options go through a pipe, so that `ps` shows no API key."""
    command = ["-P", "-m", "headrace.engine.tied", str(os.getpid())]
    process = subprocess.Popen(
        [sys.executable, *command, "serve", "--config", "/dev/stdin"],
        stdin=subprocess.PIPE,
        env=environment(),
    )
    assert process.stdin is not None
    process.stdin.write(json.dumps(options).encode())
    process.stdin.close()
    return process


def _body(prompt: Any, sampling_params: Any, input_ids: Any, fields: dict[str, Any]) -> Any:
    body = {"text": prompt, "input_ids": input_ids, "sampling_params": sampling_params, **fields}
    return {name: value for name, value in body.items() if value is not None}


def error_from(status: int, data: bytes) -> HeadraceError:
    """The error that a response describes."""
    try:
        message = json.loads(data)["error"]["message"]
    except (ValueError, KeyError, TypeError):
        message = data.decode("utf-8", "replace") or f"HTTP status {status}"
    kinds = (
        BadRequest,
        errors.Unauthorized,
        errors.NotFound,
        errors.Unsupported,
        errors.Overloaded,
    )
    kind = next((kind for kind in kinds if kind.status == status), HeadraceError)
    return kind(message)
