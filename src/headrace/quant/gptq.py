"""Checkpoints of GPTQ (arXiv 2210.17323): AutoGPTQ, GPTQModel, optimum; 2, 3, 4 and 8 bits.

Values lie one above another in the words of a column. Version 1 stores zero points less one, in as
many bits; `checkpoint_format` gptq_v2 stores them as they are. `g_idx` says which group an input is
of, where they were quantized in the order of activations. Integers, scales and zero points are kept
exactly: 2 and 3 bits as 4.
"""

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from headrace.core.errors import LoadError
from headrace.ops.packed import Quantized
from headrace.quant.act_order import Integers, in_groups
from headrace.quant.base import Kind
from headrace.quant.bits import not_finite, not_zero, outside, unpack_columns, unpack_rows
from headrace.quant.local import Window
from headrace.quant.scheme import Config, Scheme, group_size
from headrace.quant.stored import Axis, Storage, Stored

_BITS = (2, 3, 4, 8)
_WORDS = (torch.int32,)
_FORMATS = {"gptq": 1, "gptq_v2": 0}
"""`checkpoint_format` -> what zero points are stored less."""


def scheme(config: Config) -> Scheme:
    """The scheme of a `quantization_config` with quant_method gptq.

    `dynamic` (GPTQModel) has patterns of modules: "-:" ones stay floats, others have own fields.
    """
    usual = _storage(config)
    rules, chosen = _rules(config), _chosen(config)

    def of(module: str, kind: Kind) -> Storage | None:
        if kind == "embedding" or (kind == "linear" and chosen and not _ends(module, chosen)):
            return None
        return next((storage for rule, storage in rules if rule.match(module)), usual)

    return of


def _rules(config: Config) -> list[tuple[re.Pattern[str], Storage | None]]:
    dynamic = config.get("dynamic") or {}
    if not isinstance(dynamic, dict) or not all(isinstance(f, dict) for f in dynamic.values()):
        raise LoadError("quantization_config.dynamic must be an object", field="dynamic")
    found: list[tuple[re.Pattern[str], Storage | None]] = []
    for name, fields in dynamic.items():
        try:
            rule = re.compile(name.removeprefix("+:").removeprefix("-:"))
        except re.error as error:
            raise LoadError(
                f"quantization_config.dynamic has no pattern in {name!r}: {error}", field="dynamic"
            ) from error
        found.append((rule, None if name.startswith("-:") else _storage({**config, **fields})))
    return found


def _chosen(config: Config) -> list[str]:
    key = "modules_in_block_to_quantize"
    blocks = config.get(key) or []
    if not isinstance(blocks, list) or not all(isinstance(block, list) for block in blocks):
        raise LoadError(f"quantization_config.{key} must be lists of names", field=key)
    return [str(name) for block in blocks for name in block]


def _ends(module: str, names: list[str]) -> bool:
    return any(f".{module}".endswith(f".{name}") for name in names)


def _storage(config: Mapping[str, Any]) -> "Gptq":
    bits = config.get("bits")
    if bits not in _BITS:
        raise LoadError(
            f"quantization_config.bits of GPTQ must be one of {_BITS}, not {bits!r}", field="bits"
        )
    format = str(config.get("checkpoint_format") or config.get("format") or "gptq")
    if config.get("is_marlin_format"):
        format = "marlin"
    if format not in _FORMATS:
        raise LoadError(
            f"quantization_config.checkpoint_format of GPTQ must be one of "
            f"{', '.join(_FORMATS)}, not {format!r}",
            field="checkpoint_format",
        )
    return Gptq(int(bits), group_size(config, "group_size"), _FORMATS[format])


@dataclass(frozen=True)
class Gptq:
    """`qweight` int32 [in * bits / 32, out], `qzeros` [groups, out * bits / 32], `scales`
    [groups, out], `g_idx` [in]; a `group` of 0 is all inputs, zero points are stored less `less`.
    """

    bits: int
    group: int
    less: int
    name: str = "gptq"
    marker: str = "qweight"

    @property
    def align(self) -> tuple[int, int]:
        return self._together, math.lcm(self._together, self.group or 1)

    @property
    def _together(self) -> int:
        """Values that lie in whole words."""
        return 32 if self.bits == 3 else 32 // self.bits

    def tensors(self, rows: int, columns: int) -> dict[str, Stored]:
        group = self.group or columns
        if rows * self.bits % 32 or columns * self.bits % 32:
            raise ValueError(f"sizes are not a multiple of {self._together}")
        groups, packed = -(-columns // group), rows * self.bits // 32
        weights = (columns * self.bits // 32, rows)
        whole = self.bits == 3  # several words hold a value
        return {
            "qweight": Stored(
                (weights,),
                _WORDS,
                rows=Axis(1),
                columns=None if whole else Axis(0, self._together),
            ),
            "qzeros": Stored(
                ((groups, packed),), _WORDS, rows=None if whole else Axis(1, self._together)
            ),
            "scales": Stored(((groups, rows),), rows=Axis(1), wrong=not_finite),
            "g_idx": Stored(
                ((columns,),), (torch.int32, torch.int64), columns=Axis(0), wrong=outside(groups)
            ),
            # AutoGPTQ gave one to every module; where the model has none it does not get here.
            "bias": Stored(((rows,),), wrong=not_zero, unused=True),
        }

    def read(self, tensors: Mapping[str, Tensor], window: Window) -> Quantized | Integers:
        rows, columns = window.rows, window.columns
        values = unpack_rows(tensors["qweight"], self.bits)
        zeros = unpack_columns(tensors["qzeros"], self.bits)
        if self.bits == 3:
            values, zeros = values[slice(*columns)], zeros[:, slice(*rows)]
        zeros = zeros + self.less & (1 << self.bits) - 1
        scales, group_of = tensors["scales"].T.float(), tensors["g_idx"].long()
        found = Integers(values.T.contiguous(), scales, zeros.T, group_of, self.bits)
        group = self.group or columns[1]
        if not torch.equal(group_of, torch.arange(*columns) // group):
            return found
        here = slice(columns[0] // group, -(-columns[1] // group))
        return in_groups(found.values, scales[:, here], found.zeros[:, here], self.bits, self.group)
