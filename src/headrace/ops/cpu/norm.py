"""rms_norm, layer_norm: bindings of csrc/kernels/norm.cpp."""

from ctypes import Structure, c_float, c_int32, c_int64, c_void_p

from torch import Tensor

from headrace.ops.cpu.library import DTYPES, Operator, Rows, Step, rows
from headrace.ops.cpu.record import empty


class _RmsNormArgs(Structure):
    _fields_ = (
        ("x", Rows),
        ("residual", Rows),
        ("total", Rows),
        ("y", Rows),
        ("weight", c_void_p),
        ("weight_dtype", c_int32),
        ("eps", c_float),
        ("parts", c_int64),
    )


class _LayerNormArgs(Structure):
    _fields_ = (
        ("x", Rows),
        ("y", Rows),
        ("parts", c_int64),
        ("weights", c_int64),
        ("weight", c_void_p),
        ("bias", c_void_p),
        ("weight_dtype", c_int32),
        ("eps", c_float),
    )


_RMS_NORM = Operator("rms_norm", _RmsNormArgs)
_LAYER_NORM = Operator("layer_norm", _LayerNormArgs)


def rms_norm(
    x: Tensor, weight: Tensor, eps: float, residual: Tensor | None
) -> tuple[Tensor, Tensor]:
    y = empty(tuple(x.shape), x.dtype)
    args = _RmsNormArgs(
        x=_flat(x),
        y=_flat(y),
        weight=weight.data_ptr(),
        weight_dtype=DTYPES[weight.dtype],
        eps=eps,
        parts=x[0].numel() // x.shape[-1] if len(x) else 1,
    )
    total = x
    if residual is not None:
        total = empty(tuple(x.shape), x.dtype)
        args.residual, args.total = _flat(residual), _flat(total)
    _RMS_NORM(args, Step(tokens=len(x)))
    return y, total


def rms_norm_into(x: Tensor, weight: Tensor, eps: float) -> None:
    """x [tokens, dim], which may be part of wider rows, normalized in place."""
    view = _flat(x)
    args = _RmsNormArgs(
        x=view,
        y=view,
        weight=weight.data_ptr(),
        weight_dtype=DTYPES[weight.dtype],
        eps=eps,
        parts=1,
    )
    _RMS_NORM(args, Step(tokens=len(x)))


def layer_norm(x: Tensor, weight: Tensor, bias: Tensor | None, eps: float) -> Tensor:
    y = empty(tuple(x.shape), x.dtype)
    args = _LayerNormArgs(
        x=_flat(x),
        y=_flat(y),
        parts=x[0].numel() // x.shape[-1] if len(x) else 1,
        weights=weight.numel() // x.shape[-1],
        weight=weight.data_ptr(),
        bias=None if bias is None else bias.data_ptr(),
        weight_dtype=DTYPES[weight.dtype],
        eps=eps,
    )
    _LAYER_NORM(args, Step(tokens=len(x)))
    return y


def _flat(x: Tensor) -> Rows:
    """[tokens, ...] whose elements of a token are adjacent, as rows."""
    return rows(x if x.dim() == 2 else x.view(len(x), -1))
