"""Architectures: one table from the name in config.json to a class, imported when needed."""

import difflib
import importlib
from collections.abc import Iterable
from typing import Protocol

from torch import Tensor

from headrace.core.errors import LoadError
from headrace.core.model_info import ModelInfo
from headrace.core.plan import StateSpec
from headrace.layers.batch import ForwardBatch
from headrace.layers.build import Build

ARCHITECTURES = {
    "LlamaForCausalLM": "dense:LlamaForCausalLM",
    "MistralForCausalLM": "dense:MistralForCausalLM",
    "Qwen2ForCausalLM": "dense:Qwen2ForCausalLM",
    "Qwen3ForCausalLM": "dense:Qwen3ForCausalLM",
    "LlamaModel": "dense:LlamaForCausalLM",
    "MistralModel": "dense:MistralForCausalLM",
    "Qwen2Model": "dense:Qwen2ForCausalLM",
    "Qwen3Model": "dense:Qwen3ForCausalLM",
    "LlamaForSequenceClassification": "dense:LlamaForCausalLM",
    "MistralForSequenceClassification": "dense:MistralForCausalLM",
    "Qwen2ForSequenceClassification": "dense:Qwen2ForCausalLM",
    "Qwen3ForSequenceClassification": "dense:Qwen3ForCausalLM",
    "Qwen2ForRewardModel": "dense:Qwen2ForCausalLM",
    "Qwen3ForRewardModel": "dense:Qwen3ForCausalLM",
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

    def checkpoint_shapes(self) -> dict[str, tuple[int, ...]]:
        """Name and whole shape of every tensor that `load_weights` needs."""
        ...


def make_model(info: ModelInfo, build: Build) -> Model:
    """The network of a checkpoint; one that is to be pooled has `scores` too.

    Raises:
        LoadError: unknown architecture, or the configuration is none that it can have.
    """
    found = model_class(info.architecture)
    if info.pooling is None or info.pooling.encoder:
        return found(info, build)
    from headrace.models.decoder import Decoder
    from headrace.models.pooled import PooledDecoder

    if not issubclass(found, Decoder):
        raise LoadError(f"{info.architecture} cannot make embeddings", field="is_embedding")
    return PooledDecoder(found, info, build)


def model_class(architecture: str) -> type[Model]:
    """The class for a name in config.json's `architectures`.

    Raises:
        LoadError: unknown; names the closest ones.
    """
    place = ARCHITECTURES.get(architecture)
    if place is None:
        close = difflib.get_close_matches(architecture, ARCHITECTURES, n=3) or list(ARCHITECTURES)
        raise LoadError(
            f"architecture {architecture!r} is not supported; close to it: {', '.join(close)}",
            field="architectures",
        )
    module, _, name = place.partition(":")
    found: type[Model] = getattr(importlib.import_module(f"{__name__}.{module}"), name)
    return found
