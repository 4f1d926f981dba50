"""Scales of an fp8 KV cache that stand in a JSON file of their own (--quantization-param-path).

    {"model_type": "llama",
     "kv_cache": {"dtype": "float8_e4m3fn", "scaling_factor": {"0": {"0": 0.03, "1": 0.02}}}}

`scaling_factor`: tensor-parallel rank -> layer -> what a stored 1 means, for keys and values. Those
that stand among the weights of a checkpoint are read by `layers.attention`.
"""

import logging
import math
from collections.abc import Iterable
from pathlib import Path
from typing import Protocol, runtime_checkable

import msgspec

from headrace.core.errors import LoadError
from headrace.core.model_info import ModelInfo
from headrace.dist.topology import Shard

logger = logging.getLogger(__name__)

FIELD = "quantization_param_path"


class KVCacheQuantSchema(msgspec.Struct, frozen=True):
    """The part `kv_cache`."""

    dtype: str
    scaling_factor: dict[int, dict[int, float]]

    def check_is_fp8(self) -> None:
        if self.dtype != "float8_e4m3fn":
            raise _wrong(f"kv_cache.dtype must be float8_e4m3fn, not {self.dtype!r}")

    def check_tp_ranks(self, size: int) -> None:
        if sorted(self.scaling_factor) != list(range(size)):
            raise _wrong(
                f"kv_cache.scaling_factor must be for ranks 0 to {size - 1}, not for "
                f"{sorted(self.scaling_factor)}"
            )

    def check_current_rank(self, rank: int, layers: int) -> None:
        """Every layer of the rank has a positive scale."""
        found = self.scaling_factor[rank]
        if sorted(found) != list(range(layers)):
            raise _wrong(
                f"kv_cache.scaling_factor.{rank} must be for layers 0 to {layers - 1}, not for "
                f"{sorted(found)}"
            )
        for layer, scale in found.items():
            if not (math.isfinite(scale) and scale > 0):
                raise _wrong(
                    f"kv_cache.scaling_factor.{rank}.{layer} must be a positive number, not {scale}"
                )


class QuantParamSchema(msgspec.Struct, frozen=True):
    """The whole file."""

    kv_cache: KVCacheQuantSchema
    model_type: str | None = None

    def check_model_type(self, expected: str) -> None:
        if self.model_type is not None and self.model_type != expected:
            raise _wrong(f"model_type is {self.model_type!r}, the model's is {expected!r}")


def kv_cache_scales_loader(
    filename: str, tp_rank: int, tp_size: int, num_hidden_layers: int, model_type: str
) -> Iterable[tuple[int, float]]:
    """(layer, scale) of every layer on this rank.

    Raises:
        LoadError: the file cannot be read, or is for another model or another number of ranks.
    """
    try:
        read = msgspec.json.decode(Path(filename).expanduser().read_bytes(), type=QuantParamSchema)
    except (OSError, RecursionError, msgspec.DecodeError) as error:
        raise _wrong(f"{filename} cannot be read: {error}") from error
    read.check_model_type(model_type)
    read.kv_cache.check_is_fp8()
    read.kv_cache.check_tp_ranks(tp_size)
    read.kv_cache.check_current_rank(tp_rank, num_hidden_layers)
    return read.kv_cache.scaling_factor[tp_rank].items()


@runtime_checkable
class HasKvScales(Protocol):
    """A model whose fp8 cache can have scales."""

    def kv_scales(self) -> list[tuple[float, float]]:
        """What a stored 1 means in each layer, in keys and in values."""
        ...

    def set_kv_scale(self, layer: int, scale: float) -> None:
        """One for keys and values; `layer` counts from the model's first, on every rank."""
        ...


def prepare_kv_scales(model: object, info: ModelInfo, path: str, shard: Shard) -> None:
    """Before an fp8 cache is made: read `path`, or tell that there are no scales.

    Raises:
        LoadError: as `kv_cache_scales_loader`, or the model can have no scales.
    """
    if path:
        if not isinstance(model, HasKvScales):
            raise _wrong(f"{info.architecture} does not support loading scaling factors")
        for layer, scale in kv_cache_scales_loader(
            path, shard.rank, shard.size, info.num_layers, info.model_type
        ):
            model.set_kv_scale(layer, scale)
        logger.info("Loaded KV cache scaling factors from %s", path)
    elif not isinstance(model, HasKvScales) or all(
        pair == (1.0, 1.0) for pair in model.kv_scales()
    ):
        logger.warning(
            "Using FP8 KV cache but no scaling factors provided. Defaulting to scaling factors of "
            "1.0. This may lead to less accurate results!"
        )


def _wrong(message: str) -> LoadError:
    return LoadError(f"--quantization-param-path: {message}", field=FIELD)
