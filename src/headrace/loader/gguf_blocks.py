"""The block formats of GGUF, from bytes to numbers: numpy, whole tensors at once.

A format stores `size` values in `bytes` bytes, in the layouts of ggml's block structs; k-quants
pack a super-block of 256 values with scales of scales. All but floats are integers (or places in a
table) with a scale, and sometimes a minimum, for each of `groups`. Knows no files.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]


@dataclass(frozen=True)
class Parts:
    """An element is value * scale - minimum.

    `values` [n, size], with a `table` places in it; fp32 `scales` and `mins` [n, groups]; `bits`
    that the values need, a sign included.
    """

    values: Array
    scales: Array
    bits: int
    mins: Array | None = None
    table: str = ""

    def numbers(self) -> Array:
        """fp32 [n, size]"""
        values = TABLES[self.table][self.values] if self.table else self.values
        found = _by_group(self.scales, values.astype(np.float32))
        if self.mins is None:
            return found
        wide: Array = np.repeat(self.mins, values.shape[1] // self.mins.shape[1], axis=1)
        return found - wide


@dataclass(frozen=True)
class Block:
    """`code`: the type's number in a file. `read`: uint8 [n, bytes] -> fp32 [n, size] of floats,
    else parts."""

    code: int
    size: int
    bytes: int
    read: Callable[[Array], "Array | Parts"]

    def bytes_of(self, shape: tuple[int, ...]) -> int | None:
        """Bytes of a tensor; None if its rows are not whole blocks."""
        if shape[-1] % self.size:
            return None
        return math.prod(shape) // self.size * self.bytes

    def values(self, raw: Array) -> Array:
        """fp32 [values] of a tensor's bytes."""
        found = self.read(raw.reshape(-1, self.bytes))
        return (found.numbers() if isinstance(found, Parts) else found).reshape(-1)

    def parts(self, raw: Array) -> Parts:
        """Those of a tensor's bytes, which are no floats."""
        found = self.read(raw.reshape(-1, self.bytes))
        assert isinstance(found, Parts)
        return found


def _f16(raw: Array) -> Array:
    """uint8 [n, 2k] -> fp32 [n, k]."""
    return np.ascontiguousarray(raw).view("<f2").astype(np.float32)


def _f32(raw: Array) -> Array:
    return raw.view("<f4").astype(np.float32, copy=False)


def _bf16(raw: Array) -> Array:
    return (np.ascontiguousarray(raw).view("<u2").astype(np.uint32) << 16).view(np.float32)


def _halves(raw: Array) -> Array:
    """The low halves of all bytes, then the high ones."""
    return np.concatenate([raw & 15, raw >> 4], axis=1)


def _fifth_bits(raw: Array) -> Array:
    """uint8 [n, 4] -> 32 bits as 0 or 16, [n, 32]."""
    return np.unpackbits(raw, axis=1, bitorder="little") * np.uint8(16)


def _signed(values: Array, zero: int) -> Array:
    return values.astype(np.int8) - np.int8(zero)


def _q4_0(raw: Array) -> Parts:
    return Parts(_signed(_halves(raw[:, 2:]), 8), _f16(raw[:, :2]), 4)


def _q4_1(raw: Array) -> Parts:
    return Parts(_halves(raw[:, 4:]), _f16(raw[:, :2]), 4, -_f16(raw[:, 2:4]))


def _q5_0(raw: Array) -> Parts:
    values = _halves(raw[:, 6:]) | _fifth_bits(raw[:, 2:6])
    return Parts(_signed(values, 16), _f16(raw[:, :2]), 8)


def _q5_1(raw: Array) -> Parts:
    values = _halves(raw[:, 8:]) | _fifth_bits(raw[:, 4:8])
    return Parts(values, _f16(raw[:, :2]), 8, -_f16(raw[:, 2:4]))


def _q8_0(raw: Array) -> Parts:
    return Parts(np.ascontiguousarray(raw[:, 2:]).view(np.int8), _f16(raw[:, :2]), 8)


def _two_bits(raw: Array) -> Array:
    """[n, 64] -> [n, 256]: each half of 32 bytes holds four runs of 32 values."""
    groups = raw.reshape(len(raw), 2, 1, 32) >> np.array([0, 2, 4, 6], np.uint8)[:, None] & 3
    return groups.reshape(len(raw), 256)


def _q2_k(raw: Array) -> Parts:
    packed, values = raw[:, :16], _two_bits(raw[:, 16:80])
    scale, least = _f16(raw[:, 80:82]), _f16(raw[:, 82:84])
    return Parts(values, scale * (packed & 15), 4, least * (packed >> 4))


