"""Bindings of csrc/kernels/elementwise.cpp: embeddings, gather, activations, combinations."""

from ctypes import Structure, c_float, c_int32, c_int64, c_void_p

from torch import Tensor

from headrace.ops.cpu.library import DTYPES, Operator, Rows, Step, rows
from headrace.ops.cpu.record import empty
from headrace.ops.experts import ClampedSwiglu

ACTIVATIONS = {"silu": 0, "gelu_tanh": 1, "gelu_erf": 2, "relu": 3, "relu_squared": 4}
"""hr_activation of the names that `ops.gated_packed` takes."""
_CLAMPED = 5


def activation_args(activation: str | ClampedSwiglu) -> tuple[int, float, float]:
    """`activation`, `alpha` and `limit` as structs have them, one after another."""
    if isinstance(activation, ClampedSwiglu):
        return _CLAMPED, activation.alpha, activation.limit
    return ACTIVATIONS[activation], 0.0, 0.0


class _EmbeddingArgs(Structure):
    _fields_ = (
        ("weight", c_void_p),
        ("y", Rows),
        ("dtype", c_int32),
        ("by_position", c_int32),
        ("first", c_int64),
    )


class _CombineArgs(Structure):
    _fields_ = (
        ("x", Rows),
        ("z", Rows),
        ("gate", Rows),
        ("y", Rows),
        ("a", c_float),
        ("b", c_float),
        ("cap", c_float),
        ("limit", c_float),
    )


class _GatherArgs(Structure):
    _fields_ = (("x", Rows), ("y", Rows))


class _GatedArgs(Structure):
    _fields_ = (
        ("x", Rows),
        ("y", Rows),
        ("activation", c_int32),
        ("alpha", c_float),
        ("limit", c_float),
    )


class _ColumnsArgs(Structure):
    _fields_ = (("x", Rows), ("y", Rows), ("order", c_void_p))


_EMBEDDING = Operator("embedding", _EmbeddingArgs)
_COMBINE = Operator("combine", _CombineArgs)
_GATHER = Operator("gather", _GatherArgs)
_GATED = Operator("gated", _GatedArgs)
_COLUMNS = Operator("columns", _ColumnsArgs)


def embedding(ids: Tensor, weight: Tensor) -> Tensor:
    y = empty((len(ids), weight.shape[1]), weight.dtype)
    args = _EmbeddingArgs(weight.data_ptr(), rows(y), DTYPES[weight.dtype])
    _EMBEDDING(args, Step(tokens=len(ids), ids=ids.data_ptr()))
    return y


def position_embedding(positions: Tensor, weight: Tensor, first: int) -> Tensor:
    y = empty((len(positions), weight.shape[1]), weight.dtype)
    args = _EmbeddingArgs(weight.data_ptr(), rows(y), DTYPES[weight.dtype], 1, first)
    _EMBEDDING(args, Step(tokens=len(positions), positions=positions.data_ptr()))
    return y


def combine(
    x: Tensor,
    z: Tensor | None,
    a: float,
    b: float,
    soft_cap: float,
    limit: float,
    gate: Tensor | None = None,
) -> Tensor:
    y = empty(tuple(x.shape), x.dtype)
    args = _CombineArgs(x=rows(x), y=rows(y), a=a, b=b, cap=soft_cap, limit=limit)
    if z is not None:
        args.z = rows(z)
    if gate is not None:
        args.gate = rows(gate)
    _COMBINE(args, Step(tokens=len(x)))
    return y


def gather(x: Tensor, picks: Tensor) -> Tensor:
    y = empty((len(picks), x.shape[1]), x.dtype)
    _GATHER(_GatherArgs(rows(x), rows(y)), Step(tokens=len(picks), picks=picks.data_ptr()))
    return y


def columns(x: Tensor, order: Tensor) -> Tensor:
    y = empty((len(x), len(order)), x.dtype)
    _COLUMNS(_ColumnsArgs(rows(x), rows(y), order.data_ptr()), Step(tokens=len(x)))
    return y


def gated(x: Tensor, activation: str | ClampedSwiglu) -> Tensor:
    y = empty((len(x), x.shape[1] // 2), x.dtype)
    _GATED(_GatedArgs(rows(x), rows(y), *activation_args(activation)), Step(tokens=len(x)))
    return y


def activate(x: Tensor, activation: str) -> Tensor:
    y = empty(tuple(x.shape), x.dtype)
    _GATED(_GatedArgs(rows(x), rows(y), ACTIVATIONS[activation]), Step(tokens=len(x)))
    return y
