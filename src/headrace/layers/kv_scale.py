"""Scales of keys and values among the tensors of a checkpoint, under whatever name they have."""

import logging
import re
from collections.abc import Container, Iterable, Iterator

import torch
from torch import Tensor

from headrace.core.errors import LoadError
from headrace.quant.base import FLOATS, Targets, WeightTarget
from headrace.quant.stored import wrong_scale

logger = logging.getLogger(__name__)

_PLACES = r"(?:\.attn|\.qkv_proj|\.attention|\.attn_mqa|(?:\.mla_attn){1,2})?"
_NAMES = (
    (re.compile(rf"\.self_attn{_PLACES}\.([kv])_scale$"), r".self_attn.\1_scale"),
    (re.compile(r"\.self_attn\.([kv])_proj\.\1_scale$"), r".self_attn.\1_scale"),
    (re.compile(r"\.self_attn\.([kv])_proj\.output_scale$"), r".self_attn.\1_scale"),
    (re.compile(rf"\.self_attn{_PLACES}\.kv_scale$"), r".self_attn.kv_scale"),
)
# Scales of a quantized attention that is not computed here.
_UNUSED = re.compile(r"\.self_attn\.(?:\w+\.)?(q_scale|prob_scale|prob_output_scale)$")


def maybe_remap_kv_scale_name(name: str, params: Container[str]) -> str | None:
    """The model's name of a scale of keys or values; other names stay.

    None: the model has no such scale; told in a warning.
    """
    for pattern, replacement in _NAMES:
        if not pattern.search(name):
            continue
        found = pattern.sub(replacement, name)
        if found in params:
            return found
        logger.warning("%s is not loaded: the model has no scale %s", name, found)
        return None
    return None if _UNUSED.search(name) else name


def with_kv_scales(
    weights: Iterable[tuple[str, Tensor]], params: Container[str]
) -> Iterator[tuple[str, Tensor]]:
    """The same weights, with scales under the model's names."""
    for name, tensor in weights:
        found = maybe_remap_kv_scale_name(name, params)
        if found is not None:
            yield found, tensor


def scale_targets(prefix: str, scales: Tensor) -> Targets:
    """Targets of `k_scale` and `v_scale`, and of `kv_scale` for both; scales fp32 [2]."""

    def one(name: str, place: Tensor) -> WeightTarget:
        def copy(source: Tensor) -> None:
            wrong = wrong_scale(source)
            if wrong:
                raise LoadError(f"tensor {prefix}{name} {wrong}")
            place.copy_(source.reshape(-1))

        kinds = (torch.float8_e8m0fnu, *FLOATS)
        return WeightTarget((), copy, dtypes=kinds, other_shapes=((1,),), optional=True)

    return {
        f"{prefix}k_scale": one("k_scale", scales[:1]),
        f"{prefix}v_scale": one("v_scale", scales[1:]),
        f"{prefix}kv_scale": one("kv_scale", scales),
    }
