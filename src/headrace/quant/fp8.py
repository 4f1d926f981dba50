"""Checkpoints of e4m3 weights: `quant_method` fp8 (DeepSeek, Qwen, vLLM) and fbgemm_fp8.

A scale for the tensor, for each output, or for each block of `weight_block_size`. Scales of x
(`input_scale`, of static activation schemes) are not needed: the kernel multiplies x as it is.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from headrace.core.errors import LoadError
from headrace.ops.packed import Quantized
from headrace.quant.base import FLOATS, Kind
from headrace.quant.local import Window
from headrace.quant.scheme import Config, Scheme, listed, modules_from_config
from headrace.quant.stored import Axis, Storage, Stored, wrong_scale

_IGNORED = ("modules_to_not_convert", "ignored_layers")
SCALES = (*FLOATS, torch.float8_e8m0fnu)


def scheme(config: Config) -> Scheme:
    """The scheme of a `quantization_config` with quant_method fp8 or fbgemm_fp8."""
    if config.get("activation_scheme", "dynamic") not in ("dynamic", "static"):
        raise LoadError(
            "quantization_config.activation_scheme must be dynamic or static, not "
            f"{config['activation_scheme']!r}",
            field="activation_scheme",
        )
    block = config.get("weight_block_size")
    if block is not None and not (
        isinstance(block, list)
        and len(block) == 2
        and all(isinstance(side, int) and side > 0 for side in block)
    ):
        raise LoadError(
            f"quantization_config.weight_block_size must be two positive numbers, not {block!r}",
            field="weight_block_size",
        )
    ignored = modules_from_config(config, *_IGNORED)
    storage = Fp8((block[0], block[1]), "weight_scale_inv") if block else Fp8()

    def of(module: str, kind: Kind) -> Storage | None:
        return None if kind == "embedding" or listed(module, ignored) else storage

    return of


@dataclass(frozen=True)
class Fp8:
    """`weight` e4m3 [rows, columns] and scales in `marker`: of each `block` (rows, columns), or of
    the tensor or each row."""

    block: tuple[int, int] | None = None
    marker: str = "weight_scale"
    name: str = "fp8"

    @property
    def align(self) -> tuple[int, int]:
        return self.block or (1, 1)

    def tensors(self, rows: int, columns: int) -> dict[str, Stored]:
        return {
            "weight": Stored(
                ((rows, columns),), (torch.float8_e4m3fn,), rows=Axis(0), columns=Axis(1)
            ),
            self.marker: self._scales(rows, columns),
            "input_scale": Stored(((), (1,)), unused=True),
            "input_scale_ub": Stored(((), (1,)), unused=True),
        }

    def _scales(self, rows: int, columns: int) -> Stored:
        if self.block is None:
            shapes: tuple[tuple[int, ...], ...] = ((), (1,), (1, 1), (rows,), (rows, 1))
            return Stored(shapes, SCALES, rows=Axis(0), wrong=wrong_scale)
        high, wide = self.block
        shape = -(-rows // high), -(-columns // wide)
        return Stored((shape,), SCALES, Axis(0, high), Axis(1, wide), wrong_scale)

    def read(self, tensors: Mapping[str, Tensor], window: Window) -> Quantized:
        rows, _ = window.shape
        scales = tensors[self.marker].float()
        if self.block is None:
            scales = scales.reshape(-1, 1).expand(rows, 1)
        else:
            scales = scales.repeat_interleave(self.block[0], 0)[:rows]
        return Quantized("fp8", tensors["weight"], scales, self.block[1] if self.block else 0)
