"""Weights of .bin files as one .npy file each, written at the first load and mapped afterwards.

The cache lies in a folder beside the weights and is made again when they change. Types that numpy
does not have are kept as their bits.
"""

import json
import os
import tokenize
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from headrace.core.errors import LoadError
from headrace.loader.files import WeightFiles
from headrace.loader.iterators import iterate_weights

FOLDER, _LIST = "np", "weight_names.json"
# What numpy raises for a file that is none of its own.
_DAMAGED = (
    ArithmeticError,
    EOFError,
    LookupError,
    MemoryError,
    OSError,
    RecursionError,
    SyntaxError,
    TypeError,
    ValueError,
    tokenize.TokenError,
)
_BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def np_cache_weights(folder: Path, files: WeightFiles) -> Iterator[tuple[str, Tensor]]:
    """Every tensor of `files`, from the cache in `folder`/np, which is made if need be.

    Raises:
        LoadError: the cache cannot be written, or what it has is damaged.
    """
    cache = folder / FOLDER
    stamp = [[p.name, p.stat().st_size, p.stat().st_mtime_ns] for p in files.paths]
    listed = _read_list(cache / _LIST)
    if listed is None or listed.get("files") != stamp:
        listed = _write(cache, files, stamp)
    for name, dtype in listed["tensors"].items():
        yield name, _read(cache / f"{name}.npy", name, dtype)


def _read_list(path: Path) -> dict[str, Any] | None:
    try:
        listed = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except (OSError, ValueError, RecursionError) as error:
        raise LoadError(f"{path} cannot be read: {error}; remove it to make it again") from error
    if not isinstance(listed, dict) or not isinstance(listed.get("tensors"), dict):
        raise LoadError(f"{path} is no list of tensors; remove it to make it again")
    return listed


def _write(cache: Path, files: WeightFiles, stamp: list[list[Any]]) -> dict[str, Any]:
    tensors: dict[str, str] = {}
    try:
        cache.mkdir(exist_ok=True)
        for name, tensor in iterate_weights(files):
            if Path(name).name != name or tensor.itemsize not in _BITS:
                raise LoadError(f"tensor {name!r} of {tensor.dtype} cannot be a file of numpy")
            bits = tensor.contiguous().view(_BITS[tensor.itemsize])
            fresh = cache / f"{name}.{os.getpid()}.tmp"
            with fresh.open("wb") as file:
                np.save(file, bits.numpy())
            fresh.replace(cache / f"{name}.npy")
            tensors[name] = str(tensor.dtype).removeprefix("torch.")
        listed = {"files": stamp, "tensors": tensors}
        fresh = cache / f"{_LIST}.{os.getpid()}.tmp"
        fresh.write_text(json.dumps(listed), encoding="utf-8")
        fresh.replace(cache / _LIST)  # last: where it is, all are
    except (OSError, ValueError) as error:
        raise LoadError(f"{cache} cannot be written: {error}") from error
    return listed


def _read(path: Path, name: str, dtype: Any) -> Tensor:
    kind = getattr(torch, dtype, None) if isinstance(dtype, str) else None
    if Path(name).name != name or not isinstance(kind, torch.dtype):
        raise LoadError(f"{path.parent / _LIST}: tensor {name!r} has dtype {dtype!r}")
    try:
        # Copied on write, which nobody does: torch wants writable memory.
        values = np.load(path, mmap_mode="c", allow_pickle=False)
        bits = torch.from_numpy(values)
        if bits.dtype != _BITS[kind.itemsize]:
            raise ValueError(f"it holds {bits.dtype}")
    except _DAMAGED as error:
        raise LoadError(f"{path}: tensor {name} cannot be read: {error}") from error
    return bits.view(kind)
