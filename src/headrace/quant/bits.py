"""Integers of few bits as checkpoints pack them into 32-bit words.

Pure functions of tensors; know no checkpoints' names and no layers.
"""

import torch
from torch import Tensor

# AutoAWQ stores column AWQ_ORDER[i] of eight in the i-th four bits of a word.
AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)


def unpack_rows(words: Tensor, bits: int) -> Tensor:
    """int32 [n, columns] -> uint8 [n * 32 / bits, columns]: values lie one after another down a
    column, the first in the lowest bits, also across words (3 bits)."""
    if 8 % bits:
        return _unpack_stream(words, bits)
    return _unpack_octets(words, bits).transpose(1, 2).reshape(-1, words.shape[1])


def unpack_columns(words: Tensor, bits: int) -> Tensor:
    """int32 [rows, n] -> uint8 [rows, n * 32 / bits]: the same along rows."""
    if 8 % bits:
        return _unpack_stream(words.T, bits).T
    return _unpack_octets(words, bits).flatten(1)


def unpack_awq(words: Tensor) -> Tensor:
    """int32 [rows, n] -> uint8 [rows, 8 n] of 4 bits, in AutoAWQ's order of columns."""
    found = unpack_columns(words, 4).view(len(words), -1, 8)
    places = [AWQ_ORDER.index(column) for column in range(8)]
    return found[:, :, places].flatten(1)


def _unpack_octets(words: Tensor, bits: int) -> Tensor:
    """The values of each word, [rows, columns, 32 / bits]."""
    octets = words.contiguous()[..., None].view(torch.uint8)[..., None]
    return (octets >> torch.arange(0, 8, bits) & (1 << bits) - 1).to(torch.uint8).flatten(2)


def _unpack_stream(words: Tensor, bits: int) -> Tensor:
    """Values that may lie across two words."""
    count = words.shape[0] * 32 // bits
    begin = torch.arange(count) * bits
    place, shift = begin // 32, (begin % 32)[:, None]
    wide = words.long() & 0xFFFFFFFF
    wide = torch.cat([wide, torch.zeros_like(wide[:1])])
    both = wide[place] | wide[place + 1] << 32
    return (both >> shift & (1 << bits) - 1).to(torch.uint8)


def not_finite(scales: Tensor) -> str:
    """What is wrong with scales, "" for nothing."""
    finite = bool(torch.isfinite(scales.float()).all())
    return "" if finite else "holds a scale that is no finite number"
