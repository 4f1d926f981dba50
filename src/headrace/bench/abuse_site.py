"""A server under abuse: its start, its counters, its processes, a stream that watches its pace."""

import asyncio
import contextlib
import json
import os
import re
import time
from collections import Counter
from collections.abc import AsyncIterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from headrace.bench.process import ServerProcess, serve_command
from headrace.bench.wire import Wire, get
from headrace.core.ports import free_port

_PATIENCE = 30.0
# So small that a warm-up has touched all of it: memory that grows later is lost.
_POOL = ("--max-total-tokens", "8192")


@dataclass(frozen=True)
class Check:
    """One thing that must hold; `value` is for people."""

    what: str
    value: str
    ok: bool


@dataclass(frozen=True)
class Sizes:
    """What processes hold: open files and bytes of memory of their own."""

    files: int
    memory: int


class Site:
    """A running server of the demo model."""

    def __init__(self, *options: str, token: str = "", apart: bool = False) -> None:
        """`apart`: this client keeps one core to itself, and the server has the others."""
        self.port = free_port()
        self.token = token
        self._cores = os.sched_getaffinity(0)
        mine = {max(self._cores)} if apart and len(self._cores) > 1 else self._cores
        os.sched_setaffinity(0, self._cores - mine or self._cores)
        command = serve_command(self.port, ["--log-level", "warning", *_POOL, *options])
        self.process = ServerProcess(command, self.port, 120.0)
        os.sched_setaffinity(0, mine)

    async def __aenter__(self) -> "Site":
        await asyncio.to_thread(self.process.wait_health)
        return self

    async def __aexit__(self, *_: object) -> None:
        await asyncio.to_thread(self.process.__exit__)
        os.sched_setaffinity(0, self._cores)

    async def state(self) -> dict[str, Any]:
        """The scheduler's counters."""
        _, body = await get(self.port, "/server_info", self.token)
        state: dict[str, Any] = json.loads(body)["internal_states"][0]
        return state

    async def vocab_size(self) -> int:
        """Of the served model."""
        _, body = await get(self.port, "/model_info", self.token)
        return int(json.loads(body)["vocab_size"])

    async def at_rest(self) -> dict[str, Any]:
        """The counters once nothing runs, or after half a minute."""
        deadline = time.monotonic() + _PATIENCE
        while True:
            state = await self.state()
            quiet = not (state["running"] or state["waiting"] or state["used_tokens"])
            if quiet or time.monotonic() > deadline:
                return state
            await asyncio.sleep(0.1)

    def sizes(self) -> Sizes:
        """Of all processes together."""
        tree = self.process.tree()
        return Sizes(
            files=sum(process.num_fds() for process in tree),
            memory=sum(process.memory_full_info().uss for process in tree),
        )

    def repeated_lines(self) -> list[str]:
        """Lines of the log that were written more than once, numbers aside."""
        lines = [re.sub(r"[0-9a-f]{8,}|\d+", "#", line) for line in self._log().splitlines()]
        return [line for line, times in Counter(lines).items() if times > 1]

    def _log(self) -> str:
        return self.process.log_tail(1_000_000)

    async def stays_small(self, before: Sizes, most_mb: int) -> list[Check]:
        """Nothing is held, and processes are as large as they were."""
        state = await self.at_rest()
        after = self.sizes()
        held = {name: state[name] for name in ("running", "waiting", "used_tokens")}
        grown = (after.memory - before.memory) / (1 << 20)
        repeated = self.repeated_lines()
        return [
            Check("nothing is held", str(held), not any(held.values())),
            Check(
                "open files", f"{before.files} -> {after.files}", after.files <= before.files + 3
            ),
            Check("memory", f"{grown:+.1f} MiB", grown < most_mb),
            Check("no log line twice", repr(repeated[:1])[:60], not repeated),
        ]


@contextlib.asynccontextmanager
async def watching(site: Site) -> AsyncIterator[list[float]]:
    """The gaps between tokens (seconds) of streams that run one after the other meanwhile."""
    gaps: list[float] = []

    async def watch() -> None:
        body = {
            "text": "Tell me a long story about a mill.",
            "stream": True,
            "sampling_params": {"max_new_tokens": 200, "temperature": 0.0, "ignore_eos": True},
        }
        while True:
            async with Wire(site.port, site.token) as wire:
                await wire.send("/generate", json.dumps(body).encode())
                last = 0.0
                async for when, _ in wire.events():
                    if last:
                        gaps.append(when - last)
                    last = when

    task = asyncio.create_task(watch())
    try:
        yield gaps
    finally:
        task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await task


def p99(values: list[float]) -> float:
    """In milliseconds; nan without values."""
    return float(np.percentile(values, 99)) * 1e3 if values else float("nan")
