"""Architectures: one table from the name in config.json to a class, imported when needed.

Packages add their own by entry points of the group `headrace.models`, with the name of the
architecture and "module:Class".
"""

import difflib
import importlib
import importlib.metadata
from collections.abc import Iterable
from typing import Protocol

from torch import Tensor

from headrace.core.errors import LoadError
from headrace.core.model_info import WRONG_FIELD, ModelInfo
from headrace.core.plan import StateSpec
from headrace.layers.batch import ForwardBatch
from headrace.layers.build import Build

_CAUSAL = {
    "llama": "Llama Arcee Helium Mistral Ministral Qwen2 Qwen3 Phi3 InternLM2 InternLM3 Baichuan "
    "SmolLM3 Ernie4_5 Granite MiniCPM Olmo Olmo2 Olmo3 Exaone4",
    "gemma": "Gemma Gemma2 Gemma3 Glm Glm4",
    "gpt": "GPTJ GPTNeoX Bloom Mpt OPT Falcon Phi StableLm Starcoder2 Nemotron Cohere Cohere2",
    "deepseek": "DeepseekV2 DeepseekV3 MiniCPM3",
    "moe": "Mixtral Qwen2Moe Qwen3Moe Olmoe GraniteMoe Glm4Moe Ernie4_5_Moe MiniMaxM2 Dbrx "
    "Phimoe Llama4",
    "gpt_oss": "GptOss",
}
"""Module -> the families in it, each the class `<family>ForCausalLM`."""

_POOLED = "Llama Mistral Qwen2 Qwen3"
"""Families of `llama` whose checkpoints may have another head, or none."""

GROUP = "headrace.models"
_HEADS = ("Model", "ForSequenceClassification", "ForRewardModel")

ARCHITECTURES = {
    f"{family}ForCausalLM": f"{module}:{family}ForCausalLM"
    for module, families in _CAUSAL.items()
    for family in families.split()
}
ARCHITECTURES |= {
    f"{family}{head}": f"llama:{family}ForCausalLM" for family in _POOLED.split() for head in _HEADS
}
ARCHITECTURES |= {
    "BaiChuanForCausalLM": "llama:BaichuanForCausalLM",
    "ChatGLMForConditionalGeneration": "gemma:ChatGLMModel",
    "ChatGLMModel": "gemma:ChatGLMModel",
    "PhiMoEForCausalLM": "moe:PhimoeForCausalLM",
    "Llama4ForConditionalGeneration": "moe:Llama4ForCausalLM",
    "GPT2LMHeadModel": "gpt:GPT2LMHeadModel",
    "BertModel": "encoder:Bert",
    "BertForSequenceClassification": "encoder:Bert",
    "RobertaModel": "encoder:Roberta",
    "RobertaForSequenceClassification": "encoder:Roberta",
    "XLMRobertaModel": "encoder:Roberta",
    "XLMRobertaForSequenceClassification": "encoder:Roberta",
    "CamembertModel": "encoder:Roberta",
    "CamembertForSequenceClassification": "encoder:Roberta",
}


class Model(Protocol):
    """One rank's part of a network. Weights are uninitialized until `load_weights`."""

    def __init__(self, info: ModelInfo, build: Build) -> None: ...

    def forward(self, batch: ForwardBatch) -> Tensor:
        """[tokens, hidden], after the final norm; writes the tokens' state to the caches."""
        ...

    def cos_sin(self, batch: ForwardBatch) -> Tensor:
        """fp32 [tokens, n], what `forward` looks up per position: the cosines and sines of RoPE."""
        ...

    def logits(self, hidden: Tensor) -> Tensor:
        """[n, hidden] -> fp32 [n, vocab]."""
        ...

    def state_specs(self) -> list[StateSpec]:
        """What each layer keeps on this rank."""
        ...

    def load_weights(self, weights: Iterable[tuple[str, Tensor]]) -> None:
        """Take every tensor of a checkpoint, in any order; raises LoadError if one is wrong."""
        ...

    def prefix_scope(self, prompt_len: int) -> str:
        """Prompts of different scope must not share cached prefixes; "" for nearly all models."""
        ...

    def fill(self, weights: Iterable[tuple[str, Tensor]]) -> None:
        """`load_weights` of tensors with the model's own names and shapes, not a checkpoint's."""
        ...

    def checkpoint_shapes(self) -> dict[str, tuple[int, ...]]:
        """Name and whole shape of every tensor that `fill` needs."""
        ...


def make_model(info: ModelInfo, build: Build) -> Model:
    """The network of a checkpoint; one that is to be pooled has `scores` too.

    Raises:
        LoadError: unknown architecture, or the configuration is none that it can have.
    """
    try:
        return _made(info, build)
    except (*WRONG_FIELD, RuntimeError) as error:
        raise LoadError(
            f"{info.path}/config.json has a field that {info.architecture} cannot have: {error!r}"
        ) from error


def _made(info: ModelInfo, build: Build) -> Model:
    found = model_class(info.architecture)
    if info.pooling is None or info.pooling.encoder:
        return found(info, build)
    from headrace.models.decoder import Decoder
    from headrace.models.pooled import PooledDecoder

    if not issubclass(found, Decoder):
        raise LoadError(f"{info.architecture} cannot make embeddings", field="is_embedding")
    return PooledDecoder(found, info, build)


def borrowed(architecture: str) -> bool:
    """Whether only transformers implements it; looked up without importing a model's code."""
    if place_of(architecture):
        return False
    import transformers

    return hasattr(transformers, architecture)


def place_of(architecture: str) -> str:
    """Where its class is: "module:Class"; "" for an unknown one. Ours go before those of others."""
    if place := ARCHITECTURES.get(architecture):
        return f"{__name__}.{place}"
    found = importlib.metadata.entry_points(group=GROUP, name=architecture)
    return next(iter(found)).value if found else ""


def model_class(architecture: str) -> type[Model]:
    """The class for a name in config.json's `architectures`.

    Raises:
        LoadError: unknown; names the closest ones. Or a package's class cannot be had.
    """
    place = place_of(architecture)
    if not place:
        close = difflib.get_close_matches(architecture, ARCHITECTURES, n=3) or list(ARCHITECTURES)
        raise LoadError(
            f"architecture {architecture!r} is not supported; close to it: {', '.join(close)}",
            field="architectures",
        )
    module, _, name = place.partition(":")
    try:
        found: type[Model] = getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError) as error:
        raise LoadError(
            f"architecture {architecture!r}: {place} cannot be had: {error}", field="architectures"
        ) from error
    return found
