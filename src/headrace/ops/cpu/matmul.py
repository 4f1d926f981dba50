"""linear_packed and logits_packed: bindings of csrc/kernels/linear.cpp and linear_*.cpp."""

from ctypes import Structure, c_int32, c_void_p

import torch
from torch import Tensor

from headrace.ops.cpu.library import DTYPES, Operator, Rows, Step, rows
from headrace.ops.cpu.packing import Weight, mirror
from headrace.ops.cpu.record import empty
from headrace.ops.packed import PackedWeight

_TOKENS, _PICKED = range(2)  # hr_over


class _LinearArgs(Structure):
    _fields_ = (
        ("x", Rows),
        ("y", Rows),
        ("weight", Weight),
        ("bias", c_void_p),
        ("bias_dtype", c_int32),
        ("over", c_int32),
    )


_LINEAR = Operator("linear", _LinearArgs)
_LOWBIT = {name: Operator(f"linear_{name}", _LinearArgs) for name in ("int8", "int4", "fp8")}


def linear_packed(x: Tensor, weight: PackedWeight, bias: Tensor | None) -> Tensor:
    return _multiply(x, weight, bias, empty((len(x), weight.out_size), x.dtype), _TOKENS)


def logits_packed(hidden: Tensor, weight: PackedWeight) -> Tensor:
    y = empty((len(hidden), weight.out_size), torch.float32)
    return _multiply(hidden, weight, None, y, _PICKED)


def _multiply(x: Tensor, weight: PackedWeight, bias: Tensor | None, y: Tensor, over: int) -> Tensor:
    if x.shape[1] != weight.in_size:
        raise ValueError(f"x has {x.shape[1]} columns, the weight {weight.in_size} inputs")
    address, kind = (None, 0) if bias is None else (bias.data_ptr(), DTYPES[bias.dtype])
    args = _LinearArgs(rows(x), rows(y), mirror(weight), address, kind, over)
    _LOWBIT.get(weight.format, _LINEAR)(args, Step(tokens=len(x), picked=len(x)))
    return y
