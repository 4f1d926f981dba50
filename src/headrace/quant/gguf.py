"""GGUF's blocks as matrices that kernels multiply: the file's integers, scales and minima exactly.

The bytes of a tensor come as `blocks`, a row after another; whoever knows the layouts of ggml gives
the function that takes them apart. Knows no files.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from headrace.ops.packed import Quantized
from headrace.quant.base import Kind, QuantMethod
from headrace.quant.dense import AS_IS
from headrace.quant.local import Window
from headrace.quant.parts import by_part
from headrace.quant.stored import Axis, Stored, StoredWeights

_BYTES = (torch.uint8,)

Split = Callable[[Tensor], Quantized]
"""uint8 [rows, bytes] of whole blocks -> the matrix they hold."""


@dataclass(frozen=True)
class GgufBlocks:
    """`blocks` uint8 [out, bytes]: `size` inputs in `bytes` bytes. `name`: the type's."""

    name: str
    size: int
    bytes: int
    split: Split
    marker: str = "blocks"

    @property
    def align(self) -> tuple[int, int]:
        return 1, self.size

    def tensors(self, rows: int, columns: int) -> dict[str, Stored]:
        if columns % self.size:
            raise ValueError(f"inputs are not a multiple of {self.size}")
        shape = rows, columns // self.size * self.bytes
        return {self.marker: Stored((shape,), _BYTES, rows=Axis(0))}

    def read(self, tensors: Mapping[str, Tensor], window: Window) -> Quantized:
        low, high = (column // self.size * self.bytes for column in window.columns)
        return self.split(tensors[self.marker][:, low:high])


@dataclass(frozen=True)
class FromGguf:
    """The `Quantization` of a file: each matrix as it is stored there. `wide`: see `StoredWeights`.

    `storages`: by the model's name of a module; others are floats.
    """

    storages: Mapping[str, GgufBlocks]
    wide: torch.dtype
    name: str = "gguf"

    def method(self, modules: Sequence[str], kind: Kind, stacked: str = "") -> QuantMethod:
        whole = self.storages.get(stacked)
        storages = [whole or self.storages.get(module) for module in modules]
        return by_part([StoredWeights(s, self.wide) if s else AS_IS for s in storages])

    def renamed(self, rename: Callable[[str], str]) -> "FromGguf":
        names = {rename(f"{name}.weight").rpartition(".")[0]: name for name in self.storages}
        return replace(self, storages={name: self.storages[old] for name, old in names.items()})
