"""sample, log_probs: bindings of csrc/kernels/sample.cpp and log_probs.cpp."""

from ctypes import Structure, c_int64, c_void_p

import numpy as np
import torch
from torch import Tensor

from headrace.ops.cpu.library import DTYPES, Operator, Rows, Step
from headrace.ops.sampling import LogProbs, Sampled, SampleTable, address


class _SampleArgs(Structure):
    _fields_ = (
        ("logits", Rows),
        ("table", c_void_p),
        ("rows", c_void_p),
        ("positions", c_void_p),
        ("eos", c_void_p),
        ("eos_count", c_int64),
        ("chosen", c_void_p),
    )


class _LogProbsArgs(Structure):
    _fields_ = (
        ("logits", Rows),
        ("rows", c_void_p),
        ("temperature", c_void_p),
        ("ids", c_void_p),
        ("width", c_int64),
        ("top", c_int64),
        ("values", c_void_p),
        ("top_ids", c_void_p),
        ("top_values", c_void_p),
    )


_FLOAT32 = DTYPES[torch.float32]
_SAMPLE = Operator("sample", _SampleArgs)
_LOG_PROBS = Operator("log_probs", _LogProbsArgs)


def sample(
    logits: Tensor,
    table: SampleTable,
    rows: np.ndarray,
    positions: np.ndarray,
    eos: np.ndarray,
) -> Sampled:
    tokens = np.empty(len(rows), dtype=np.int64)
    args = _SampleArgs(
        logits=Rows(logits.data_ptr(), logits.stride(0), logits.shape[1], _FLOAT32),
        table=table.address,
        rows=address(rows),
        positions=address(positions),
        eos=address(eos),
        eos_count=len(eos),
        chosen=address(tokens),
    )
    _SAMPLE(args, Step(tokens=len(tokens)))
    return Sampled(tokens, tokens >= 0)


def log_probs(
    logits: Tensor, picks: np.ndarray, temperature: np.ndarray, ids: np.ndarray, top: int
) -> LogProbs:
    count, top = len(picks), min(top, logits.shape[1])
    found = LogProbs(
        values=np.empty(ids.shape, dtype=np.float32),
        top_ids=np.empty((count, top), dtype=np.int64),
        top_values=np.empty((count, top), dtype=np.float32),
    )
    args = _LogProbsArgs(
        logits=Rows(logits.data_ptr(), logits.stride(0), logits.shape[1], _FLOAT32),
        rows=address(picks),
        temperature=address(temperature),
        ids=address(ids),
        width=ids.shape[1],
        top=top,
        values=address(found.values),
        top_ids=address(found.top_ids),
        top_values=address(found.top_values),
    )
    _LOG_PROBS(args, Step(tokens=count))
    return found
