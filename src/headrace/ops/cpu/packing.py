"""pack and embedding_packed: weights in panels (csrc/kernels/linear_*.cpp).

Panels lie side by side on huge pages, where the system grants them: a decode step reads every byte
of every weight once.
"""

import ctypes
import math
import mmap
import threading
from ctypes import Structure, c_int32, c_int64, c_void_p

import torch
import torch.nn.functional as F
from torch import Tensor

from headrace.ops import ref_lowbit
from headrace.ops.cpu.library import DTYPES, Operator, Rows, Step, native, rows
from headrace.ops.cpu.record import empty
from headrace.ops.packed import (
    FLOAT_FORMATS,
    TABLES,
    PackedWeight,
    Quantized,
    check_group,
    check_quantized,
    format_of,
)

_HUGE_PAGE = 2 << 20
_SLAB = 32 << 20
_BLOCK = 1 << 18  # elements looked at together
_PANEL = 32  # HR_PANEL
_DTYPES = {name: DTYPES[dtype] for name, dtype in FLOAT_FORMATS.items()} | {
    "int8": 3,
    "fp8": 4,
    "int4": 5,
    "mxfp4": 7,
    **dict.fromkeys(TABLES, 8),
}
_GROUPED_INT8 = 6
_MOST_VALUES = 1 << 40  # a matrix of a terabyte has lied
_SYMMETRIC, _ZEROS, _OFFSETS, _WIDE = range(4)  # hr_scaling
_MOST_SCALINGS = 3


class Weight(Structure):
    """hr_weight"""

    _fields_ = (
        ("data", c_void_p),
        ("scales", c_void_p),
        ("out_size", c_int64),
        ("in_size", c_int64),
        ("dtype", c_int32),
        ("group", c_int32),
        ("scaling", c_int32),
    )


class _PackArgs(Structure):
    _fields_ = (("source", Rows), ("weight", Weight))


class _PackLowbitArgs(Structure):
    _fields_ = (("source", Rows), ("weight", Weight), ("scales", c_void_p), ("offsets", c_void_p))


class _UnpackArgs(Structure):
    _fields_ = (("weight", Weight), ("y", Rows), ("first", c_int64))


_PACK = Operator("pack", _PackArgs)
_UNPACK = Operator("unpack", _UnpackArgs)
_PACK_LOWBIT = {name: Operator(f"pack_{name}", _PackLowbitArgs) for name in ("int8", "int4", "fp8")}
_UNPACK_LOWBIT = {name: Operator(f"unpack_{name}", _UnpackArgs) for name in ("int8", "int4", "fp8")}


def kernel_of(format: str, group: int) -> str:
    """Whose operators take a low-bit format."""
    if format in TABLES:
        return "fp8"
    return "int4" if format == "mxfp4" or (format == "int8" and group) else format


def _dtype(format: str, group: int) -> int:
    return _GROUPED_INT8 if format == "int8" and group else _DTYPES[format]


def mirror(weight: PackedWeight) -> Weight:
    """The struct that kernels take; `weight` must outlive its use."""
    scales = None if weight.scales is None else weight.scales.data_ptr()
    return Weight(
        weight.data.data_ptr(),
        scales,
        weight.out_size,
        weight.in_size,
        _dtype(weight.format, weight.group),
        weight.group,
        weight.variant,
    )


def stored_dtype(source: torch.dtype, dtype: torch.dtype) -> torch.dtype:
    exact = dtype == torch.float32 and source in (torch.bfloat16, torch.float16)
    return source if exact else dtype


def pack(weight: Tensor, format: str = "", group: int = 0) -> PackedWeight:
    """fp32 values that were bf16 are kept as bf16: half the bytes, bitwise the same products."""
    if format not in ("", format_of(weight)):
        return _quantize(weight, format, group)
    if weight.dtype == torch.float32 and _was_bf16(weight):
        weight = weight.bfloat16()
    packed, weight = _new(tuple(weight.shape), format_of(weight)), weight.contiguous()
    _PACK(_PackArgs(rows(weight), mirror(packed)), Step())
    return packed


def open_packed(shape: tuple[int, int], dtype: torch.dtype) -> PackedWeight:
    return _new(shape, str(dtype).removeprefix("torch."))


def pack_rows(weight: PackedWeight, first: int, values: Tensor) -> None:
    part = mirror(weight)
    per_panel = weight.data.nbytes // -(-weight.out_size // _PANEL)
    part.data += first // _PANEL * per_panel
    part.out_size = len(values)
    _PACK(_PackArgs(rows(values), part), Step())


def pack_quantized(
    values: Tensor, scales: Tensor, format: str, group: int = 0, offsets: Tensor | None = None
) -> PackedWeight:
    return _lay_out(check_quantized(values, scales, format, group, offsets))


def embedding_packed(
    ids: Tensor, weight: PackedWeight, dtype: torch.dtype, first: int = 0
) -> Tensor:
    y = empty((len(ids), weight.in_size), dtype)
    args = _UnpackArgs(mirror(weight), rows(y), first)
    unpack = _UNPACK_LOWBIT.get(kernel_of(weight.format, weight.group), _UNPACK)
    unpack(args, Step(tokens=len(ids), ids=ids.data_ptr()))
    return y


