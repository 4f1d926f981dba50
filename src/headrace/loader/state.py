"""What one rank holds, as blobs of bytes with a list of places; and back into an empty model.

The list says for each tensor and packed weight the way to it and the blobs of its fields. Files of
blobs are safetensors files whose blobs begin at cache lines. Knows no architecture and no loader.
Invariant: what is filled into a model has the shape and the size in bytes that its kernels expect.
"""

import dataclasses
import json
import math
import mmap
import os
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from headrace import ops
from headrace.core.errors import LoadError
from headrace.core.model_info import ModelInfo
from headrace.layers.build import Build
from headrace.layers.held import Way, at, held, parts, put
from headrace.ops.packed import PackedWeight
from headrace.quant.base import Matrix

Blobs = dict[str, Tensor]
Places = list[dict[str, Any]]

_ALIGNMENT = 64
# What a wrong place may raise on the way into the model.
_DAMAGED = (
    AttributeError,
    LookupError,
    OSError,
    OverflowError,
    RuntimeError,
    TypeError,
    ValueError,
)
_FORMAT = 2


def layout(info: ModelInfo, build: Build) -> dict[str, Any]:
    """What must be the same where a state is made and where it is used."""
    split = build.split
    return {
        "format": _FORMAT,
        "packing": ops.packing(),
        "architecture": info.architecture,
        "dtype": str(build.dtype),
        "quantization": build.quant.name,
        "rank": build.group.rank,
        "size": build.group.size,
        "stage": [split.stage.shard.rank, split.stage.shard.size],
        "experts": split.experts,
        "units": split.units,
    }


def describe(model: object) -> tuple[Places, Blobs]:
    """The places of all that `model` holds, and the blobs they name."""
    blobs: Blobs = {}
    places = [{"way": way, **_described(way, value, blobs)} for way, value in held(model)]
    return places, blobs


def _described(way: Way, value: Tensor | PackedWeight, blobs: Blobs) -> dict[str, Any]:
    base = ".".join(map(str, way))

    def one(name: str, item: Any) -> Any:
        if not isinstance(item, Tensor):
            return item
        if name in blobs:
            raise ValueError(f"two places are named {name}")
        blobs[name] = item
        dtype = str(item.dtype).removeprefix("torch.")
        return {"blob": name, "dtype": dtype, "shape": list(item.shape)}

    if isinstance(value, Tensor):
        return {"tensor": one(base, value)}
    fields = {field.name: getattr(value, field.name) for field in dataclasses.fields(value)}
    return {"packed": {name: one(f"{base}.{name}", item) for name, item in fields.items()}}


def fill(model: object, places: Any, bytes_of: Callable[[str], Tensor], what: object) -> None:
    """Give a model without weights those of `places`; `bytes_of` gives a blob, uint8 [n or more].

    Raises:
        LoadError: `what` is of another model, or damaged; names the place.
    """
    missing = {way for way, _ in held(model)}
    for place in places if isinstance(places, list) else [places]:
        name = str(place)[:100]
        try:
            way = tuple(place["way"])
            name = ".".join(map(str, way))
            value = _value(place, bytes_of)
            _check(model, way, value)
            put(model, way, value)
        except _DAMAGED as error:
            raise LoadError(f"{what} is no state of this model: at {name}: {error}") from error
        missing.discard(way)
    missing |= _unpacked(model)
    if missing:
        name = ".".join(map(str, min(missing, key=str)))
        raise LoadError(f"{what} is no state of this model: it has no {name}")


def _value(place: Mapping[str, Any], bytes_of: Callable[[str], Tensor]) -> Tensor | PackedWeight:
    def tensor(described: Mapping[str, Any]) -> Tensor:
        dtype, shape = getattr(torch, described["dtype"]), described["shape"]
        if not isinstance(dtype, torch.dtype):
            raise ValueError(f"{described['dtype']!r} is no dtype")
        if not all(type(size) is int and size >= 0 for size in shape):
            raise ValueError(f"{shape} is no shape")
        size = math.prod(shape) * dtype.itemsize
        raw = bytes_of(described["blob"])
        if len(raw) < size:
            raise ValueError(f"blob {described['blob']} has {len(raw)} bytes, not {size}")
        return raw[:size].view(dtype).view(shape)

    if "packed" not in place:
        return tensor(place["tensor"])
    fields: dict[str, Any] = {
        name: tensor(item) if isinstance(item, Mapping) else item
        for name, item in place["packed"].items()
    }
    weight = PackedWeight(**fields)
    ops.check_packed(weight)
    return weight


