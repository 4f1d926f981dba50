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
    "LlamaForCausalLM": "llama:LlamaForCausalLM",
    "ArceeForCausalLM": "llama:ArceeForCausalLM",
    "HeliumForCausalLM": "llama:HeliumForCausalLM",
    "MistralForCausalLM": "llama:MistralForCausalLM",
    "MinistralForCausalLM": "llama:MinistralForCausalLM",
    "Qwen2ForCausalLM": "llama:Qwen2ForCausalLM",
    "Qwen3ForCausalLM": "llama:Qwen3ForCausalLM",
    "Phi3ForCausalLM": "llama:Phi3ForCausalLM",
    "InternLM2ForCausalLM": "llama:InternLM2ForCausalLM",
    "InternLM3ForCausalLM": "llama:InternLM3ForCausalLM",
    "BaichuanForCausalLM": "llama:BaichuanForCausalLM",
    "SmolLM3ForCausalLM": "llama:SmolLM3ForCausalLM",
    "GraniteForCausalLM": "llama:GraniteForCausalLM",
    "MiniCPMForCausalLM": "llama:MiniCPMForCausalLM",
    "OlmoForCausalLM": "llama:OlmoForCausalLM",
    "Olmo2ForCausalLM": "llama:Olmo2ForCausalLM",
    "Olmo3ForCausalLM": "llama:Olmo3ForCausalLM",
    "Exaone4ForCausalLM": "llama:Exaone4ForCausalLM",
    "GemmaForCausalLM": "gemma:GemmaForCausalLM",
    "Gemma2ForCausalLM": "gemma:Gemma2ForCausalLM",
    "Gemma3ForCausalLM": "gemma:Gemma3ForCausalLM",
    "GlmForCausalLM": "gemma:GlmForCausalLM",
    "Glm4ForCausalLM": "gemma:Glm4ForCausalLM",
    "ChatGLMModel": "gemma:ChatGLMModel",
    "ChatGLMForConditionalGeneration": "gemma:ChatGLMModel",
    "GPTJForCausalLM": "gpt:GPTJForCausalLM",
    "GPTNeoXForCausalLM": "gpt:GPTNeoXForCausalLM",
    "OPTForCausalLM": "gpt:OPTForCausalLM",
    "FalconForCausalLM": "gpt:FalconForCausalLM",
    "PhiForCausalLM": "gpt:PhiForCausalLM",
    "StableLmForCausalLM": "gpt:StableLmForCausalLM",
    "Starcoder2ForCausalLM": "gpt:Starcoder2ForCausalLM",
    "NemotronForCausalLM": "gpt:NemotronForCausalLM",
    "CohereForCausalLM": "gpt:CohereForCausalLM",
    "Cohere2ForCausalLM": "gpt:Cohere2ForCausalLM",
    "MixtralForCausalLM": "moe:MixtralForCausalLM",
    "Qwen2MoeForCausalLM": "moe:Qwen2MoeForCausalLM",
    "Qwen3MoeForCausalLM": "moe:Qwen3MoeForCausalLM",
    "OlmoeForCausalLM": "moe:OlmoeForCausalLM",
    "GraniteMoeForCausalLM": "moe:GraniteMoeForCausalLM",
    "Glm4MoeForCausalLM": "moe:Glm4MoeForCausalLM",
    "Ernie4_5_MoeForCausalLM": "moe:Ernie4_5_MoeForCausalLM",
    "MiniMaxM2ForCausalLM": "moe:MiniMaxM2ForCausalLM",
    "DbrxForCausalLM": "moe:DbrxForCausalLM",
    "GPT2LMHeadModel": "gpt:GPT2LMHeadModel",
    "BaiChuanForCausalLM": "llama:BaichuanForCausalLM",
    "LlamaModel": "llama:LlamaForCausalLM",
    "LlamaForSequenceClassification": "llama:LlamaForCausalLM",
    "MistralModel": "llama:MistralForCausalLM",
    "MistralForSequenceClassification": "llama:MistralForCausalLM",
    "Qwen2Model": "llama:Qwen2ForCausalLM",
    "Qwen2ForSequenceClassification": "llama:Qwen2ForCausalLM",
    "Qwen3Model": "llama:Qwen3ForCausalLM",
    "Qwen3ForSequenceClassification": "llama:Qwen3ForCausalLM",
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


def borrowed(architecture: str) -> bool:
    """Whether only transformers implements it; looked up without importing a model's code."""
    if architecture in ARCHITECTURES:
        return False
    import transformers

    return hasattr(transformers, architecture)


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