def _by_group(scales: Array, values: Array) -> Array:
    return np.repeat(scales, values.shape[1] // scales.shape[1], axis=1) * values


def _q3_k(raw: Array) -> Parts:
    high: Array = np.unpackbits(raw[:, :32], axis=1, bitorder="little").reshape(-1, 32, 8)
    high = high.transpose(0, 2, 1).reshape(-1, 256)  # bit b of byte i: value 32 b + i
    values = _signed(_two_bits(raw[:, 32:96]) | high << 2, 4)
    packed = raw[:, 96:108]
    low = np.concatenate([packed[:, :8] & 15, packed[:, :8] >> 4], axis=1)
    two = packed[:, None, 8:] >> np.array([0, 2, 4, 6], np.uint8)[:, None] & 3
    scales = (low | two.reshape(len(raw), 16) << 4).astype(np.float32) - 32
    return Parts(values, _f16(raw[:, 108:110]) * scales, 4)


def _six_bits(packed: Array) -> tuple[Array, Array]:
    """[n, 12] -> scales and minima, [n, 8] each, of 6 bits."""
    a, b, c = packed[:, :4], packed[:, 4:8], packed[:, 8:]
    scales = np.concatenate([a & 63, (c & 15) | (a >> 6) << 4], axis=1)
    mins = np.concatenate([b & 63, (c >> 4) | (b >> 6) << 4], axis=1)
    return scales.astype(np.float32), mins.astype(np.float32)


def _nibble_runs(raw: Array) -> Array:
    """[n, 128] -> [n, 256]: each 32 bytes hold 32 low halves, then 32 high ones."""
    parts = raw.reshape(len(raw), 4, 1, 32) >> np.array([0, 4], np.uint8)[:, None] & 15
    return parts.reshape(len(raw), 256)


def _q4_k(raw: Array) -> Parts:
    scale, least = _f16(raw[:, :2]), _f16(raw[:, 2:4])
    scales, mins = _six_bits(raw[:, 4:16])
    return Parts(_nibble_runs(raw[:, 16:]), scale * scales, 4, least * mins)


def _q5_k(raw: Array) -> Parts:
    scale, least = _f16(raw[:, :2]), _f16(raw[:, 2:4])
    scales, mins = _six_bits(raw[:, 4:16])
    high: Array = np.unpackbits(raw[:, 16:48], axis=1, bitorder="little").reshape(-1, 32, 8)
    high = high.transpose(0, 2, 1).reshape(-1, 256)
    return Parts(_nibble_runs(raw[:, 48:]) | high << 4, scale * scales, 8, least * mins)


def _q6_k(raw: Array) -> Parts:
    low = raw[:, :128].reshape(-1, 2, 1, 64) >> np.array([0, 4], np.uint8)[:, None] & 15
    high = raw[:, 128:192].reshape(-1, 2, 1, 32) >> np.array([0, 2, 4, 6], np.uint8)[:, None] & 3
    values = low.reshape(-1, 256) | high.reshape(-1, 256) << 4
    scales = np.ascontiguousarray(raw[:, 192:208]).view(np.int8).astype(np.float32)
    return Parts(_signed(values, 32), _f16(raw[:, 208:]) * scales, 8)


TABLES: dict[str, Array] = {
    "iq4_nl": np.array(
        [-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113], np.float32
    ),
    # e2m1, times two
    "mxfp4": np.array([0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12], np.float32),
}


def _iq4_nl(raw: Array) -> Parts:
    return Parts(_halves(raw[:, 2:]), _f16(raw[:, :2]), 4, table="iq4_nl")


def _mxfp4(raw: Array) -> Parts:
    """OCP microscaling: e2m1 values (here times two) with a power of two for each 32."""
    scale = np.ldexp(np.float32(0.5), raw[:, :1].astype(np.int32) - 127)
    return Parts(_halves(raw[:, 1:]), scale.astype(np.float32), 4, table="mxfp4")


BLOCKS = {
    "F32": Block(0, 1, 4, _f32),
    "F16": Block(1, 1, 2, _f16),
    "Q4_0": Block(2, 32, 18, _q4_0),
    "Q4_1": Block(3, 32, 20, _q4_1),
    "Q5_0": Block(6, 32, 22, _q5_0),
    "Q5_1": Block(7, 32, 24, _q5_1),
    "Q8_0": Block(8, 32, 34, _q8_0),
    "Q2_K": Block(10, 256, 84, _q2_k),
    "Q3_K": Block(11, 256, 110, _q3_k),
    "Q4_K": Block(12, 256, 144, _q4_k),
    "Q5_K": Block(13, 256, 176, _q5_k),
    "Q6_K": Block(14, 256, 210, _q6_k),
    "IQ4_NL": Block(20, 32, 18, _iq4_nl),
    "BF16": Block(30, 1, 2, _bf16),
    "MXFP4": Block(39, 32, 17, _mxfp4),
}
