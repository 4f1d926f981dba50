"""Real servers in processes of their own, for tests of how they start, fail and end."""

import json
import os
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil

from headrace.core.ports import free_port

PATIENCE = 30.0
"""Seconds that no test should need: machines may be slow and busy."""


def wait_for(condition: Callable[[], Any], seconds: float = PATIENCE) -> Any:
    """The first true value of `condition`."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if value := condition():
            return value
        time.sleep(0.02)
    raise AssertionError(f"nothing happened within {seconds} s")


class Server:
    """`headrace serve` with its sockets under `base`; ended by its own pid."""

    def __init__(self, base: Path, *arguments: str, **environment: str) -> None:
        assert len(str(base)) <= 64, "too long for sockets, which would go elsewhere"
        self.base = base
        self.port = free_port("127.0.0.1")
        self.url = f"http://127.0.0.1:{self.port}"
        self.log = base / "log"
        with self.log.open("wb") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "headrace", "serve", "--port", str(self.port), *arguments],
                env={**os.environ, "XDG_RUNTIME_DIR": str(base), **environment},
                stdout=log,
                stderr=log,
            )

    def __enter__(self) -> "Server":
        return self

    def __exit__(self, *exception: object) -> None:
        if self.process.poll() is None:
            self.process.kill()
            self.process.wait()

    @property
    def text(self) -> str:
        """What it has printed."""
        return self.log.read_text(encoding="utf-8", errors="replace")

    def status(self, path: str = "/health") -> int:
        """The HTTP status of a GET, 0 when nobody answers."""
        try:
            with urllib.request.urlopen(self.url + path, timeout=20) as response:
                return int(response.status)
        except urllib.error.HTTPError as error:
            return error.code
        except OSError:
            return 0

    def wait_ready(self) -> "Server":
        wait_for(lambda: self.status() == 200 or self.process.poll() is not None, 120)
        assert self.process.poll() is None, self.text
        return self

    def post(self, path: str, body: dict[str, Any]) -> Any:
        """The open response to a JSON body."""
        request = urllib.request.Request(
            self.url + path,
            data=json.dumps(body).encode(),
            headers={"Content-Type": "application/json"},
        )
        return urllib.request.urlopen(request, timeout=PATIENCE)

    def children(self) -> dict[str, psutil.Process]:
        """The child processes by the name they gave themselves."""
        found = psutil.Process(self.process.pid).children(recursive=True)
        return {" ".join(child.cmdline()).strip(): child for child in found}

    def folders(self) -> list[Path]:
        """Folders of sockets that exist."""
        return list(self.base.glob("headrace-*"))
