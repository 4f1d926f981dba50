"""Checkpoints of torchao as transformers saves them: `quant_method` torchao.

A quantized tensor of torchao is stored as the plain tensors it consists of. What its configuration
quantizes x to is left to the kernels.
"""

from typing import Any

from headrace.core.errors import LoadError
from headrace.quant.base import Kind
from headrace.quant.fp8 import Fp8
from headrace.quant.integers import Integers
from headrace.quant.scheme import Config, Scheme, listed, modules_from_config
from headrace.quant.stored import Renamed, Storage

_SUFFIXES = (
    ("weight", "_weight_qdata"),
    ("weight_scale", "_weight_scale"),
    ("weight_zero_point", "_weight_zero_point"),
)
_INT8 = ("Int8WeightOnlyConfig", "Int8DynamicActivationInt8WeightConfig")
_FLOAT8 = ("Float8WeightOnlyConfig", "Float8DynamicActivationFloat8WeightConfig")
_INTX = ("IntxWeightOnlyConfig", "Int8DynamicActivationIntxWeightConfig")


def scheme(config: Config) -> Scheme:
    """The scheme of a `quantization_config` with quant_method torchao."""
    kinds = config.get("quant_type")
    default = kinds.get("default") if isinstance(kinds, dict) else None
    if not isinstance(default, dict) or not isinstance(default.get("_data"), dict):
        raise LoadError(
            "quantization_config.quant_type must be {'default': a configuration of torchao}, "
            f"not {kinds!r}",
            field="quant_type",
        )
    storage = Renamed(_storage(str(default.get("_type")), default["_data"]), _SUFFIXES)
    ignored = modules_from_config(config, "modules_to_not_convert")

    def of(module: str, kind: Kind) -> Storage | None:
        return None if listed(module, ignored) else storage

    return of


def _storage(kind: str, data: dict[str, Any]) -> Storage:
    granularity = data.get("granularity") or data.get("weight_granularity") or {}
    parts = granularity if isinstance(granularity, list) else [granularity]
    share = str(parts[-1].get("_type")) if isinstance(parts[-1], dict) else ""
    if kind in _FLOAT8:
        dtype = data.get("weight_dtype", {"_data": "float8_e4m3fn"})
        if dtype.get("_data") == "float8_e4m3fn" and share in ("PerRow", "PerTensor"):
            return Fp8()
    elif kind in _INT8 and share in ("PerRow", "PerTensor"):
        return Integers(8, 0, packed=False, symmetric=False)
    elif kind in _INTX and share in ("PerGroup", "PerAxis"):
        bits = _bits(data.get("weight_dtype"))
        group = int(parts[-1]["_data"]["group_size"]) if share == "PerGroup" else 0
        packing = data.get("intx_packing_format") or {}
        if packing.get("_data") == "UNPACKED_TO_INT8" and 1 <= bits <= 8 and group >= 0:
            return Integers(4 if bits <= 4 else 8, group, packed=False, symmetric=False)
    raise LoadError(
        f"quantization_config.quant_type is {kind} ({share or 'no granularity'}), which is not "
        f"supported; supported are {', '.join((*_INT8, *_FLOAT8, *_INTX))}",
        field="quant_type",
    )


def _bits(dtype: Any) -> int:
    """Of int1 to int8, 0 for others."""
    name = str(dtype.get("_data")) if isinstance(dtype, dict) else ""
    return int(name[3:]) if name.startswith("int") and name[3:].isdigit() else 0
