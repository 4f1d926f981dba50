"""A GGUF file as a model folder: config.json and the tokenizer's files, made from its metadata.

The folder lies in the user's cache and is made again when the file changes. The weights stay where
they are: `GGUF_KEY` in config.json says where. One file is enough to serve a model.
"""

import hashlib
import json
import os
import tempfile
from pathlib import Path
from typing import Any

from headrace.core.errors import LoadError
from headrace.core.model_info import WRONG_FIELD
from headrace.loader.gguf import GgufFile
from headrace.loader.gguf_config import config_of
from headrace.loader.gguf_tokenizer import tokenizer_of

GGUF_KEY = "headrace_gguf_file"
_EDITION = 2  # of what is made: a folder of another one is left alone


def model_folder(path: Path) -> Path:
    """The folder of a file.

    Raises:
        LoadError: not a GGUF file of a known architecture, or the cache cannot be written.
    """
    path = path.expanduser().resolve()
    state = path.stat()
    of = f"{_EDITION} {path} {state.st_size} {state.st_mtime_ns}"
    digest = hashlib.sha256(of.encode()).hexdigest()[:16]
    folder = _cache() / f"{path.stem}-{digest}"
    if (folder / "config.json").is_file():
        return folder
    parts = parts_of(GgufFile(path))
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for name, content in parts.items():
            _write(folder / name, json.dumps(content, ensure_ascii=False))
    except OSError as error:
        raise LoadError(f"{folder} cannot be written: {error}") from error
    return folder


def parts_of(file: GgufFile) -> dict[str, dict[str, Any]]:
    """The files of the folder, by name.

    Raises:
        LoadError: the metadata are those of no known model, or of none at all.
    """
    try:
        tokenizer, tokenizer_config = tokenizer_of(file)
        config = config_of(file)
    except WRONG_FIELD as error:
        raise LoadError(f"{file.path} has metadata that cannot be: {error!r}") from error
    return {
        "tokenizer.json": tokenizer,
        "tokenizer_config.json": tokenizer_config,
        # Last: where it is, all are.
        "config.json": config | {GGUF_KEY: str(file.path)},
    }


def _cache() -> Path:
    base = os.environ.get("XDG_CACHE_HOME") or str(Path.home() / ".cache")
    return Path(base) / "headrace" / "gguf"


def _write(path: Path, text: str) -> None:
    """The file appears whole or not at all."""
    with tempfile.NamedTemporaryFile("w", dir=path.parent, delete=False, encoding="utf-8") as file:
        file.write(text)
    Path(file.name).replace(path)
