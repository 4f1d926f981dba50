"""Checkpoints of bitsandbytes: NF4 and FP4 (arXiv 2305.14314) and LLM.int8 (arXiv 2208.07339).

4 bits: places in a table, a scale for each run of `blocksize` values, row after row; scales may be
quantized themselves. int8: a scale per output; outliers of x, which bitsandbytes multiplies in
16 bits, are rounded to 8 here as all of x is.
"""

import json
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from headrace.core.errors import LoadError
from headrace.ops.packed import TABLES, Quantized
from headrace.quant.base import Kind
from headrace.quant.bits import not_finite
from headrace.quant.local import Window
from headrace.quant.scheme import Config, Scheme, listed, modules_from_config
from headrace.quant.stored import Axis, Storage, Stored

_BLOCKS = (64, 32, 128, 256, 512, 1024, 2048, 4096)
_GROUPS = (64, 32, 16)  # that rows may be cut into where they are not whole blocks
_MOST_STATE = 500  # bytes of JSON
_FP32, _BYTES = (torch.float32,), (torch.uint8,)


def scheme(config: Config) -> Scheme:
    """The scheme of a `quantization_config` with quant_method bitsandbytes."""
    skipped = modules_from_config(config, "llm_int8_skip_modules")
    storage = _storage(config)

    def of(module: str, kind: Kind) -> Storage | None:
        return None if kind == "embedding" or listed(module, skipped) else storage

    return of


def _storage(config: Config) -> Storage:
    if config.get("load_in_8bit") or config.get("_load_in_8bit"):
        return Bnb8()
    kind = config.get("bnb_4bit_quant_type", "fp4")
    if kind not in ("nf4", "fp4"):
        raise LoadError(
            f"quantization_config.bnb_4bit_quant_type must be nf4 or fp4, not {kind!r}",
            field="bnb_4bit_quant_type",
        )
    if config.get("bnb_4bit_quant_storage", "uint8") != "uint8":
        raise LoadError(
            "quantization_config.bnb_4bit_quant_storage must be uint8",
            field="bnb_4bit_quant_storage",
        )
    return Bnb4(kind, bool(config.get("bnb_4bit_use_double_quant")))


@dataclass(frozen=True)
class Bnb8:
    """`weight` int8 [out, in], `SCB` [out]: what 127 stands for."""

    name: str = "bitsandbytes int8"
    marker: str = "SCB"
    align: tuple[int, int] = (1, 1)

    def tensors(self, rows: int, columns: int) -> dict[str, Stored]:
        return {
            "weight": Stored(((rows, columns),), (torch.int8,), Axis(0), Axis(1)),
            "SCB": Stored(((rows,),), _FP32, Axis(0), wrong=_no_size),
            "weight_format": Stored(((), (1,)), _BYTES, unused=True),
        }

    def read(self, tensors: Mapping[str, Tensor], window: Window) -> Quantized:
        return Quantized("int8", tensors["weight"], tensors["SCB"][:, None] / 127)


