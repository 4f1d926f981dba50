"""A model at a URL as a model folder: its small files, fetched into the user's cache. No torch.

The weights stay where they are; `REMOTE_KEY` in config.json says where.
"""

import hashlib
import json
import os
import tempfile
from pathlib import Path

from headrace.core.errors import LoadError
from headrace.loader.stores import open_store, redacted

REMOTE_KEY = "headrace_remote"

_SUFFIXES = (".json", ".model", ".txt", ".jinja", ".tiktoken")
_LARGEST = 256 << 20


def model_folder(url: str) -> Path:
    """The local folder of a model at `url`; what changed there is fetched again.

    Raises:
        LoadError: it cannot be reached, or there is no config.json. BadRequest: unknown scheme.
    """
    store = open_store(url)
    names = store.names()
    if "config.json" not in names:
        raise LoadError(f"{redacted(url)} has no config.json: is a model there?")
    digest = hashlib.sha256(url.encode()).hexdigest()[:16]
    folder = _cache() / f"{url.rstrip('/').rpartition('/')[2]}-{digest}"
    try:
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        for name, size in names.items():
            if not name.endswith(_SUFFIXES) or Path(name).name != name or size > _LARGEST:
                continue
            content = store.read(name, 0, size)
            _write(folder / name, _marked(content, url) if name == "config.json" else content)
    except OSError as error:
        raise LoadError(f"{folder} cannot be written: {error}") from error
    return folder


def _marked(content: bytes, url: str) -> bytes:
    try:
        config = json.loads(content)
    except (ValueError, RecursionError) as error:
        raise LoadError(f"config.json of {redacted(url)} is no JSON: {error}") from error
    if not isinstance(config, dict):
        raise LoadError(f"config.json of {redacted(url)} is no object")
    return json.dumps(config | {REMOTE_KEY: url}).encode()


def _cache() -> Path:
    base = os.environ.get("XDG_CACHE_HOME") or str(Path.home() / ".cache")
    return Path(base) / "headrace" / "remote"


def _write(path: Path, content: bytes) -> None:
    """The file appears whole or not at all."""
    with tempfile.NamedTemporaryFile("wb", dir=path.parent, delete=False) as file:
        file.write(content)
    Path(file.name).replace(path)
