"""What the sampling operators take and give.

A row's parameters are one record of `SAMPLE_ROW`, the mirror of hr_sample_row in csrc/headrace.h;
its lists (tokens, bias, stop ids) are addresses, so whoever fills a record keeps the arrays alive.
Knows nothing of requests or batches.
"""

import ctypes
from typing import Any, NamedTuple

import numpy as np

SAMPLE_ROW = np.dtype(
    [
        ("tokens", np.uint64),
        ("prompt_len", np.int64),
        ("bias_ids", np.uint64),
        ("bias", np.uint64),
        ("stops", np.uint64),
        ("min_new_tokens", np.int64),
        ("seed", np.uint64),
        ("sample_index", np.int64),
        ("top_p", np.float64),
        ("bias_count", np.int32),
        ("stop_count", np.int32),
        ("top_k", np.int32),
        ("temperature", np.float32),
        ("min_p", np.float32),
        ("frequency_penalty", np.float32),
        ("presence_penalty", np.float32),
        ("repetition_penalty", np.float32),
    ],
    align=True,
)
"""`tokens`: address of int32, prompt and output. `bias_ids` int32 and `bias` float32 [bias_count],
`stops` int32 [stop_count]: addresses. `temperature` 0 is greedy, `top_k` 0 keeps all; the rest as
in `SamplingParams`."""


class SampleTable:
    """Records of `SAMPLE_ROW`, at a fixed address."""

    def __init__(self, rows: int) -> None:
        self.records = np.zeros(rows, dtype=SAMPLE_ROW)
        self.address = address(self.records)


class Sampled(NamedTuple):
    """Tokens int64 [n]; valid bool [n] is False where the token means nothing."""

    tokens: np.ndarray
    valid: np.ndarray


class LogProbs(NamedTuple):
    """`values` float32 [n, width]; `top_ids` int64 and `top_values` float32 [n, top]."""

    values: np.ndarray
    top_ids: np.ndarray
    top_values: np.ndarray


def sample_row(**fields: Any) -> tuple[Any, ...]:
    """A record with every field of `SAMPLE_ROW`, in its order."""
    return tuple(fields[name] for name in SAMPLE_ROW.fields or ())


def address(array: np.ndarray) -> int:
    """Where the elements of a contiguous, writable array begin; 0 if it has none."""
    if not array.size:
        return 0
    memory: Any = array  # much faster than array.ctypes.data
    return ctypes.addressof(ctypes.c_char.from_buffer(memory))


def array_at(place: int, count: int, kind: type[Any]) -> np.ndarray:
    """`count` elements at an address, of a ctypes type; none if there are none."""
    pointer = ctypes.cast(int(place), ctypes.POINTER(kind))
    return np.ctypeslib.as_array(pointer, (count,)) if count else np.empty(0, dtype=kind)
