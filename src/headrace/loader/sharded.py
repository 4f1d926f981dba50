"""What each rank holds, as files of its own: `model-rank-0-part-0.safetensors` and so on.

A rank maps its own files and reads nothing else, packed and quantized as they are; so they fit only
the same architecture, dtype, quantization and number of ranks, which the first part of each rank
says. Written by `save_sharded`; `headrace save-sharded` and `Engine.save_sharded_model` call it.
"""

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from headrace.core.errors import BadRequest, LoadError
from headrace.core.model_info import ModelInfo
from headrace.layers.build import Build
from headrace.loader.base import BaseModelLoader, Settings, logged_load
from headrace.loader.checksum import verify
from headrace.loader.snapshot import mapped, state_of
from headrace.loader.state import Blobs, describe, fill, layout, padded, write_blobs
from headrace.models import Model, make_model

DEFAULT_PATTERN = "model-rank-{rank}-part-{part}.safetensors"
MAX_PART_BYTES = 4 << 30

BESIDE = ("*.json", "*.model", "*.txt", "*.jinja", "*.tiktoken")


class ShardedSettings(Settings, frozen=True):
    """`pattern`: how files are named, with {rank} and {part}."""

    pattern: str = DEFAULT_PATTERN


class ShardedStateLoader(BaseModelLoader):
    """Format sharded_state."""

    settings_type = ShardedSettings
    settings: ShardedSettings
    packs = False

    def load_model(self, info: ModelInfo, build: Build) -> Model:
        folder = Path(info.path)
        paths = parts_of(folder, self.settings.pattern, build.rank)
        if self.options.model_checksum:
            verify(Path(self.options.model_checksum).expanduser(), folder, paths)
        with logged_load(info, build):
            model = make_model(info, build)
            first: dict[str, Any] = state_of(paths[0])
            blobs: Blobs = {}
            check_layout(first.get("layout"), layout(info, build), paths[0])
            for path in paths:
                blobs |= mapped(path)
            fill(model, first.get("places"), blobs.__getitem__, paths[0])
        return model


def save_sharded(
    model: object,
    info: ModelInfo,
    build: Build,
    folder: Path,
    pattern: str = DEFAULT_PATTERN,
    max_size: int = MAX_PART_BYTES,
) -> list[Path]:
    """Write what this rank holds in files of at most `max_size` bytes (or one blob).

    Raises:
        BadRequest: `pattern` is none. LoadError: the files cannot be written.
    """
    check_pattern(pattern)
    paths = []
    try:
        for part, (blobs, metadata) in enumerate(state_parts(model, info, build, max_size)):
            paths.append(folder / pattern.format(rank=build.rank, part=part))
            write_blobs(paths[-1], blobs, metadata)
    except OSError as error:
        raise LoadError(f"{folder} cannot be written: {error}") from error
    return paths


def save_beside(info: ModelInfo, folder: Path) -> None:
    """Copy what a model folder has beside the weights: config, tokenizer, template."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in files_beside(info).items():
        if not (folder / name).exists():
            (folder / name).write_bytes(content)


def files_beside(info: ModelInfo) -> dict[str, bytes]:
    """The small files of a model folder by name; config.json without what headrace wrote there."""
    folder = Path(info.path)
    paths = [path for pattern in BESIDE for path in sorted(folder.glob(pattern))]
    found = {p.name: p.read_bytes() for p in paths if not p.name.endswith(".index.json")}
    config = {key: value for key, value in info.hf.items() if not key.startswith("headrace_")}
    return found | {"config.json": json.dumps(config, indent=2).encode()}


def state_parts(
    model: object, info: ModelInfo, build: Build, max_size: int
) -> Iterator[tuple[Blobs, dict[str, Any]]]:
    """(blobs, metadata) of each part; the first tells what all of them are."""
    if max_size < 1:
        raise BadRequest(f"max_size must be at least 1 byte, not {max_size}", field="max_size")
    places, left = describe(model)
    metadata: dict[str, Any] = {"layout": layout(info, build), "places": places}
    blobs: Blobs = {}
    size = 0
    for name, blob in left.items():
        if blobs and size + padded(blob.nbytes) > max_size:
            yield blobs, metadata
            blobs, metadata, size = {}, {}, 0
        blobs[name] = blob
        size += padded(blob.nbytes)
    yield blobs, metadata


def parts_of(folder: Path, pattern: str, rank: int) -> list[Path]:
    """The files of one rank, in order.

    Raises:
        LoadError: there are none, or one between them is missing.
    """
    check_pattern(pattern)
    before, after = (re.escape(text) for text in pattern.format(rank=rank, part="\0").split("\0"))
    name = re.compile(f"{before}(\\d+){after}")
    found = {int(m[1]): path for path in folder.iterdir() if (m := name.fullmatch(path.name))}
    if not found:
        raise LoadError(
            f"{folder} has no {pattern.format(rank=rank, part=0)}: was it saved for fewer ranks?"
        )
    for part in range(max(found) + 1):
        if part not in found:
            raise LoadError(f"{folder / pattern.format(rank=rank, part=part)} is missing")
    return [found[part] for part in range(len(found))]


def check_pattern(pattern: str) -> None:
    """Raises BadRequest for what is no file name with {rank} and {part}."""
    try:
        made = pattern.format(rank=0, part=0)
        good = Path(made).name == made and "{rank}" in pattern and pattern.count("{part}") == 1
    except (LookupError, ValueError, AttributeError):
        good = False
    if not good or not pattern.endswith(".safetensors"):
        raise BadRequest(
            f"pattern must be the name of a .safetensors file with {{rank}} and {{part}}, "
            f"not {pattern!r}",
            field="pattern",
        )


def check_layout(found: Any, wanted: dict[str, Any], what: object) -> None:
    """Raises LoadError where a state was saved for another use than this."""
    for key, value in wanted.items():
        there = found.get(key) if isinstance(found, dict) else None
        if there != value:
            raise LoadError(f"{what} was saved with {key} {there!r}, which is {value!r} here")