def check_packed(weight: PackedWeight) -> None:
    """Raises ValueError where a kernel would read past the end of what `weight` has."""
    sizes = weight.out_size, weight.in_size
    if math.prod(sizes) > _MOST_VALUES or not 0 <= weight.variant <= _MOST_SCALINGS:
        raise ValueError(f"a matrix {list(sizes)} of variant {weight.variant}")
    check_group(weight.format, weight.group, weight.in_size)
    # Memory that nobody touches costs nothing.
    right = _new(sizes, weight.format, weight.group, weight.variant)
    if weight.data.nbytes < right.data.nbytes or not weight.data.is_contiguous():
        raise ValueError(f"it has {weight.data.nbytes} bytes, not {right.data.nbytes}")
    for found, wanted in ((weight.scales, right.scales), (weight.offsets, right.offsets)):
        shapes = [None if t is None else (tuple(t.shape), t.dtype) for t in (found, wanted)]
        if shapes[0] != shapes[1]:
            raise ValueError(f"its scales are {shapes[0]}, not {shapes[1]}")


def _new(shape: tuple[int, ...], format: str, group: int = 0, variant: int = 0) -> PackedWeight:
    """Memory for a weight [out, in] and, where kernels want them apart, for its scales."""
    out_size, in_size = shape
    asked = Weight(None, None, out_size, in_size, _dtype(format, group), group, variant)
    data = reserve(native().hr_weight_bytes(ctypes.byref(asked)))
    scales = None
    if kernel_of(format, group) in ("int8", "fp8"):
        groups = -(-in_size // group) if group else 1
        scales = torch.zeros(groups, -(-out_size // _PANEL) * _PANEL)
    return PackedWeight(data, out_size, in_size, format, scales, group, None, variant)


def _quantize(weight: Tensor, format: str, group: int) -> PackedWeight:
    if format not in ("int8", "int4") or (format == "int8" and group):
        return _lay_out(ref_lowbit.quantize(weight, format, group))
    if format == "int4":
        group = group or ref_lowbit.DEFAULT_GROUP
    check_group(format, group, weight.shape[1])
    packed = _new(tuple(weight.shape), format, group, _SYMMETRIC)
    shape, weight = mirror(packed), weight.contiguous()
    _PACK_LOWBIT[format](_PackLowbitArgs(rows(weight), shape, shape.scales, None), Step())
    return packed


def _lay_out(weight: Quantized) -> PackedWeight:
    kernel = kernel_of(weight.format, weight.group)
    variant = _scaling(weight) if kernel == "int4" and weight.format != "mxfp4" else _SYMMETRIC
    packed = _new(tuple(weight.values.shape), weight.format, weight.group, variant)
    if packed.scales is not None:
        missing = packed.scales.shape[1] - packed.out_size
        packed.scales.copy_(F.pad(weight.scales.T, (0, missing)))
    scales, offsets = weight.scales.contiguous(), TABLES.get(weight.format, weight.offsets)
    if variant in (_ZEROS, _OFFSETS) and offsets is None:
        offsets = 8 * scales
    address = None if offsets is None else offsets.data_ptr()
    source = rows(weight.values.view(torch.int8))
    args = _PackLowbitArgs(source, mirror(packed), scales.data_ptr(), address)
    _PACK_LOWBIT[kernel](args, Step())
    return packed


def _scaling(weight: Quantized) -> int:
    """The smallest form that holds the scales and offsets of integers in groups exactly."""
    scales, offsets = weight.scales, weight.offsets
    middle = 8 if weight.format == "int4" else 0
    symmetric = offsets is None or torch.equal(middle * scales, offsets)
    if not torch.equal(scales.half().float(), scales):
        return _WIDE if symmetric and not middle else _OFFSETS
    if offsets is None or symmetric:
        return _SYMMETRIC
    zeros = torch.where(scales == 0, 0.0, offsets / scales)
    exact = torch.equal(zeros.half().float(), zeros) and torch.equal(zeros * scales, offsets)
    return _ZEROS if exact else _OFFSETS


def _was_bf16(weight: Tensor) -> bool:
    """Whether the low halves of all fp32 values are zero; stops at the first that is not."""
    blocks = torch.split(weight.contiguous().view(torch.int32).view(-1), _BLOCK)
    return not any(bool((block & 0xFFFF).any()) for block in blocks)


class _Slab(threading.local):
    """Memory in which weights lie side by side: alone, each would have both ends on small pages."""

    memory: mmap.mmap | None = None
    used = size = 0


_slab = _Slab()


def reserve(size: int) -> Tensor:
    """uint8 [size]; its slab goes with the last tensor. A page more than asked for, as slack."""
    taken = -(-size // mmap.PAGESIZE) * mmap.PAGESIZE + mmap.PAGESIZE
    if _slab.memory is None or _slab.used + taken > _slab.size:
        _slab.size = max(taken, _SLAB) + _HUGE_PAGE
        _slab.memory = mmap.mmap(-1, _slab.size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        _slab.memory.madvise(mmap.MADV_HUGEPAGE)
        address = torch.frombuffer(_slab.memory, dtype=torch.uint8, count=1).data_ptr()
        _slab.used = -address % _HUGE_PAGE
    memory = torch.frombuffer(_slab.memory, dtype=torch.uint8, count=size, offset=_slab.used)
    _slab.used += taken
    return memory
