"""Checkpoints of AutoAWQ (arXiv 2306.00978), GEMM layout: 4 bits with a scale and a zero point per
group of inputs, eight outputs to a word. The integers, scales and zero points are kept exactly."""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from headrace.core.errors import LoadError
from headrace.ops.packed import Quantized
from headrace.quant.base import Kind
from headrace.quant.bits import not_finite, unpack_awq
from headrace.quant.local import Window
from headrace.quant.scheme import Config, Scheme, group_size, listed, modules_from_config
from headrace.quant.stored import Axis, Storage, Stored

_WORDS = (torch.int32,)


def scheme(config: Config) -> Scheme:
    """The scheme of a `quantization_config` with quant_method awq."""
    version = str(config.get("version") or config.get("format") or "gemm").lower()
    if version != "gemm":
        raise LoadError(
            f"quantization_config.version of AWQ must be gemm, not {version!r}", field="version"
        )
    bits = config.get("bits", config.get("w_bit", 4))
    if bits != 4:
        raise LoadError(f"quantization_config.bits of AWQ must be 4, not {bits!r}", field="bits")
    ignored = modules_from_config(config, "modules_to_not_convert")
    storage = Awq(group_size(config, "group_size", "q_group_size"))

    def of(module: str, kind: Kind) -> Storage | None:
        return None if kind == "embedding" or listed(module, ignored) else storage

    return of


@dataclass(frozen=True)
class Awq:
    """`qweight` int32 [in, out / 8], `qzeros` [groups, out / 8], `scales` [groups, out]; a `group`
    of 0 is all inputs."""

    group: int
    name: str = "awq"
    marker: str = "qweight"

    @property
    def align(self) -> tuple[int, int]:
        return 8, self.group or 1

    def tensors(self, rows: int, columns: int) -> dict[str, Stored]:
        group = self.group or columns
        if rows % 8 or columns % group:
            raise ValueError(f"outputs are not a multiple of 8, or inputs not of {group}")
        groups, along = columns // group, Axis(0, group)
        return {
            "qweight": Stored(((columns, rows // 8),), _WORDS, rows=Axis(1, 8), columns=Axis(0)),
            "qzeros": Stored(((groups, rows // 8),), _WORDS, rows=Axis(1, 8), columns=along),
            "scales": Stored(((groups, rows),), rows=Axis(1), columns=along, wrong=not_finite),
        }

    def read(self, tensors: Mapping[str, Tensor], window: Window) -> Quantized:
        scales = tensors["scales"].T.float()
        values, zeros = (unpack_awq(tensors[name]).T for name in ("qweight", "qzeros"))
        return Quantized("int4", values.contiguous(), scales, self.group, scales * zeros)
