"""Collectives of ranks that share memory: bindings of csrc/kernels/collective.cpp.

Addresses of boards and pipes are those of this process; whoever calls keeps the memory mapped. Does
not know who the ranks are.
"""

from ctypes import Array, Structure, addressof, c_int32, c_int64, c_void_p
from functools import cache

import torch
from torch import Tensor

from headrace.ops.cpu.library import Operator, Rows, Step, rows
from headrace.ops.cpu.record import empty

LINE = 128  # HR_BOARD_LINE
PIPE_BLOCKS = 4  # HR_PIPE_BLOCKS

Spans = tuple[tuple[int, int, int], ...]
"""Of (first column in the whole, first column of the part, count)."""


class Team(Structure):
    """hr_team"""

    _fields_ = (("board", c_void_p), ("slot", c_int64), ("rank", c_int32), ("size", c_int32))


class _Span(Structure):
    _fields_ = (("whole", c_int64), ("part", c_int64), ("count", c_int64))


class _AllReduceArgs(Structure):
    _fields_ = (("x", Rows), ("y", Rows), ("team", Team))


class _AllGatherArgs(Structure):
    _fields_ = (("x", Rows), ("y", Rows), ("team", Team), ("spans", c_void_p), ("count", c_int64))


class _TakePartArgs(Structure):
    _fields_ = (("x", Rows), ("y", Rows), ("spans", c_void_p), ("count", c_int64))


class _PassArgs(Structure):
    _fields_ = (("x", Rows), ("pipe", c_void_p), ("block", c_int64))


_ALL_REDUCE = Operator("all_reduce", _AllReduceArgs)
_ALL_GATHER = Operator("all_gather", _AllGatherArgs)
_TAKE_PART = Operator("take_part", _TakePartArgs)
_SEND = Operator("send", _PassArgs)
_RECEIVE = Operator("receive", _PassArgs)
_ALONE = Team(None, 0, 0, 1)


def all_reduce(x: Tensor, team: Team, dtype: torch.dtype) -> Tensor:
    """The sum of all ranks' x [tokens, columns], in fp32 and rounded once to `dtype`."""
    _check(x, x.shape[1], team.slot, team)
    y = empty(tuple(x.shape), dtype)
    _ALL_REDUCE(_AllReduceArgs(rows(x), rows(y), team), Step(tokens=len(x)))
    return y


def cast(x: Tensor, dtype: torch.dtype) -> Tensor:
    return all_reduce(x, _ALONE, dtype)


def all_gather(x: Tensor, team: Team, spans: Spans, width: int) -> Tensor:
    """The columns of all ranks, [tokens, width]."""
    _check(x, width, team.slot * team.size, team)
    y = empty((len(x), width), x.dtype)
    args = _AllGatherArgs(rows(x), rows(y), team, _address(spans), len(spans))
    _ALL_GATHER(args, Step(tokens=len(x)))
    return y


def take_part(x: Tensor, spans: Spans, width: int) -> Tensor:
    y = empty((len(x), width), x.dtype)
    args = _TakePartArgs(rows(x), rows(y), _address(spans), len(spans))
    _TAKE_PART(args, Step(tokens=len(x)))
    return y


def send(x: Tensor, pipe: int, block: int) -> None:
    """Wait for room in the pipe at this address, and put x [tokens, columns] into it."""
    _SEND(_pass(x, pipe, block), Step(tokens=len(x)))


def receive(shape: tuple[int, int], dtype: torch.dtype, pipe: int, block: int) -> Tensor:
    """What the other end sends next, [tokens, columns]; waits for it."""
    y = empty(shape, dtype)
    _RECEIVE(_pass(y, pipe, block), Step(tokens=shape[0]))
    return y


def _pass(x: Tensor, pipe: int, block: int) -> _PassArgs:
    if x.shape[1] * x.itemsize > block:
        raise ValueError(f"a row of {x.shape[1]} {x.dtype} is longer than a block, {block} bytes")
    return _PassArgs(rows(x), pipe, block)


def _check(x: Tensor, width: int, room: int, team: Team) -> None:
    if team.size > 1 and width * x.itemsize > room:
        raise ValueError(f"a row of {width} {x.dtype} is longer than a slot, {room} bytes")


@cache
def _mirror(spans: Spans) -> "Array[_Span]":
    """Kept for ever: recorded programs point to it."""
    return (_Span * max(1, len(spans)))(*(_Span(*span) for span in spans))


def _address(spans: Spans) -> int:
    return addressof(_mirror(spans))
