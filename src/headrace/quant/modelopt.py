"""Checkpoints of NVIDIA ModelOpt: e4m3 weights with a scale per tensor (quant_algo FP8).

The description stands in config.json, or in hf_quant_config.json under `quantization`.
"""

from fnmatch import fnmatchcase

from headrace.core.errors import LoadError
from headrace.quant.base import Kind
from headrace.quant.fp8 import Fp8
from headrace.quant.scheme import Config, Scheme, listed, modules_from_config
from headrace.quant.stored import Storage


def scheme(config: Config) -> Scheme:
    """The scheme of a `quantization_config` with quant_method modelopt."""
    nested = config.get("quantization")
    own = nested if isinstance(nested, dict) else config
    algorithm = str(own.get("quant_algo"))
    if algorithm.upper() != "FP8":
        raise LoadError(
            f"quantization_config.quant_algo is {algorithm}; supported: FP8", field="quant_algo"
        )
    left = modules_from_config(own, "exclude_modules", "ignore")

    def of(module: str, kind: Kind) -> Storage | None:
        excluded = listed(module, left) or any(fnmatchcase(module, name) for name in left)
        return None if kind == "embedding" or excluded else Fp8()

    return of
