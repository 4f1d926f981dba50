"""Operator calls, run at once or kept as a program that is replayed in one native call per step.

Every operator of this package gets its output tensors from `empty` and ends in the call of an
`Operator`. While `recording` is active on the calling thread nothing runs: calls are appended to
the program, and `empty` hands out parts of one arena, which get their space back when the last view
of a tensor is gone, so that Python's reference counts are the liveness analysis. Argument structs
may therefore point only to weights, caches, inputs that outlive the program, and tensors from
`empty`; what differs between steps comes from the `Step` alone. Between operators a model may only
make views.
"""

import ctypes
import mmap
import threading
import weakref
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from headrace.ops.cpu.library import RECORDER, Operator, Step, native

_ALIGNMENT = 64


class Arena:
    """Memory for activations: reserved at once, touched by the system only where it is used.

    First fit over free ranges. Raises MemoryError when `size` bytes do not suffice.
    """

    def __init__(self, size: int) -> None:
        self._memory = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        self._free = [(0, size)]  # (begin, end), sorted, never touching
        self.peak = 0

    def tensor(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """Undefined values; the space is free again when no tensor shares its storage."""
        values = torch.Size(shape).numel()
        size = max(_ALIGNMENT, -(-values * dtype.itemsize // _ALIGNMENT) * _ALIGNMENT)
        begin = self._take(size)
        # The storage keeps this object alive, so its end is the end of all views.
        block = (ctypes.c_char * size).from_buffer(self._memory, begin)
        weakref.finalize(block, self._give_back, begin, begin + size).atexit = False
        return torch.frombuffer(block, dtype=dtype, count=values).view(shape)

    def _take(self, size: int) -> int:
        for index, (begin, end) in enumerate(self._free):
            if end - begin >= size:
                self._free[index : index + 1] = [(begin + size, end)] if end - begin > size else []
                self.peak = max(self.peak, begin + size)
                return begin
        raise MemoryError(f"the activation arena has no {size} bytes left")

    def _give_back(self, begin: int, end: int) -> None:
        merged: list[tuple[int, int]] = []
        for first, last in sorted([*self._free, (begin, end)]):
            if merged and merged[-1][1] == first:
                merged[-1] = (merged[-1][0], last)
            else:
                merged.append((first, last))
        self._free = merged


class Program:
    """Recorded calls; `replay` runs them on a step."""

    def __init__(self) -> None:
        self._handle = native().hr_program_new()
        self._nanoseconds: ctypes.Array[ctypes.c_int64] | None = None
        weakref.finalize(self, native().hr_program_free, self._handle).atexit = False

    def __len__(self) -> int:
        return int(native().hr_program_length(self._handle))

    def append(self, operator: Operator, args: ctypes.Structure) -> None:
        size = ctypes.sizeof(args)
        native().hr_program_append(self._handle, operator.index, ctypes.byref(args), size)

    def replay(self, step: Step) -> None:
        if self._nanoseconds is None:
            native().hr_replay(self._handle, ctypes.byref(step))
        else:
            native().hr_replay_timed(self._handle, ctypes.byref(step), self._nanoseconds)

    def start_timing(self) -> None:
        """From now on replays add up what each call takes, some 50 ns per call slower."""
        self._nanoseconds = (ctypes.c_int64 * len(self))()

    def take_times(self) -> list[tuple[str, float]]:
        """Ends timing. (operator, seconds of all replays since its start) of each call."""
        taken, self._nanoseconds = self._nanoseconds or (), None
        return [(self._name(call), spent / 1e9) for call, spent in enumerate(taken)]

    def _name(self, call: int) -> str:
        index = native().hr_program_operator(self._handle, call)
        return bytes(native().hr_operator_name(index)).decode()


class _Active(threading.local):
    arena: Arena | None = None


_active = _Active()


@contextmanager
def recording(arena: Arena) -> Iterator[Program]:
    """Operators called on this thread become a program; their outputs come from `arena`."""
    program = Program()
    _active.arena, RECORDER.append = arena, program.append
    try:
        yield program
    finally:
        _active.arena = RECORDER.append = None


def empty(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """An operator's output, values undefined."""
    arena = _active.arena
    return torch.empty(shape, dtype=dtype) if arena is None else arena.tensor(shape, dtype)
