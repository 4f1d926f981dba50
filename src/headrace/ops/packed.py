"""The matrix of a linear layer in the form that one implementation multiplies with.

Made once by `ops.pack`, which is free to change layout, and type if asked to quantize, or by
`ops.pack_quantized`. Only the implementation that made it understands `data`.
"""

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

E2M1 = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6])
TABLES = {
    "nf4": torch.tensor([  # arXiv 2305.14314, appendix E
        -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453,
        -0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0,
        0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
        0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
    ]),
    "fp4": torch.tensor([  # of bitsandbytes
        0.0, 0.0052083334885537624, 0.6666666865348816, 1.0,
        0.3333333432674408, 0.5, 0.1666666716337204, 0.25,
        0.0, -0.0052083334885537624, -0.6666666865348816, -1.0,
        -0.3333333432674408, -0.5, -0.1666666716337204, -0.25,
    ]),
    "iq4_nl": torch.tensor([  # of ggml
        -127.0, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113,
    ]),
}  # fmt: skip
"""Formats of 4 bits whose values are places in a table of 16 numbers; x stays float."""

FORMATS = ("float32", "bfloat16", "float16", "int8", "int4", "fp8", "mxfp4", *TABLES)
INT4_GROUPS = (16, 32, 64, 128)
FP8_BLOCK = 128
PANEL = 32
"""Rows of a matrix that are laid out together, HR_PANEL."""
MOST_INT8_INPUTS = 1 << 16  # so that no sum of products leaves 32 bits


@dataclass(frozen=True, eq=False)
class PackedWeight:
    """W [out_size, in_size].

    `format`: one of `FORMATS`. `scales` and `offsets`: what `data` does not hold itself, in the
    shape that the implementation likes, None for floats. `group`: inputs per scale, 0 for one scale
    per output. `variant`: of the layout of `data`.
    """

    data: Tensor
    out_size: int
    in_size: int
    format: str
    scales: Tensor | None = None
    group: int = 0
    offsets: Tensor | None = None
    variant: int = 0

    @property
    def nbytes(self) -> int:
        parts = (self.data, self.scales, self.offsets)
        return sum(part.nbytes for part in parts if part is not None)


def format_of(weight: Tensor) -> str:
    """The format that keeps a float matrix as it is."""
    return str(weight.dtype).removeprefix("torch.")


FLOAT_FORMATS = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(frozen=True, eq=False)
class PackedHeads:
    """A matrix of one shape for each head, made once by `ops.pack_heads`.

    `handles`: what implementations keep beside them.
    """

    heads: tuple[PackedWeight, ...]
    handles: dict[str, Any] = field(default_factory=dict, repr=False)


@dataclass(frozen=True, eq=False)
class Quantized:
    """A low-bit matrix [out, in] before it is laid out, as `ops.pack_quantized` describes it.

    `scales` and `offsets` are fp32 [out, groups], one group if `group` is 0. No `offsets` for int4
    means 8 * scales, for int8 none.
    """

    format: str
    values: Tensor
    scales: Tensor
    group: int = 0
    offsets: Tensor | None = None


def check_quantized(
    values: Tensor, scales: Tensor, format: str, group: int, offsets: Tensor | None
) -> Quantized:
    """The arguments of `ops.pack_quantized` in one shape.

    Raises:
        ValueError: a shape, dtype or value that the format does not have.
    """
    _check_values(values, format)
    check_group(format, group, values.shape[1])
    if offsets is not None and (format not in ("int4", "int8") or not group):
        raise ValueError(f"{format} has no offsets")
    shape = values.shape[0], -(-values.shape[1] // group) if group else 1
    mantissa = scales.float().frexp().mantissa
    if format == "mxfp4" and bool(((mantissa != 0.5) & (mantissa != 0)).any()):
        raise ValueError("a scale of mxfp4 is no power of two")
    found = None if offsets is None else _spread(offsets, shape, "offsets")
    return Quantized(format, values.contiguous(), _spread(scales, shape, "scales"), group, found)


def numbers(format: str, values: Tensor) -> Tensor:
    """What values are before scales and offsets, fp32: numbers, or places in a table."""
    table = E2M1 if format == "mxfp4" else TABLES.get(format)
    return values.float() if table is None else table[values.long()]


_GROUPS = {
    "int8": (0, *INT4_GROUPS),
    "int4": INT4_GROUPS,
    "mxfp4": INT4_GROUPS,
    **dict.fromkeys(TABLES, INT4_GROUPS),
    "fp8": (0, FP8_BLOCK),
}


def check_group(format: str, group: int, in_size: int) -> None:
    """Raises ValueError where the format has no such group."""
    allowed = _GROUPS.get(format, (0,))
    if group not in allowed:
        raise ValueError(f"the group of {format} must be one of {allowed}, not {group}")
    if format == "int8" and in_size > MOST_INT8_INPUTS:
        raise ValueError(f"int8 takes at most {MOST_INT8_INPUTS} inputs, not {in_size}")


def _check_values(values: Tensor, format: str) -> None:
    dtypes = {
        "int8": torch.int8,
        "int4": torch.uint8,
        "mxfp4": torch.uint8,
        **dict.fromkeys(TABLES, torch.uint8),
        "fp8": torch.float8_e4m3fn,
    }
    if format not in dtypes:
        raise ValueError(f"format must be one of {', '.join(dtypes)}, not {format!r}")
    if values.dim() != 2 or values.dtype != dtypes[format]:
        raise ValueError(f"{format} needs {dtypes[format]} values [out, in], not {values.dtype}")
    if dtypes[format] == torch.uint8 and values.numel() and int(values.max()) > 15:
        raise ValueError(f"an {format} value is {int(values.max())}, not 0..15")
    if format == "fp8" and bool((values.view(torch.uint8) & 0x7F == 0x7F).any()):
        raise ValueError("an fp8 value is not a number")


def _spread(scales: Tensor, shape: tuple[int, int], name: str) -> Tensor:
    """One per tensor, output, group or block of 128 outputs -> fp32 [out, groups]."""
    out_size, groups = shape
    scales = scales.float()
    if scales.dim() == 2 and scales.shape == (-(-out_size // FP8_BLOCK), groups):
        scales = scales.repeat_interleave(FP8_BLOCK, 0)[:out_size]
    elif scales.dim() < 2 and groups == 1:
        scales = scales.reshape(-1, 1)
    if scales.dim() != 2 or scales.shape[0] not in (1, out_size) or scales.shape[1] != groups:
        raise ValueError(f"{name} of shape {list(scales.shape)} do not fit {list(shape)}")
    return scales.expand(shape).contiguous()
