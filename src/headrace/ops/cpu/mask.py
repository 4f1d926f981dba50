"""mask_logits: binding of csrc/kernels/mask.cpp."""

from ctypes import Structure, c_int64, c_void_p

import torch
from torch import Tensor

from headrace.ops.cpu.library import Operator, Rows, Step, rows


class _MaskLogitsArgs(Structure):
    _fields_ = (("logits", Rows), ("rows", c_void_p), ("masks", c_void_p), ("words", c_int64))


_MASK_LOGITS = Operator("mask_logits", _MaskLogitsArgs)


def mask_logits(logits: Tensor, which: Tensor, masks: Tensor) -> None:
    if logits.dtype != torch.float32 or masks.shape[1] * 32 < logits.shape[1]:
        raise ValueError("mask_logits needs float32 logits and a bit for each of them")
    masks = masks.contiguous()
    args = _MaskLogitsArgs(rows(logits), which.data_ptr(), masks.data_ptr(), masks.shape[1])
    _MASK_LOGITS(args, Step(tokens=len(which)))
