"""pack and embedding_packed: weights in panels (csrc/kernels/linear_pack.cpp).

Panels lie in memory of their own, on huge pages where the system grants them: a decode step reads
every byte of every weight once.
"""

import ctypes
import mmap
from ctypes import Structure, c_int32, c_int64, c_void_p

import torch
from torch import Tensor

from headrace.ops.cpu.library import DTYPES, Operator, Rows, Step, native, rows
from headrace.ops.cpu.record import empty
from headrace.ops.packed import FLOAT_FORMATS, PackedWeight, format_of

_HUGE_PAGE = 2 << 20
_BLOCK = 1 << 18  # elements looked at together


class Weight(Structure):
    """hr_weight"""

    _fields_ = (
        ("data", c_void_p),
        ("scales", c_void_p),
        ("out_size", c_int64),
        ("in_size", c_int64),
        ("dtype", c_int32),
        ("group", c_int32),
    )


class _PackArgs(Structure):
    _fields_ = (("source", Rows), ("weight", Weight))


class _UnpackArgs(Structure):
    _fields_ = (("weight", Weight), ("y", Rows))


_PACK = Operator("pack", _PackArgs)
_UNPACK = Operator("unpack", _UnpackArgs)


def mirror(weight: PackedWeight) -> Weight:
    """The struct that kernels take; `weight` must outlive its use."""
    dtype = DTYPES[FLOAT_FORMATS[weight.format]]
    return Weight(weight.data.data_ptr(), None, weight.out_size, weight.in_size, dtype, 0)


def stored_dtype(source: torch.dtype, dtype: torch.dtype) -> torch.dtype:
    exact = dtype == torch.float32 and source in (torch.bfloat16, torch.float16)
    return source if exact else dtype


def pack(weight: Tensor, format: str = "", group: int = 0) -> PackedWeight:
    """fp32 values that were bf16 are kept as bf16: half the bytes, bitwise the same products."""
    if weight.dtype == torch.float32 and _was_bf16(weight):
        weight = weight.bfloat16()
    out_size, in_size = weight.shape
    shape = Weight(None, None, out_size, in_size, DTYPES[weight.dtype], 0)
    size = native().hr_weight_bytes(ctypes.byref(shape))
    packed = PackedWeight(_memory(size), out_size, in_size, format_of(weight))
    _PACK(_PackArgs(rows(weight.contiguous()), mirror(packed)), Step())
    return packed


def embedding_packed(ids: Tensor, weight: PackedWeight, dtype: torch.dtype) -> Tensor:
    y = empty((len(ids), weight.in_size), dtype)
    _UNPACK(_UnpackArgs(mirror(weight), rows(y)), Step(tokens=len(ids), ids=ids.data_ptr()))
    return y


def _was_bf16(weight: Tensor) -> bool:
    """Whether the low halves of all fp32 values are zero; stops at the first that is not."""
    blocks = torch.split(weight.contiguous().view(torch.int32).view(-1), _BLOCK)
    return not any(bool((block & 0xFFFF).any()) for block in blocks)


def _memory(size: int) -> Tensor:
    """uint8 [size]; the mapping goes when the tensor does. A page more than asked for, as slack."""
    memory = mmap.mmap(-1, size + mmap.PAGESIZE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    if size >= _HUGE_PAGE:
        memory.madvise(mmap.MADV_HUGEPAGE)
    return torch.frombuffer(memory, dtype=torch.uint8, count=size)