@dataclass(frozen=True)
class Bnb4:
    """`weight` uint8 [out * in / 2, 1], of two values the first in the high half; `weight.absmax`
    of each block, bytes where it is `nested`; `weight.quant_state...`: sizes as JSON."""

    name: str
    nested: bool
    marker: str = "weight.absmax"
    align: tuple[int, int] = (1, 64)

    @property
    def _state(self) -> str:
        return f"weight.quant_state.bitsandbytes__{self.name}"

    def tensors(self, rows: int, columns: int) -> dict[str, Stored]:
        size = rows * columns
        if size % 2:
            raise ValueError("the number of values is odd")
        counts = tuple((-(-size // block),) for block in _BLOCKS)
        absmax = Stored(counts, _BYTES) if self.nested else Stored(counts, _FP32, wrong=_no_size)
        found = {
            "weight": Stored(((size // 2, 1),), _BYTES),
            "weight.absmax": absmax,
            "weight.quant_map": Stored(((16,),), _FP32, wrong=self._another_table),
            self._state: Stored((), _BYTES, wrong=_other_sizes(rows, columns)),
        }
        if self.nested:
            nested = tuple(sorted({(-(-count[0] // 256),) for count in counts}, reverse=True))
            found["weight.nested_absmax"] = Stored(nested, _FP32, wrong=_no_size)
            found["weight.nested_quant_map"] = Stored(((256,),), _FP32, wrong=not_finite)
        return found

    def _another_table(self, table: Tensor) -> str:
        known = torch.allclose(table, TABLES[self.name], rtol=0, atol=1e-6)
        return "" if known else f"is not the table of {self.name}"

    def read(self, tensors: Mapping[str, Tensor], window: Window) -> Quantized | Tensor:
        state = _parsed(tensors[self._state])
        columns, block = state["shape"][1], state["blocksize"]
        octets = tensors["weight"].flatten()
        values = torch.stack([octets >> 4, octets & 15], dim=1).view(-1, columns)
        absmax = self._absmax(tensors, state)
        if len(absmax) != -(-values.numel() // block):
            raise ValueError(
                f"{len(absmax)} scales for {values.numel()} values in blocks of {block}"
            )
        group = next((g for g in (block, *_GROUPS) if block % g == columns % g == 0), 1)
        scales = absmax[torch.arange(0, values.numel(), group) // block].view(-1, columns // group)
        rows, (low, high) = slice(*window.rows), window.columns
        values, scales = values[rows, low:high], scales[rows]
        if group == 1:
            return TABLES[self.name][values.long()] * scales[:, low:high]
        if group > 128:  # narrower ones fit every window
            scales, group = scales.repeat_interleave(group // 64, 1), 64
        return Quantized(self.name, values, scales[:, low // group : -(-high // group)], group)

    def _absmax(self, tensors: Mapping[str, Tensor], state: Mapping[str, Any]) -> Tensor:
        absmax = tensors["weight.absmax"]
        if not self.nested:
            return absmax
        size, scales = state["nested_blocksize"], tensors["weight.nested_absmax"]
        places = torch.arange(len(absmax)) // size
        if int(places[-1]) >= len(scales):
            raise ValueError(f"too few nested scales for blocks of {size}")
        numbers = tensors["weight.nested_quant_map"][absmax.long()]
        return numbers * scales[places] + float(state["nested_offset"])


def _no_size(scales: Tensor) -> str:
    """What is wrong with the largest sizes of values, "" for nothing: those of zeros are 0."""
    below = bool((scales < 0).any())
    return not_finite(scales) or ("holds a scale that is negative" if below else "")


def _other_sizes(rows: int, columns: int) -> Callable[[Tensor], str]:
    def wrong(raw: Tensor) -> str:
        try:
            shape = _parsed(raw)["shape"]
        except ValueError as error:
            return f"cannot be read: {error}"
        same = list(shape) == [rows, columns]
        return "" if same else f"says that the matrix is {shape}, not {[rows, columns]}"

    return wrong


def _parsed(raw: Tensor) -> dict[str, Any]:
    """The state of a matrix; raises ValueError."""
    if raw.numel() > _MOST_STATE:
        raise ValueError(f"it has {raw.numel()} bytes")
    state = json.loads(raw.numpy().tobytes())
    if not isinstance(state, dict):
        raise ValueError("it is no object")
    shape, sizes = state.get("shape"), [state.get("blocksize"), state.get("nested_blocksize", 1)]
    if not isinstance(shape, list) or len(shape) != 2:
        raise ValueError(f"its shape is {shape!r}")
    if not all(isinstance(size, int) and 0 < size < 1 << 31 for size in (*shape, *sizes)):
        raise ValueError(f"its sizes are {shape}, {sizes}")
    offset = state.setdefault("nested_offset", 0.0)
    if not isinstance(offset, int | float) or not math.isfinite(offset):
        raise ValueError(f"its nested_offset is {offset!r}")
    return state | {"nested_blocksize": sizes[1]}