def _check(model: object, way: Way, value: Tensor | PackedWeight) -> None:
    """The value must be what the layer at this way was built for."""
    owner = at(model, way[:-1])
    if isinstance(value, PackedWeight):
        known = _packed_shapes(owner) or (_packed_shapes(at(model, way[:-2])) if way[1:] else {})
        shape = known.get(way[-1])
        if shape is None and not isinstance(owner, dict):
            raise ValueError("no packed weight belongs there")
        if shape not in (None, (value.out_size, value.in_size)):
            raise ValueError(f"its shape is {(value.out_size, value.in_size)}, not {shape}")
        return
    if isinstance(owner, dict) and way[-1] not in owner:
        return  # made while loading
    there = at(model, way)
    if not isinstance(there, Tensor):
        raise ValueError("no tensor belongs there")
    if there.shape != value.shape or there.dtype != value.dtype:
        raise ValueError(
            f"it is {value.dtype} {tuple(value.shape)}, not {there.dtype} {tuple(there.shape)}"
        )


def _packed_shapes(owner: Any) -> dict[str | int, tuple[int, ...]]:
    """Name -> shape of the packed weights that `owner` will have, where it can be told."""
    if hasattr(owner, "packed_shapes"):
        found: dict[str | int, tuple[int, ...]] = owner.packed_shapes()
        return found
    matrix = owner.get("weight") if isinstance(owner, dict) else getattr(owner, "weight", None)
    return {"packed": matrix.shape} if isinstance(matrix, Matrix) else {}


def _unpacked(model: object) -> set[Way]:
    """Ways that should lead to a packed weight and do not."""
    found: set[Way] = set()
    for way, owner in parts(model):
        names = _packed_shapes(owner)
        has = owner if isinstance(owner, dict) else vars(owner) if names else {}
        inner = has.get("weights", {}) if hasattr(owner, "packed_shapes") else has
        found |= {(*way, name) for name in names if name not in inner}
    return found


def write_blobs(path: Path, blobs: Blobs, metadata: Mapping[str, Any]) -> None:
    """A safetensors file of blobs and JSON `metadata`; it appears whole or not at all.

    Raises:
        OSError: it cannot be written.
    """
    header: dict[str, Any] = {"__metadata__": {"headrace": json.dumps(metadata)}}
    begin = 0
    for name, blob in blobs.items():
        size = padded(blob.nbytes)
        header[name] = {"dtype": "U8", "shape": [size], "data_offsets": [begin, begin + size]}
        begin += size
    text = json.dumps(header).encode()
    text += b" " * (-(8 + len(text)) % mmap.PAGESIZE)
    path.parent.mkdir(parents=True, exist_ok=True)
    fresh = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with fresh.open("wb") as file:
            file.write(len(text).to_bytes(8, "little") + text)
            for blob in blobs.values():
                file.write(as_bytes(blob))
                file.write(b"\0" * (padded(blob.nbytes) - blob.nbytes))
        fresh.replace(path)
    finally:
        fresh.unlink(missing_ok=True)


def state_from(metadata: dict[str, str], name: object) -> dict[str, Any]:
    """What `write_blobs` noted in a file's metadata; raises LoadError for another file."""
    try:
        found = json.loads(metadata["headrace"])
    except (LookupError, TypeError, ValueError, RecursionError) as error:
        raise LoadError(f"{name} holds no state of a model: {error!r}") from error
    if not isinstance(found, dict):
        raise LoadError(f"{name} holds no state of a model")
    return found


def by_name(blobs: Iterator[tuple[str, Tensor]]) -> Callable[[str], Tensor]:
    """Gives each blob of a stream once; cheapest when asked in the order of the stream."""
    passed: dict[str, Tensor] = {}

    def get(wanted: str) -> Tensor:
        if wanted in passed:
            return passed.pop(wanted)
        for name, tensor in blobs:
            if name == wanted:
                return tensor
            passed[name] = tensor
        raise LookupError(f"there is no blob {wanted}")

    return get


def padded(size: int) -> int:
    """`size` up to the next cache line."""
    return -(-size // _ALIGNMENT) * _ALIGNMENT


def as_bytes(tensor: Tensor) -> memoryview:
    """The bytes of a tensor, without a copy where it is contiguous."""
    flat = tensor.contiguous().view(-1)
    return flat.view(torch.uint8).numpy().data if flat.numel() else memoryview(b"")
