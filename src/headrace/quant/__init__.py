"""How matrices are stored and multiplied: one method per format.

`quantization_of` chooses, by the checkpoint (`quant.checkpoint`) or by --quantization. Knows no
layer.
"""

from collections.abc import Callable, Iterable

from headrace.core.errors import LoadError
from headrace.core.model_info import ModelInfo
from headrace.quant.base import Quantization
from headrace.quant.checkpoint import from_checkpoint, method_names, stored_config
from headrace.quant.dense import ON_LOAD


def quantization_of(
    info: ModelInfo,
    asked: str = "none",
    stored: Callable[[ModelInfo], Iterable[str]] = lambda info: (),
) -> Quantization:
    """What a checkpoint says, or --quantization where it is not quantized.

    `stored`: gives the names of its tensors, as far as they are known.

    Raises:
        LoadError: quantized in a way that is not supported, or otherwise than was asked for.
    """
    config = stored_config(info)
    if config is None:
        if asked not in ON_LOAD:
            raise LoadError(
                f"--quantization {asked} needs a checkpoint that is stored so; "
                f"this one is not quantized, and can be to {', '.join(ON_LOAD)}",
                field="quantization",
            )
        return ON_LOAD[asked]
    method = str(config.get("quant_method", ""))
    if asked != "none" and asked not in method_names(method):
        raise LoadError(
            f"--quantization {asked} was asked for, but the checkpoint is quantized with {method}; "
            "leave the option out",
            field="quantization",
        )
    return from_checkpoint(config, info, stored(info))
