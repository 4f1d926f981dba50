"""embedding, gather, silu_mul, gelu_mul, activate: bindings of csrc/kernels/elementwise.cpp."""

from ctypes import Structure, c_int32, c_void_p

from torch import Tensor

from headrace.ops.cpu.library import DTYPES, Operator, Rows, Step, rows
from headrace.ops.cpu.record import empty

ACTIVATIONS = {"silu": 0, "gelu_tanh": 1, "gelu_erf": 2}
"""hr_activation of the names that `ops.gated_packed` takes."""


class _EmbeddingArgs(Structure):
    _fields_ = (("weight", c_void_p), ("y", Rows), ("dtype", c_int32))


class _GatherArgs(Structure):
    _fields_ = (("x", Rows), ("y", Rows))


class _GatedArgs(Structure):
    _fields_ = (("x", Rows), ("y", Rows), ("activation", c_int32))


_EMBEDDING = Operator("embedding", _EmbeddingArgs)
_GATHER = Operator("gather", _GatherArgs)
_GATED = Operator("gated", _GatedArgs)


def embedding(ids: Tensor, weight: Tensor) -> Tensor:
    y = empty((len(ids), weight.shape[1]), weight.dtype)
    args = _EmbeddingArgs(weight.data_ptr(), rows(y), DTYPES[weight.dtype])
    _EMBEDDING(args, Step(tokens=len(ids), ids=ids.data_ptr()))
    return y


def gather(x: Tensor, picks: Tensor) -> Tensor:
    y = empty((len(picks), x.shape[1]), x.dtype)
    _GATHER(_GatherArgs(rows(x), rows(y)), Step(tokens=len(picks), picks=picks.data_ptr()))
    return y


def silu_mul(x: Tensor) -> Tensor:
    return _gated(x, "silu")


def gelu_mul(x: Tensor, tanh: bool) -> Tensor:
    return _gated(x, "gelu_tanh" if tanh else "gelu_erf")


def activate(x: Tensor, activation: str) -> Tensor:
    y = empty(tuple(x.shape), x.dtype)
    _GATED(_GatedArgs(rows(x), rows(y), ACTIVATIONS[activation]), Step(tokens=len(x)))
    return y


def _gated(x: Tensor, activation: str) -> Tensor:
    y = empty((len(x), x.shape[1] // 2), x.dtype)
    _GATED(_GatedArgs(rows(x), rows(y), ACTIVATIONS[activation]), Step(tokens=len(x)))
    return y
