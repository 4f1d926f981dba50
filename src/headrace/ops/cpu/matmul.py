"""linear_packed, gated_packed and logits_packed: bindings of csrc/kernels/linear*.cpp."""

from collections.abc import Sequence
from ctypes import Structure, c_float, c_int32, c_void_p

import torch
from torch import Tensor

from headrace.ops.cpu.elementwise import activation_args, gated
from headrace.ops.cpu.library import DTYPES, Operator, Rows, Step, rows
from headrace.ops.cpu.packing import Weight, kernel_of, mirror
from headrace.ops.cpu.record import empty
from headrace.ops.experts import ClampedSwiglu
from headrace.ops.packed import FLOAT_FORMATS, PackedWeight

_TOKENS, _PICKED = range(2)  # hr_over
PANEL = 32  # HR_PANEL


class _LinearArgs(Structure):
    _fields_ = (
        ("x", Rows),
        ("y", Rows),
        ("weight", Weight),
        ("bias", c_void_p),
        ("bias_dtype", c_int32),
        ("over", c_int32),
        ("residual", Rows),
    )


class _GatedLinearArgs(Structure):
    _fields_ = (
        ("x", Rows),
        ("y", Rows),
        ("gate", Weight),
        ("up", Weight),
        ("bias", c_void_p),
        ("bias_dtype", c_int32),
        ("activation", c_int32),
        ("alpha", c_float),
        ("limit", c_float),
    )


_LINEAR = Operator("linear", _LinearArgs)
_LOWBIT = {name: Operator(f"linear_{name}", _LinearArgs) for name in ("int8", "int4", "fp8")}
_GATED_LINEAR = Operator("gated_linear", _GatedLinearArgs)


def linear_packed(
    x: Tensor, weight: PackedWeight, bias: Tensor | None, residual: Tensor | None = None
) -> Tensor:
    y = empty((len(x), weight.out_size), x.dtype)
    return _multiply(x, weight, bias, y, _TOKENS, residual)


def linear_parts(x: Tensor, weights: Sequence[PackedWeight], bias: Tensor | None) -> Tensor:
    sizes = [weight.out_size for weight in weights]
    biases = [None] * len(sizes) if bias is None else torch.split(bias, sizes)
    whole = empty((len(x), sum(sizes)), x.dtype)
    for weight, b, y in zip(weights, biases, torch.split(whole, sizes, dim=1), strict=True):
        _multiply(x, weight, b, y, _TOKENS)
    return whole


def logits_packed(hidden: Tensor, weight: PackedWeight, bias: Tensor | None = None) -> Tensor:
    y = empty((len(hidden), weight.out_size), torch.float32)
    return _multiply(hidden, weight, bias, y, _PICKED)


def gated_packed(
    x: Tensor, weight: PackedWeight, activation: str | ClampedSwiglu, bias: Tensor | None
) -> Tensor:
    """In one call where gate and up begin at a panel, else in two: the bits are the same."""
    inner = weight.out_size // 2
    if inner % PANEL or weight.format not in FLOAT_FORMATS:
        return gated(linear_packed(x, weight, bias), activation)
    _check(x, weight)
    y = empty((len(x), inner), x.dtype)
    gate, up = mirror(weight), mirror(weight)
    gate.out_size = up.out_size = inner
    up.data += weight.data.nbytes // 2
    args = _GatedLinearArgs(rows(x), rows(y), gate, up, *_bias(bias), *activation_args(activation))
    _GATED_LINEAR(args, Step(tokens=len(x)))
    return y


def _multiply(
    x: Tensor,
    weight: PackedWeight,
    bias: Tensor | None,
    y: Tensor,
    over: int,
    residual: Tensor | None = None,
) -> Tensor:
    _check(x, weight)
    args = _LinearArgs(rows(x), rows(y), mirror(weight), *_bias(bias), over)
    if residual is not None:
        if residual.shape != y.shape or residual.dtype != y.dtype:
            raise ValueError(f"a residual must be {y.dtype} {tuple(y.shape)}, as the product")
        args.residual = rows(residual)
    operator = _LOWBIT.get(kernel_of(weight.format, weight.group), _LINEAR)
    operator(args, Step(tokens=len(x), picked=len(x)))
    return y


def _check(x: Tensor, weight: PackedWeight) -> None:
    if x.shape[1] != weight.in_size:
        raise ValueError(f"x has {x.shape[1]} columns, the weight {weight.in_size} inputs")


def _bias(bias: Tensor | None) -> tuple[int | None, int]:
    return (None, 0) if bias is None else (bias.data_ptr(), DTYPES[bias.dtype])
