"""Matrices that compressed-tensors stores as integers, with a scale per tensor, output or group.

4 bits (and 2, which are among them) go to the int4 kernel, 8 bits with a scale per output to the
int8 one. 8 bits in groups or with zero points, and groups of scattered inputs, become floats.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from headrace.ops.packed import Quantized
from headrace.quant.local import Window
from headrace.quant.stored import Axis, Stored, wrong_scale

_WORD = 32


@dataclass(frozen=True)
class Integers:
    """`weight` int8 [rows, columns], or `weight_packed` int32 [rows, columns * bits / 32], the
    value of the first column in the lowest bits; zero points are packed along rows.

    `group`: columns that share a scale, 0 for all. With `shuffled` groups `weight_g_idx` names
    each column's. Packed numbers are not negative: 2 ** (bits - 1) stands for zero.
    """

    bits: int
    group: int
    packed: bool
    symmetric: bool = True
    shuffled: bool = False

    marker = "weight_scale"

    @property
    def name(self) -> str:
        grouped = f", groups of {self.group}" if self.group else ""
        order = ", in the order of activations" if self.shuffled else ""
        return f"int{self.bits}{grouped}{'' if self.symmetric else ', zero points'}{order}"

    @property
    def per_word(self) -> int:
        return _WORD // self.bits if self.packed else 1

    @property
    def align(self) -> tuple[int, int]:
        columns = math.lcm(self.per_word, 1 if self.shuffled else self.group or 1)
        return 1 if self.symmetric else self.per_word, columns

    def tensors(self, rows: int, columns: int) -> dict[str, Stored]:
        if self.group and columns % self.group:
            raise ValueError(f"{columns} inputs are not whole groups of {self.group}")
        shapes = self._per_group(rows, columns)
        groups = Axis(1, self.group) if self.group and not self.shuffled else None
        found = {"weight_scale": Stored(shapes, rows=Axis(0), columns=groups, wrong=wrong_scale)}
        per = self.per_word
        values = Stored(
            ((rows, -(-columns // per)),),
            (torch.int32 if self.packed else torch.int8,),
            Axis(0),
            Axis(1, per),
        )
        found["weight_packed" if self.packed else "weight"] = values
        if not self.symmetric and self.packed:
            packed = ((-(-rows // per), shapes[0][1]),)
            zeros = Stored(packed, (torch.int32,), Axis(0, per), groups)
        else:
            zeros = Stored(shapes, (torch.int8,), Axis(0), groups, unused=self.symmetric)
        found["weight_zero_point"] = zeros
        known = range(columns // self.group) if self.shuffled else range(0)
        found["weight_g_idx"] = Stored(
            ((columns,),),
            (torch.int32, torch.int64),
            columns=Axis(0),
            wrong=lambda index: _wrong_index(index, len(known)),
            unused=not self.shuffled,
        )
        usual = (torch.int64, torch.int32)
        found["weight_shape"] = Stored(((2,),), usual, unused=True)
        found["input_scale"] = Stored(((), (1,)), unused=True)
        found["input_zero_point"] = Stored(((), (1,)), (torch.int8,), unused=True)
        return found

    def _per_group(self, rows: int, columns: int) -> tuple[tuple[int, ...], ...]:
        """Shapes of scales and zero points."""
        if self.group:
            return ((rows, columns // self.group),)
        return ((rows, 1), (rows,), (1,), (1, 1), ())

    def read(self, tensors: Mapping[str, Tensor], window: Window) -> Quantized | Tensor:
        rows, columns = window.shape
        middle = 1 << (self.bits - 1)
        values = self._values(tensors, columns)  # 0 .. 2 ** bits
        scales = tensors["weight_scale"].float()
        scales = scales if scales.dim() == 2 and self.group else scales.reshape(-1, 1)
        scales = scales.expand(rows, -1)
        zeros = self._zeros(tensors, rows, scales)
        plain = self.symmetric or bool((zeros == middle).all())
        native = self.bits <= 4 or (plain and not self.group)
        if self.shuffled or not native:
            return self._floats(tensors, values, scales, zeros)
        if self.bits == 8:
            return Quantized("int8", (values.to(torch.int16) - middle).to(torch.int8), scales)
        usual = self.symmetric and self.bits == 4
        return Quantized("int4", values, scales, self.group, None if usual else zeros * scales)

    def _values(self, tensors: Mapping[str, Tensor], columns: int) -> Tensor:
        """uint8 [rows, columns]"""
        if self.packed:
            return unpacked(tensors["weight_packed"], self.bits)[:, :columns].contiguous()
        return (tensors["weight"].to(torch.int16) + (1 << (self.bits - 1))).to(torch.uint8)

    def _zeros(self, tensors: Mapping[str, Tensor], rows: int, scales: Tensor) -> Tensor:
        """fp32, as the scales"""
        middle = 1 << (self.bits - 1)
        if self.symmetric:
            return torch.full_like(scales, middle)
        zeros = tensors["weight_zero_point"]
        if self.packed:
            return unpacked(zeros.T, self.bits).T[:rows].float()
        return zeros.reshape(-1, scales.shape[1]).float().expand(scales.shape) + middle

    def _floats(
        self, tensors: Mapping[str, Tensor], values: Tensor, scales: Tensor, zeros: Tensor
    ) -> Tensor:
        columns = values.shape[1]
        if self.shuffled:
            index = tensors["weight_g_idx"].long()
        else:
            index = torch.arange(columns) // (self.group or columns)
        return (values.float() - zeros[:, index]) * scales[:, index]


def unpacked(words: Tensor, bits: int) -> Tensor:
    """int32 [n, m] -> uint8 [n, m * 32 / bits], the lowest bits first."""
    if not words.shape[1]:
        return torch.empty(len(words), 0, dtype=torch.uint8)
    octets = words.clone(memory_format=torch.contiguous_format).view(torch.uint8)
    if bits == 8:
        return octets
    shifts = torch.arange(0, 8, bits, dtype=torch.uint8)
    return (octets[:, :, None] >> shifts & ((1 << bits) - 1)).flatten(1)


def _wrong_index(index: Tensor, groups: int) -> str:
    if index.numel() and not 0 <= int(index.min()) <= int(index.max()) < groups:
        return f"names a group that is none of {groups}"
    return ""
