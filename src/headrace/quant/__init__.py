"""How matrices are stored and multiplied: one method per format.

`quant_method` chooses, by the checkpoint or by --quantization. Knows no layer.
"""

from collections.abc import Mapping
from typing import Any

from headrace.core.errors import LoadError
from headrace.quant.base import QuantMethod
from headrace.quant.dense import METHODS


def quant_method(hf: Mapping[str, Any], quantization: str = "none") -> QuantMethod:
    """The method that a config.json or --quantization asks for.

    Raises:
        LoadError: the checkpoint is quantized in a way that is not supported.
    """
    config = hf.get("quantization_config")
    if config:
        name = config.get("quant_method") if isinstance(config, dict) else config
        raise LoadError(
            f"the checkpoint is quantized (quantization_config.quant_method={name!r}), "
            "which is not supported; use the unquantized checkpoint",
            field="quantization_config",
        )
    return METHODS[quantization]
