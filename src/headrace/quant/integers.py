"""Matrices that compressed-tensors stores as integers, with a scale per tensor, output or group.

4 bits (and 2, which are among them) go to the int4 kernel, 8 bits to the int8 ones.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from headrace.ops.packed import Quantized
from headrace.quant.act_order import Integers as Scattered
from headrace.quant.act_order import in_groups
from headrace.quant.bits import outside, unpack_columns, unpack_rows
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
        found["weight_g_idx"] = Stored(
            ((columns,),),
            (torch.int32, torch.int64),
            columns=Axis(0),
            wrong=outside(columns // self.group) if self.shuffled else None,
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

    def read(self, tensors: Mapping[str, Tensor], window: Window) -> Quantized | Scattered:
        rows, columns = window.shape
        values = self._values(tensors, columns)
        scales = tensors["weight_scale"].float()
        scales = scales if scales.dim() == 2 and self.group else scales.reshape(-1, 1)
        scales = scales.expand(rows, -1)
        zeros = self._zeros(tensors, rows, scales)
        if self.shuffled:
            return Scattered(values, scales, zeros, tensors["weight_g_idx"].long(), self.bits)
        return in_groups(values, scales, zeros, self.bits, self.group)

    def _values(self, tensors: Mapping[str, Tensor], columns: int) -> Tensor:
        """uint8 [rows, columns], 0 .. 2 ** bits"""
        if self.packed:
            return unpack_columns(tensors["weight_packed"], self.bits)[:, :columns].contiguous()
        return self._unsigned(tensors["weight"])

    def _zeros(self, tensors: Mapping[str, Tensor], rows: int, scales: Tensor) -> Tensor:
        """uint8, as many as scales"""
        if self.symmetric:
            return torch.full(scales.shape, 1 << (self.bits - 1), dtype=torch.uint8)
        zeros = tensors["weight_zero_point"]
        if self.packed:
            return unpack_rows(zeros, self.bits)[:rows]
        return self._unsigned(zeros.reshape(-1, scales.shape[1])).expand(scales.shape)

    def _unsigned(self, signed: Tensor) -> Tensor:
        middle = 1 << (self.bits - 1)
        for value in signed.aminmax() if signed.numel() else ():
            if not -middle <= int(value) < middle:
                raise ValueError(f"an int{self.bits} value is {int(value)}")
        return (signed.to(torch.int16) + middle).to(torch.uint8)
