"""Reads GGUF files: a bounds-checked header, and tensors as views of the mapped file.

Format (version 2 and 3, little endian): magic, version, number of tensors and of metadata; metadata
as key, type, value; tensors as name, shape (fastest dimension first), type, offset; then, aligned,
the data. Every number is checked against the file before it is used. Knows no architecture.
"""

import mmap
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from headrace.core.errors import LoadError
from headrace.loader.gguf_blocks import BLOCKS

_MAGIC = b"GGUF"
_MOST_TENSORS = 1 << 20
_MOST_METADATA = 1 << 16
_MOST_DIMS = 4
_MOST_NESTING = 2
_NUMBERS = {
    0: "<B",
    1: "<b",
    2: "<H",
    3: "<h",
    4: "<I",
    5: "<i",
    6: "<f",
    7: "<?",
    10: "<Q",
    11: "<q",
    12: "<d",
}
_STRING, _ARRAY = 8, 9


@dataclass(frozen=True)
class GgufTensor:
    """`shape` as torch has it, slowest dimension first; bytes begin..end of the file."""

    name: str
    kind: str
    shape: tuple[int, ...]
    begin: int
    end: int


class GgufFile:
    """One mapped file. `metadata` and `tensors` by name.

    Raises:
        LoadError: not a GGUF file, or its numbers do not add up.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            with path.open("rb") as file:
                self._data = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        except (OSError, ValueError) as error:
            raise LoadError(f"{path} cannot be read: {error}") from error
        reader = _Reader(path, self._data)
        self.metadata, self.tensors = _parse(reader)

    def bytes_of(self, tensor: GgufTensor) -> np.ndarray:
        """uint8 [bytes], a view of the file."""
        count = tensor.end - tensor.begin
        return np.frombuffer(self._data, dtype=np.uint8, count=count, offset=tensor.begin)

    def values(self, tensor: GgufTensor) -> np.ndarray:
        """fp32 [shape], dequantized; a view for F32."""
        flat = BLOCKS[tensor.kind].values(self.bytes_of(tensor))
        return flat.reshape(tensor.shape)

    def __iter__(self) -> Iterator[GgufTensor]:
        return iter(self.tensors.values())


class _Reader:
    """Takes values from the front of a file; never reads past its end."""

    def __init__(self, path: Path, data: mmap.mmap) -> None:
        self.path, self.data, self.at = path, data, 0

    def fail(self, why: str) -> LoadError:
        return LoadError(f"{self.path} is not a sound GGUF file: {why}")

    def take(self, size: int) -> bytes:
        if size < 0 or size > len(self.data) - self.at:
            raise self.fail(f"{size} bytes wanted at {self.at} of {len(self.data)}")
        self.at += size
        return self.data[self.at - size : self.at]

    def number(self, format: str) -> Any:
        return struct.unpack(format, self.take(struct.calcsize(format)))[0]

    def text(self) -> str:
        raw = self.take(self.number("<Q"))
        try:
            return raw.decode("utf-8")
        except UnicodeDecodeError as error:
            raise self.fail(f"a string before {self.at} is not UTF-8") from error

    def value(self, kind: int, depth: int = 0) -> Any:
        if kind in _NUMBERS:
            return self.number(_NUMBERS[kind])
        if kind == _STRING:
            return self.text()
        if kind != _ARRAY or depth >= _MOST_NESTING:
            raise self.fail(f"metadata of type {kind}")
        inner, count = self.number("<I"), self.number("<Q")
        if inner in _NUMBERS:
            raw = self.take(count * struct.calcsize(_NUMBERS[inner]))
            return np.frombuffer(raw, dtype=_NUMBERS[inner].replace("<?", "?")).tolist()
        if count > len(self.data) - self.at:  # an element has a byte at least
            raise self.fail(f"an array of {count} elements")
        return [self.value(inner, depth + 1) for _ in range(count)]


def _parse(reader: _Reader) -> tuple[dict[str, Any], dict[str, GgufTensor]]:
    if reader.take(4) != _MAGIC:
        raise reader.fail("it does not begin with GGUF")
    version = reader.number("<I")
    if version not in (2, 3):
        raise reader.fail(f"version {version}; 2 and 3 are known")
    tensors, metadata = reader.number("<Q"), reader.number("<Q")
    if tensors > _MOST_TENSORS or metadata > _MOST_METADATA:
        raise reader.fail(f"{tensors} tensors and {metadata} metadata")
    found: dict[str, Any] = {}
    for _ in range(metadata):
        key = reader.text()
        if key in found:
            raise reader.fail(f"{key} is there twice")
        found[key] = reader.value(reader.number("<I"))
    entries = [_entry(reader) for _ in range(tensors)]
    return found, _place(reader, found, entries)


def _entry(reader: _Reader) -> tuple[str, tuple[int, ...], int, int]:
    name, dims = reader.text(), reader.number("<I")
    if not 1 <= dims <= _MOST_DIMS:
        raise reader.fail(f"tensor {name} has {dims} dimensions")
    shape = tuple(reader.number("<Q") for _ in range(dims))
    return name, shape[::-1], reader.number("<I"), reader.number("<Q")


def _place(
    reader: _Reader, metadata: dict[str, Any], entries: list[tuple[str, tuple[int, ...], int, int]]
) -> dict[str, GgufTensor]:
    """Where the tensors are; they may neither overlap nor reach past the end."""
    alignment = metadata.get("general.alignment", 32)
    if not isinstance(alignment, int) or not 1 <= alignment <= 1 << 16:
        raise reader.fail(f"general.alignment is {alignment!r}")
    begin = -(-reader.at // alignment) * alignment
    kinds = {block.code: name for name, block in BLOCKS.items()}
    found: dict[str, GgufTensor] = {}
    for name, shape, code, offset in entries:
        if code not in kinds:
            raise reader.fail(f"tensor {name} has type {code}; known: {', '.join(BLOCKS)}")
        size = BLOCKS[kinds[code]].bytes_of(shape)
        if size is None or offset % alignment or begin + offset + size > len(reader.data):
            raise reader.fail(f"tensor {name} with shape {shape} does not fit at {offset}")
        if name in found:
            raise reader.fail(f"tensor {name} is there twice")
        place = begin + offset
        found[name] = GgufTensor(name, kinds[code], shape, place, place + size)
    _check_overlap(reader, found)
    return found


def _check_overlap(reader: _Reader, tensors: dict[str, GgufTensor]) -> None:
    end, last = 0, ""
    for tensor in sorted(tensors.values(), key=lambda t: t.begin):
        if tensor.begin < end and tensor.end > tensor.begin:
            raise reader.fail(f"tensors {last} and {tensor.name} overlap")
        end, last = max(end, tensor.end), tensor.name
