"""Packed weights on disk, so that a second start maps them instead of packing again.

A snapshot is a safetensors file of byte blobs, each beginning at a cache line; its metadata say
where in the model each of them goes. The file name is a fingerprint of everything that decides what
is in it, so a stale one is never found. Pages come from the page cache and are shared by all
processes that serve the same weights. Knows no architecture and no loader.
"""

import ctypes
import dataclasses
import hashlib
import json
import logging
import mmap
import os
from pathlib import Path
from typing import Any

import msgspec
import torch
from torch import Tensor

from headrace import __version__, ops
from headrace.core.errors import LoadError
from headrace.core.model_info import ModelInfo
from headrace.layers.build import Build
from headrace.layers.held import held, put
from headrace.loader.base import BaseModelLoader, logged_load
from headrace.loader.safetensors import read_header, read_metadata
from headrace.models import Model, make_model
from headrace.ops.packed import PackedWeight

logger = logging.getLogger(__name__)

_ALIGNMENT = 64
_FORMAT = 1
_MADV_POPULATE_READ = 22  # Linux 5.14


def load_through(
    folder: str,
    loader: BaseModelLoader,
    load_format: str,
    info: ModelInfo,
    build: Build,
) -> Model:
    """The model from its snapshot in `folder`, or from `loader` and then saved there.

    A snapshot that cannot be read or written costs time, not the start.
    """
    path = snapshot_path(Path(folder).expanduser(), info, build, load_format)
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
        "headrace": [__version__, _FORMAT, ops.packing()],
        "checkpoint": [(f.name, f.stat().st_size, f.stat().st_mtime_ns) for f in files],
        "config": info.hf,
        "pooling": msgspec.to_builtins(info.pooling),
        "dtype": str(build.dtype),
        "quantization": build.quant.name,
        "format": load_format,
        "rank": [build.group.rank, build.group.size],
        "split": [str(build.split.stage.shard), build.split.experts, build.split.units],
    }
    digest = hashlib.sha256(json.dumps(what, sort_keys=True, default=str).encode()).hexdigest()
    return folder / f"{checkpoint.name}-{digest[:24]}.safetensors"


def save(model: object, path: Path) -> None:
    """Write what `model` holds; the file appears whole or not at all.

    Raises:
        OSError: it cannot be written.
    """
    blobs: list[Tensor] = []
    places = [{"way": way, **_describe(value, blobs)} for way, value in held(model)]
    header: dict[str, Any] = {"__metadata__": {"headrace": json.dumps(places)}}
    begin = 0
    for number, blob in enumerate(blobs):
        size = -(-blob.nbytes // _ALIGNMENT) * _ALIGNMENT
        header[str(number)] = {
            "dtype": "U8",
            "shape": [size],
            "data_offsets": [begin, begin + size],
        }
        begin += size
    text = json.dumps(header).encode()
    text += b" " * (-(8 + len(text)) % mmap.PAGESIZE)
    path.parent.mkdir(parents=True, exist_ok=True)
    fresh = path.with_suffix(f".{os.getpid()}.tmp")
    try:
        with fresh.open("wb") as file:
            file.write(len(text).to_bytes(8, "little") + text)
            for blob in blobs:
                file.write(_bytes(blob))
                file.write(b"\0" * (-blob.nbytes % _ALIGNMENT))
        fresh.replace(path)
    finally:
        fresh.unlink(missing_ok=True)


def restore(model: object, path: Path) -> None:
    """Give a model without weights those of a snapshot of the same configuration.

    Raises:
        LoadError: the file is damaged, or is of another model.
    """
    entries = {entry.name: entry for entry in read_header(path)}
    with path.open("rb") as file:
        # Private and writable, which torch wants of a buffer; nobody writes to it.
        data = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
    _populate(data)

    def blob(described: dict[str, Any]) -> Tensor:
        entry, dtype = entries[described["blob"]], getattr(torch, described["dtype"])
        shape = tuple(described["shape"])
        values = torch.Size(shape).numel()
        if values * dtype.itemsize > entry.end - entry.begin:
            raise ValueError(f"blob {entry.name} is too short")
        if values == 0:
            return torch.empty(shape, dtype=dtype)
        return torch.frombuffer(data, dtype=dtype, count=values, offset=entry.begin).view(shape)

    try:
        for place in json.loads(read_metadata(path)["headrace"]):
            if "packed" in place:
                fields: dict[str, Any] = {
                    name: blob(value) if isinstance(value, dict) else value
                    for name, value in place["packed"].items()
                }
                put(model, tuple(place["way"]), PackedWeight(**fields))
            else:
                put(model, tuple(place["way"]), blob(place["tensor"]))
    except (LookupError, TypeError, ValueError, AttributeError) as error:
        raise LoadError(f"{path} is not a snapshot of this model: {error}") from error


def _describe(value: Tensor | PackedWeight, blobs: list[Tensor]) -> dict[str, Any]:
    def one(item: Any) -> Any:
        if not isinstance(item, Tensor):
            return item
        blobs.append(item)
        dtype = str(item.dtype).removeprefix("torch.")
        return {"blob": str(len(blobs) - 1), "dtype": dtype, "shape": list(item.shape)}

    if isinstance(value, Tensor):
        return {"tensor": one(value)}
    fields = {field.name: getattr(value, field.name) for field in dataclasses.fields(value)}
    return {"packed": {name: one(item) for name, item in fields.items()}}


def _bytes(tensor: Tensor) -> memoryview:
    flat = tensor.contiguous().view(-1)
    return flat.view(torch.uint8).numpy().data if flat.numel() else memoryview(b"")


def _populate(data: mmap.mmap) -> None:
    """Enter the pages into the page table at once, not one fault at a time."""
    libc, address = ctypes.CDLL(None), ctypes.addressof(ctypes.c_char.from_buffer(data))
    size = ctypes.c_size_t(len(data))
    if libc.madvise(ctypes.c_void_p(address), size, _MADV_POPULATE_READ) != 0:
        data.madvise(mmap.MADV_WILLNEED)
