"""What an Engine tells about its model."""

from typing import Any

from headrace.core.config import Config
from headrace.core.model_info import ModelInfo
from headrace.frontend.native import WEIGHT_VERSION


def model_facts(config: Config, info: ModelInfo) -> dict[str, Any]:
    """The answer of `Engine.get_model_info`."""
    model = config.model
    return {
        "model_path": model.model_path,
        "served_model_name": model.served_model_name,
        "tokenizer_path": model.tokenizer_path,
        "is_generation": info.pooling is None,
        "weight_version": WEIGHT_VERSION,
        "model_type": info.model_type,
        "architectures": [info.architecture],
        "max_model_len": model.context_length,
        "vocab_size": info.vocab_size,
        "eos_token_ids": list(info.eos_token_ids),
    }
