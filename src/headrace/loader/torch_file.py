"""Weights from what torch.save wrote (.bin, .pt): the only file that unpickles anything.

Such files hold programs that build objects. torch's restricted reader builds tensors and plain
containers only, and this file asks for nothing else; a file is first checked to be a zip archive
without compression whose parts lie inside it, so its size bounds what reading can take.
"""

import pickle  # for the name of the error that torch raises
import struct
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from headrace.core.errors import LoadError

_MOST_PROGRAM_BYTES = 100 << 20
# What a damaged or hostile file may raise inside torch.
_REFUSALS = (
    ArithmeticError,
    AssertionError,
    AttributeError,
    EOFError,
    LookupError,
    MemoryError,
    OSError,
    RecursionError,
    RuntimeError,
    TypeError,
    ValueError,
    pickle.UnpicklingError,
    struct.error,
    zipfile.BadZipFile,
)


def iterate_torch_file(path: Path) -> Iterator[tuple[str, Tensor]]:
    """Each tensor of a state dict, as views of the mapped file."""
    yield from read_torch_file(path).items()


def read_torch_file(path: Path) -> dict[str, Tensor]:
    """A state dict by name; tensors are views of the mapped file, dense and on the CPU.

    Raises:
        LoadError: no archive of torch.save, or it holds other things than named tensors.
    """
    try:
        _check_archive(path)
        found = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except _REFUSALS as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise LoadError(f"{path} is no file of weights that can be trusted: {reason}") from error
    return _checked(path, _state_dict(found))


def _check_archive(path: Path) -> None:
    size = path.stat().st_size
    if not zipfile.is_zipfile(path):
        raise ValueError("it is no zip archive; older forms of torch.save are not read")
    with zipfile.ZipFile(path) as archive:
        total = 0
        for item in archive.infolist():
            if item.compress_type != zipfile.ZIP_STORED or item.file_size != item.compress_size:
                raise ValueError(f"its part {item.filename} is compressed")
            if item.filename.endswith(".pkl") and item.file_size > _MOST_PROGRAM_BYTES:
                raise ValueError(f"its part {item.filename} has {item.file_size} bytes")
            total += item.file_size
        if total > size:
            raise ValueError(f"its parts have {total} bytes, the file has {size}")


def _state_dict(found: Any) -> Any:
    """Trainers wrap the state dict once."""
    if isinstance(found, dict):
        for key in ("state_dict", "model"):
            if isinstance(found.get(key), dict):
                return found[key]
    return found


def _checked(path: Path, found: Any) -> dict[str, Tensor]:
    if not isinstance(found, dict) or not found:
        raise LoadError(f"{path} holds {type(found).__name__}, not tensors by name")
    for name, tensor in found.items():
        if not isinstance(name, str) or not isinstance(tensor, Tensor):
            raise LoadError(f"{path}: {str(name)[:200]!r} is no named tensor")
        if tensor.layout != torch.strided or tensor.is_quantized or tensor.device.type != "cpu":
            raise LoadError(f"{path}: tensor {name} is sparse, quantized or on no CPU")
        if tensor.numel() * tensor.itemsize > tensor.untyped_storage().nbytes():
            raise LoadError(
                f"{path}: tensor {name} of shape {tuple(tensor.shape)} repeats what the file has"
            )
    return {name: tensor.detach() for name, tensor in found.items()}
