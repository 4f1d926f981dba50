"""Packed weights on disk, so that a second start maps them instead of packing again.

A snapshot is one file of what a rank holds (`loader.state`). Its name is a fingerprint of
everything that decides what is in it, so a stale one is never found. Pages come from the page cache
and are shared by all processes that serve the same weights. Knows no architecture and no loader.
"""

import hashlib
import json
import logging
import mmap
from pathlib import Path
from typing import Any

import msgspec
import torch
from torch import Tensor

from headrace import __version__
from headrace.core.errors import LoadError
from headrace.core.model_info import ModelInfo
from headrace.layers.build import Build
from headrace.loader.base import BaseModelLoader, logged_load
from headrace.loader.safetensors import Entry, populate, read_header, read_metadata
from headrace.loader.state import Blobs, describe, fill, layout, state_from, write_blobs
from headrace.models import Model, make_model

logger = logging.getLogger(__name__)


def load_through(
    folder: str,
    loader: BaseModelLoader,
    info: ModelInfo,
    build: Build,
) -> Model:
    """The model from its snapshot in `folder`, or from `loader` and then saved there.

    A snapshot that cannot be read or written costs time, not the start.
    """
    path = snapshot_path(Path(folder).expanduser(), info, build, loader.load_format)
    if path.exists():
        try:
            with logged_load(info, build):
                model = make_model(info, build)
                restore(model, path)
        except LoadError as error:
            logger.warning("the weight cache is not used: %s", error.message)
        else:
            return model
    model = loader.load_model(info, build)
    try:
        save(model, path)
    except OSError as error:
        logger.warning("the weight cache cannot be written: %s", error)
    return model


def snapshot_path(folder: Path, info: ModelInfo, build: Build, load_format: str) -> Path:
    """Where the snapshot of this checkpoint on this rank is, or would be."""
    checkpoint = Path(info.path)
    folders = [dense.folder for dense in info.pooling.dense] if info.pooling else []
    files = sorted(
        path
        for folder in (checkpoint, *map(checkpoint.joinpath, folders))
        for path in folder.iterdir()
        if path.is_file()
    )
    what = {
        "headrace": __version__,
        "layout": layout(info, build),
        "checkpoint": [(f.name, f.stat().st_size, f.stat().st_mtime_ns) for f in files],
        "config": info.hf,
        "pooling": msgspec.to_builtins(info.pooling),
        "format": load_format,
    }
    digest = hashlib.sha256(json.dumps(what, sort_keys=True, default=str).encode()).hexdigest()
    return folder / f"{checkpoint.name}-{digest[:24]}.safetensors"


def save(model: object, path: Path) -> None:
    """Write what `model` holds; the file appears whole or not at all.

    Raises:
        OSError: it cannot be written.
    """
    places, blobs = describe(model)
    write_blobs(path, blobs, {"places": places})


def restore(model: object, path: Path) -> None:
    """Give a model without weights those of a snapshot of the same configuration.

    Raises:
        LoadError: the file is damaged, or is of another model.
    """
    fill(model, state_of(path).get("places"), mapped(path).__getitem__, path)


def state_of(path: Path) -> dict[str, Any]:
    """The metadata of a file that `write_blobs` wrote; raises LoadError for another file."""
    return state_from(read_metadata(path), path)


def mapped(path: Path) -> Blobs:
    """The blobs of a file, as views of the mapped file."""
    entries = read_header(path)
    with path.open("rb") as file:
        # Private and writable, which torch wants of a buffer; nobody writes to it.
        data = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
    populate(data, 0, len(data))

    def blob(entry: Entry) -> Tensor:
        size = entry.end - entry.begin
        if size == 0:
            return torch.empty(0, dtype=torch.uint8)
        return torch.frombuffer(data, dtype=torch.uint8, count=size, offset=entry.begin)

    return {entry.name: blob(entry) for entry in entries}
