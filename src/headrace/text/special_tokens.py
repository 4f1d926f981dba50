"""What the JSON files of a checkpoint folder say about special tokens.

Resolves names (`bos_token`, ...) and stop ids as transformers 5 does. Knows files only: no
vocabulary, no templates. A missing file reads as an empty one, a broken one is a `LoadError` that
names it.
"""

import json
from pathlib import Path
from typing import Any

from headrace.core.errors import LoadError


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file; empty when there is no such file."""
    if not path.is_file():
        return {}
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, RecursionError, ValueError) as error:
        raise LoadError(f"{path} is not valid JSON: {error}") from error
    if not isinstance(value, dict):
        raise LoadError(f"{path} must hold a JSON object, not {type(value).__name__}")
    return value


def tokenizer_config(folder: Path) -> dict[str, Any]:
    """tokenizer_config.json, completed from special_tokens_map.json where the format is old.

    A config that lists `added_tokens_decoder` is self-contained; transformers then ignores the
    map.
    """
    config = read_json(folder / "tokenizer_config.json")
    if "added_tokens_decoder" not in config:
        config |= read_json(folder / "special_tokens_map.json")
    return config


def token_content(value: Any) -> str | None:
    """The text of a token written as a string or as a serialized AddedToken."""
    if isinstance(value, dict):
        value = value.get("content")
    return value if isinstance(value, str) else None


def named_special_tokens(config: dict[str, Any]) -> dict[str, str]:
    """`{"bos_token": "<s>", ...}`: the standard names and the model's own `*_token` keys."""
    extra = config.get("extra_special_tokens")
    entries = config | (extra if isinstance(extra, dict) else {})
    named = {name: token_content(value) for name, value in entries.items() if _is_name(name, extra)}
    return {name: text for name, text in named.items() if text is not None}


def _is_name(name: str, extra: Any) -> bool:
    return name.endswith("_token") or (isinstance(extra, dict) and name in extra)


def configured_ids(folder: Path, key: str) -> list[int]:
    """Token ids under `key` ("eos_token_id"): generation_config.json, else config.json."""
    config = read_json(folder / "config.json")
    places = (
        read_json(folder / "generation_config.json"),
        config,
        config.get("text_config") or {},
    )
    value: Any = next((place[key] for place in places if place.get(key) is not None), [])
    ids = value if isinstance(value, list) else [value]
    if not all(type(i) is int and i >= 0 for i in ids):
        raise LoadError(f"{folder}: {key} must be a token id or a list of them, not {value!r}")
    return ids
