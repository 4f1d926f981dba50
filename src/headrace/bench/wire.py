"""HTTP by hand, for clients that misbehave: half requests, early ends, heads without measure."""

import asyncio
import contextlib
import json
import time
from collections.abc import AsyncIterator
from typing import Any

_LIMIT = 1 << 22


class Wire:
    """One connection."""

    def __init__(self, port: int, token: str = "") -> None:
        self._port = port
        self._token = token
        self._reader: asyncio.StreamReader
        self._writer: asyncio.StreamWriter

    async def __aenter__(self) -> "Wire":
        opened = await asyncio.open_connection("127.0.0.1", self._port, limit=_LIMIT)
        self._reader, self._writer = opened
        return self

    async def __aexit__(self, *_: object) -> None:
        self._writer.close()
        with contextlib.suppress(OSError):
            await self._writer.wait_closed()

    async def send(
        self, path: str, body: bytes, head: str = "", part: float = 1.0, method: str = "POST"
    ) -> None:
        """A request, or the first `part` of its bytes. `head`: more header lines."""
        lines = [f"{method} {path} HTTP/1.1", "host: 127.0.0.1", f"content-length: {len(body)}"]
        lines += ["connection: close"] + [line for line in head.split("\r\n") if line]
        if "content-type" not in head:
            lines.append("content-type: application/json")
        if self._token:
            lines.append(f"authorization: Bearer {self._token}")
        data = ("\r\n".join(lines) + "\r\n\r\n").encode("latin1") + body
        self._writer.write(data[: max(1, int(len(data) * part))])
        await self._writer.drain()

    async def status(self) -> int:
        """The status of the answer; 0 if the server just closed."""
        line = await self._reader.readline()
        return int(line.split()[1]) if line else 0

    async def rest(self) -> bytes:
        """Everything until the end."""
        return await self._reader.read()

    async def events(self) -> AsyncIterator[tuple[float, dict[str, Any]]]:
        """(time, value) of server-sent events; the status line and head must have been read."""
        while line := await self._reader.readline():
            if line.startswith(b"data: {"):
                yield time.perf_counter(), json.loads(line[6:])


async def get(port: int, path: str, token: str = "") -> tuple[int, bytes]:
    """(status, body) of a GET."""
    async with Wire(port, token) as wire:
        await wire.send(path, b"", method="GET")
        status = await wire.status()
        return status, (await wire.rest()).partition(b"\r\n\r\n")[2]


async def ask(port: int, path: str, body: dict[str, Any], token: str = "") -> tuple[int, bytes]:
    """(status, body) of one request."""
    async with Wire(port, token) as wire:
        await wire.send(path, json.dumps(body).encode())
        status = await wire.status()
        head_and_body = await wire.rest()
        return status, head_and_body.partition(b"\r\n\r\n")[2]
