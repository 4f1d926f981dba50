"""The matrix of a linear layer in the form that one implementation multiplies with.

Made once by `ops.pack`, which is free to change layout, and type if asked to quantize. Only the
implementation that made it understands `data`.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

FORMATS = ("float32", "bfloat16", "float16", "int8", "int4", "fp8")


@dataclass(frozen=True, eq=False)
class PackedWeight:
    """W [out_size, in_size].

    `format`: one of `FORMATS`; `scales`: fp32 [out_size], or [out_size, in_size / group] if there
    are `group` inputs per scale, None for floats.
    """

    data: Tensor
    out_size: int
    in_size: int
    format: str
    scales: Tensor | None = None
    group: int = 0

    @property
    def nbytes(self) -> int:
        return self.data.nbytes + (0 if self.scales is None else self.scales.nbytes)


def format_of(weight: Tensor) -> str:
    """The format that keeps a float matrix as it is."""
    return str(weight.dtype).removeprefix("torch.")


FLOAT_FORMATS = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
