"""The definition of low-bit weights: how numbers become int8, int4 and fp8, and what products mean.

Quantizing is defined bit by bit (fp32, one rounding per written operation, halves to even), so that
every implementation stores and multiplies the same integers. Products of integers are exact; what
follows is fp32, where implementations may differ by rounding. Here `data` of a PackedWeight are the
plain values [out, in], `scales` and `offsets` fp32 [out, groups]: an element is
value * scale - offset. Values of mxfp4 are codes of e2m1 (OCP microscaling formats, 1.0).
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from headrace.ops.packed import TABLES, PackedWeight, Quantized, check_group, numbers

DEFAULT_GROUP = 64  # of int4
_SMALLEST = 1e-30  # no number is divided by less
_EXACT = 1024  # products of two int8 values whose sum fp32 holds exactly
_FP8_MOST = 448.0
_F16_MOST = 65504.0


def quantize(weight: Tensor, format: str, group: int) -> Quantized:
    """weight [out, in] of any float type.

    Raises:
        ValueError: no such format or group.
    """
    if format in ("int4", "nf4"):
        group = group or DEFAULT_GROUP
    check_group(format, group, weight.shape[1])
    if format == "int8" and not group:
        return Quantized(format, *quantize_int8(weight))
    if format == "int4":
        return Quantized(format, *quantize_int4(weight, group), group)
    if format == "nf4":
        return Quantized(format, *quantize_nf4(weight, group), group)
    if format == "fp8" and not group:
        return Quantized(format, *quantize_fp8(weight))
    raise ValueError(
        f"floats can be packed as int8, int4, nf4 or fp8, not as {format!r} by {group}"
    )


def quantize_int8(x: Tensor) -> tuple[Tensor, Tensor]:
    """x [..., n] -> int8 values, and scales [..., 1]: the largest |x| of a row becomes 127."""
    x = x.float()
    top = x.abs().amax(-1, keepdim=True).clamp_min(_SMALLEST)
    most = torch.full_like(top, 127.0)
    return (x * (most / top)).round().to(torch.int8), top / most


def quantize_int4(weight: Tensor, group: int) -> tuple[Tensor, Tensor]:
    """weight [out, in] -> values 0..15, and scales [out, groups] that f16 can hold.

    The number of a group that is farthest from zero becomes 0; zero is 8.
    """
    x = _grouped(weight.float(), group)
    high, low = x.amax(-1, keepdim=True).clamp_min(0), x.amin(-1, keepdim=True).clamp_max(0)
    farthest = torch.where(high > -low, high, low)
    scales = (farthest * -0.125).clamp(-_F16_MOST, _F16_MOST).half().float()
    inverse = torch.where(scales == 0, 0.0, torch.ones_like(scales) / scales)
    values = ((x * inverse).round() + 8).clamp(0, 15).to(torch.uint8)
    return values.flatten(1)[:, : weight.shape[1]].contiguous(), scales[..., 0]


def quantize_nf4(weight: Tensor, group: int) -> tuple[Tensor, Tensor]:
    """weight [out, in] -> places in the table of nf4, and scales [out, groups]: the largest size of
    a group. The nearest place is taken (arXiv 2305.14314)."""
    x = _grouped(weight.float(), group)
    scales = x.abs().amax(-1, keepdim=True)
    table = TABLES["nf4"]
    middles = (table[1:] + table[:-1]) / 2
    places = torch.bucketize(x / scales.clamp_min(_SMALLEST), middles).to(torch.uint8)
    return places.flatten(1)[:, : weight.shape[1]].contiguous(), scales[..., 0]


def quantize_fp8(weight: Tensor) -> tuple[Tensor, Tensor]:
    """weight [out, in] -> e4m3 values, and scales [out, 1]: the largest of a row becomes 448."""
    x = weight.float()
    top = x.abs().amax(-1, keepdim=True).clamp_min(_SMALLEST)
    most = torch.full_like(top, _FP8_MOST)
    return (x * (most / top)).to(torch.float8_e4m3fn), top / most


def pack(weight: Quantized) -> PackedWeight:
    offsets = weight.offsets
    if weight.format == "int4" and offsets is None:
        offsets = 8 * weight.scales
    values, scales = weight.values, weight.scales
    out_size, in_size = values.shape
    return PackedWeight(values, out_size, in_size, weight.format, scales, weight.group, offsets)


def rows(weight: PackedWeight, ids: Tensor) -> Tensor:
    """Rows `ids` in fp32."""
    assert weight.scales is not None
    group = weight.group or weight.in_size
    values = numbers(weight.format, weight.data.view(torch.uint8)[ids].view(weight.data.dtype))
    scales = weight.scales[ids].repeat_interleave(group, 1)[:, : weight.in_size]
    if weight.offsets is None:
        return values * scales
    return values * scales - weight.offsets[ids].repeat_interleave(group, 1)[:, : weight.in_size]


def linear(x: Tensor, weight: PackedWeight, bias: Tensor | None) -> Tensor:
    """fp32 [tokens, out]"""
    if weight.format == "fp8" or weight.format in TABLES:
        y = F.linear(x.float(), rows(weight, torch.arange(weight.out_size)))
    elif weight.group:
        y = _linear_grouped(x, weight)
    else:
        y = _linear_int8(x, weight)
    return y if bias is None else y + bias.float()


def _linear_int8(x: Tensor, weight: PackedWeight) -> Tensor:
    assert weight.scales is not None
    values, scales = quantize_int8(x)
    dots = torch.zeros(len(x), weight.out_size, dtype=torch.float64)
    for first in range(0, weight.in_size, _EXACT):
        part = slice(first, first + _EXACT)
        dots += F.linear(values[:, part].float(), weight.data[:, part].float())
    return dots.float() * scales * weight.scales[:, 0]


def _linear_grouped(x: Tensor, weight: PackedWeight) -> Tensor:
    """x in groups of its own, as the weight's, so that an outlier costs its group alone."""
    assert weight.scales is not None
    values, scales = quantize_int8(_grouped(x, weight.group))
    inputs = _grouped(numbers(weight.format, weight.data), weight.group)
    total = torch.zeros(len(x), weight.out_size)
    for g in range(weight.scales.shape[1]):
        part = values[:, g].float()
        dots, scale = F.linear(part, inputs[:, g]), scales[:, g]
        total += dots * scale * weight.scales[:, g]
        if weight.offsets is not None:
            total -= scale * part.sum(-1, keepdim=True) * weight.offsets[:, g]
    return total


def _grouped(x: Tensor, group: int) -> Tensor:
    """[n, in] -> [n, groups, group], padded with zeros."""
    missing = -x.shape[1] % group
    return F.pad(x, (0, missing)).view(len(x), (x.shape[1] + missing) // group, group)
