"""Loads the native kernels and calls them: the ctypes mirror of csrc/headrace.h.

`LIBRARY` is None where nothing was compiled; then this package offers no operators. Addresses go in
as numbers, so whoever calls keeps the tensors alive until the call returns (or, when recording,
for the life of the program). Does not know what any operator computes.

To add an operator: a ctypes Structure that mirrors its argument struct, and
`_NAME = Operator("name", Args)` in the module of its family; then `_NAME(args, step)`.
"""

import ctypes
import logging
import os
import threading
from collections.abc import Callable
from ctypes import c_char_p, c_int32, c_int64, c_void_p
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from headrace.core.errors import BadRequest

logger = logging.getLogger(__name__)

LEVELS = ("portable", "avx2", "avx512", "avx512_bf16", "amx")
"""Instruction-set levels in rising order, hr_level."""

_AMX = (
    "granted by the system",
    "this CPU has no tiles of bf16 and int8",
    "the system does not save tile registers",
    "the system refuses tile registers to this process",
)
"""Of hr_permission."""

DTYPES = {
    torch.float32: 0,
    torch.bfloat16: 1,
    torch.float16: 2,
    torch.int8: 3,
    torch.float8_e4m3fn: 4,
}
"""hr_dtype of torch's."""

ABI = 10
"""HR_ABI: also names the layouts of packed weights."""
_FILE = Path(__file__).parent.parent / "_native" / "libheadrace.so"
_FUNCTIONS: dict[str, tuple[type[Any] | None, list[Any]]] = {
    "hr_abi": (c_int32, []),
    "hr_level_best": (c_int32, []),
    "hr_level_in_use": (c_int32, []),
    "hr_amx_permission": (c_int32, []),
    "hr_set_level": (c_int32, [c_int32]),
    "hr_threads": (c_int32, []),
    "hr_set_threads": (None, [c_int32]),
    "hr_operator": (c_int32, [c_char_p, c_int64]),
    "hr_operator_count": (c_int32, []),
    "hr_operator_name": (c_char_p, [c_int32]),
    "hr_call": (None, [c_int32, c_void_p, c_void_p]),
    "hr_program_new": (c_void_p, []),
    "hr_program_free": (None, [c_void_p]),
    "hr_program_append": (c_int64, [c_void_p, c_int32, c_void_p, c_int64]),
    "hr_program_length": (c_int64, [c_void_p]),
    "hr_program_operator": (c_int32, [c_void_p, c_int64]),
    "hr_replay": (None, [c_void_p, c_void_p]),
    "hr_replay_timed": (None, [c_void_p, c_void_p, c_void_p]),
}


class Step(ctypes.Structure):
    """hr_step; addresses are `Tensor.data_ptr()`."""

    _fields_ = (
        ("tokens", c_int64),
        ("chunks", c_int64),
        ("ids", c_void_p),
        ("positions", c_void_p),
        ("slots", c_void_p),
        ("page_table", c_void_p),
        ("page_stride", c_int64),
        ("rows", c_void_p),
        ("query_start", c_void_p),
        ("context", c_void_p),
        ("picked", c_int64),
        ("picks", c_void_p),
    )


class Rows(ctypes.Structure):
    """hr_rows: a 2-D view of activations."""

    _fields_ = (
        ("data", c_void_p),
        ("stride", c_int64),
        ("columns", c_int64),
        ("dtype", c_int32),
    )


def rows(x: Tensor) -> Rows:
    """`x` [rows, columns] with adjacent columns, of a dtype in `DTYPES`."""
    if x.dim() != 2 or (x.stride(1) != 1 and x.shape[1] > 1):
        raise ValueError(f"kernels need rows of adjacent elements, not strides {x.stride()}")
    return Rows(x.data_ptr(), x.stride(0), x.shape[1], DTYPES[x.dtype])


class Recorder(threading.local):
    """`append` is set while this thread records a model; it gets the calls, no kernel does."""

    append: Callable[["Operator", ctypes.Structure], None] | None = None


RECORDER = Recorder()


class Operator:
    """One operator of the library; call it with its arguments and what the step brings."""

    def __init__(self, name: str, args: type[ctypes.Structure]) -> None:
        self.name = name
        self.index: int = native().hr_operator(name.encode(), ctypes.sizeof(args))
        if self.index < 0:
            why = "is unknown" if self.index == -1 else "has another argument struct"
            raise LookupError(f"operator {name} {why} in {_FILE}: build it again")
        self._call = native().hr_call

    def __call__(self, args: ctypes.Structure, step: Step) -> None:
        if RECORDER.append is not None:
            RECORDER.append(self, args)
        else:
            self._call(self.index, ctypes.byref(args), ctypes.byref(step))


def native() -> ctypes.CDLL:
    """The library.

    Raises:
        LookupError: there is none.
    """
    if LIBRARY is None:
        raise LookupError(f"the native kernels are not built: {_FILE} is missing or stale")
    return LIBRARY


def level() -> str:
    """The instruction-set level in use."""
    return LEVELS[native().hr_level_in_use()]


def levels() -> tuple[str, ...]:
    """Every level that this machine can run."""
    return LEVELS[: native().hr_level_best() + 1]


def amx() -> str:
    """What the CPU and the system say to AMX, in words."""
    return _AMX[native().hr_amx_permission()]


def set_level(name: str) -> None:
    """Use the kernels of another level from now on.

    Raises:
        BadRequest: no such level, or this machine cannot run it.
    """
    if name not in levels():
        raise BadRequest(
            f"HEADRACE_CPU_ISA must be one of {', '.join(levels())} here, not {name!r}",
            field="HEADRACE_CPU_ISA",
        )
    native().hr_set_level(LEVELS.index(name))


def set_threads(count: int) -> None:
    """Threads of every operator, the caller included."""
    native().hr_set_threads(count)


def _load() -> ctypes.CDLL | None:
    if not _FILE.exists():
        logger.info("no native kernels (%s): operators run in torch", _FILE.name)
        return None
    library = ctypes.CDLL(str(_FILE))
    if library.hr_abi() != ABI:
        logger.warning("%s is of another version: operators run in torch", _FILE.name)
        return None
    for name, (result, arguments) in _FUNCTIONS.items():
        function = getattr(library, name)
        function.restype, function.argtypes = result, arguments
    return library


LIBRARY = _load()
if LIBRARY is not None and os.environ.get("HEADRACE_CPU_ISA"):
    set_level(os.environ["HEADRACE_CPU_ISA"])
