"""Checkpoints of MXFP4 (OCP microscaling formats 1.0), as gpt-oss has its experts: 32 numbers of
e2m1 with a power of two. The kernel takes the codes as they are."""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from headrace.ops.packed import Quantized
from headrace.quant.base import Kind
from headrace.quant.local import Window
from headrace.quant.scheme import Config, Scheme, listed, modules_from_config
from headrace.quant.stored import Axis, Storage, Stored

_GROUP = 32
_BYTES = (torch.uint8,)
_BIAS = 127  # of e8m0, whose largest is no number


def scheme(config: Config) -> Scheme:
    """The scheme of a `quantization_config` with quant_method mxfp4: experts alone."""
    ignored = modules_from_config(config, "modules_to_not_convert")

    def of(module: str, kind: Kind) -> Storage | None:
        return Mxfp4() if kind == "expert" and not listed(module, ignored) else None

    return of


@dataclass(frozen=True)
class Mxfp4:
    """`blocks` uint8 [out, in / 32, 16], of two inputs the first in the low half; `scales` uint8
    [out, in / 32], exponents plus 127."""

    name: str = "mxfp4"
    marker: str = "blocks"
    align: tuple[int, int] = (1, _GROUP)

    def tensors(self, rows: int, columns: int) -> dict[str, Stored]:
        if columns % _GROUP:
            raise ValueError(f"inputs are not a multiple of {_GROUP}")
        groups, along = columns // _GROUP, Axis(1, _GROUP)
        return {
            "blocks": Stored(((rows, groups, _GROUP // 2),), _BYTES, Axis(0), along),
            "scales": Stored(((rows, groups),), _BYTES, Axis(0), along, _not_a_number),
        }

    def read(self, tensors: Mapping[str, Tensor], window: Window) -> Quantized:
        blocks, exponents = tensors["blocks"], tensors["scales"].int() - _BIAS
        values = torch.stack([blocks & 15, blocks >> 4], dim=-1).flatten(1)
        scales = torch.ldexp(torch.ones(exponents.shape), exponents)
        return Quantized("mxfp4", values, scales, _GROUP)


def _not_a_number(scales: Tensor) -> str:
    return "holds a scale that is no number" if bool((scales == 255).any()) else ""
