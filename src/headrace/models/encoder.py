"""Encoders of the BERT family: attention both ways, learned positions, a norm after each block.

One network; a family says what its checkpoints call things and where positions begin. Knows no
pooling. Invariant: the rows of a token depend on its own text alone.
"""

from abc import ABC, abstractmethod
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from headrace import ops
from headrace.core.errors import LoadError
from headrace.core.model_info import ModelInfo
from headrace.core.plan import StateSpec
from headrace.dist.topology import even, split_heads, whole
from headrace.layers.batch import ForwardBatch
from headrace.layers.build import Build
from headrace.layers.embedding import VocabEmbedding
from headrace.layers.linear import ColumnLinear, row_linear
from headrace.layers.norm import LayerNorm
from headrace.layers.weights import load_targets
from headrace.models.head import Head, HeadLayer, dense_layers
from headrace.ops.meta import KvCache
from headrace.quant.base import Part, Targets, cut_target, plain

ACTIVATIONS: dict[str, ops.Activation] = {
    "gelu": "gelu_erf",
    "gelu_new": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
}


@dataclass(frozen=True)
class Family:
    """`prefix` of checkpoint names in models with a head; `offset`: the first position's row.

    `head`: a classifier's two layers.
    """

    prefix: str
    offset: int
    head: tuple[str, str]


class EncoderLayer:
    """Attention and feed-forward; the sum of each with its input is normalized."""

    def __init__(self, info: ModelInfo, build: Build) -> None:
        hidden, dim = info.hidden_size, info.head_dim
        inner = int(info.hf["intermediate_size"])
        heads = split_heads(info.num_heads, info.num_heads, build.shard)
        cut = heads.q_cut(dim)
        parts = tuple(Part(name, cut) for name in ("query", "key", "value"))
        self.heads, self.dim, self.scale = len(heads.q), dim, dim**-0.5
        self.qkv = ColumnLinear(parts, hidden, build.at("attention.self"), bias=True)
        self.out = row_linear("dense", cut, hidden, build.at("attention.output"), bias=True)
        split, up = even(inner, build.shard), build.at("intermediate")
        self.up = ColumnLinear((Part("dense", split),), hidden, up, bias=True)
        self.down = row_linear("dense", split, hidden, build.at("output"), bias=True)
        eps = float(info.hf.get("layer_norm_eps", 1e-12))
        self.norm = LayerNorm(hidden, eps, build)
        self.mlp_norm = LayerNorm(hidden, eps, build)
        self.activation = _activation(info)

    def __call__(self, x: Tensor, batch: ForwardBatch, cache: KvCache) -> Tensor:
        qkv = self.qkv(x).view(len(x), 3, self.heads, self.dim)
        q, k, v = (part.contiguous() for part in qkv.unbind(1))
        ops.write_kv(k, v, cache, batch.meta.slots)
        mixed = ops.paged_attention(q, cache, batch.meta, scale=self.scale, causal=False)
        x = self.norm(self.out(mixed.flatten(1)) + x)
        return self.mlp_norm(self.down(ops.activate(self.up(x), self.activation)) + x)

    def targets(self, prefix: str) -> Targets:
        return (
            self.qkv.targets(f"{prefix}attention.self.")
            | self.out.targets(f"{prefix}attention.output.")
            | self.norm.targets(f"{prefix}attention.output.LayerNorm")
            | self.up.targets(f"{prefix}intermediate.")
            | self.down.targets(f"{prefix}output.")
            | self.mlp_norm.targets(f"{prefix}output.LayerNorm")
        )


class Encoder(ABC):
    """The `PooledModel` of an encoder. A family is a subclass that only overrides `family`."""

    def __init__(self, info: ModelInfo, build: Build) -> None:
        hf, hidden = info.hf, info.hidden_size
        if hf.get("position_embedding_type", "absolute") != "absolute":
            raise LoadError("positions must be absolute", field="position_embedding_type")
        if build.split.stage.shard.size > 1:
            raise LoadError("an encoder is one stage", field="pp_size")
        self.made = self.family(info)
        self.words = VocabEmbedding(info.vocab_size, hidden, build, "embeddings.word_embeddings")
        self.positions = torch.empty(int(hf["max_position_embeddings"]), hidden, dtype=build.dtype)
        self.types = torch.empty(int(hf.get("type_vocab_size", 1)), hidden, dtype=build.dtype)
        self.norm = LayerNorm(hidden, float(hf.get("layer_norm_eps", 1e-12)), build)
        self.layers = [
            EncoderLayer(info, build.at(f"encoder.layer.{index}"))
            for index in range(info.num_layers)
        ]
        self.head = Head(_head_layers(self.made, info))

    @staticmethod
    @abstractmethod
    def family(info: ModelInfo) -> Family:
        """What this checkpoint's names and positions are."""

    def forward(self, batch: ForwardBatch) -> Tensor:
        x = self.norm(self.words(batch.ids) + self.cos_sin(batch).to(self.positions.dtype))
        for layer, cache in zip(self.layers, batch.caches, strict=True):
            x = layer(x, batch, cache)
        return x

    def cos_sin(self, batch: ForwardBatch) -> Tensor:
        """fp32 [tokens, hidden]: what is added for a token's position and type."""
        types = torch.zeros_like(batch.positions)
        if batch.seconds is not None and len(self.types) > 1:
            types = (batch.positions >= batch.seconds).long()
        places = self.positions[batch.positions + self.made.offset]
        return places.float() + self.types[types].float()

    def logits(self, hidden: Tensor) -> Tensor:
        raise LoadError("an encoder has no vocabulary head")

    def scores(self, pooled: Tensor) -> Tensor:
        return self.head(pooled)

    def state_specs(self) -> list[StateSpec]:
        return [StateSpec(kv_heads=layer.heads, head_dim=layer.dim) for layer in self.layers]

    def prefix_scope(self, prompt_len: int) -> str:
        return ""

    def load_weights(self, weights: Iterable[tuple[str, Tensor]]) -> None:
        prefix = self.made.prefix
        self.fill((name.removeprefix(prefix), tensor) for name, tensor in weights)

    def fill(self, weights: Iterable[tuple[str, Tensor]]) -> None:
        load_targets(self.targets(), weights, self._ignored)

    def checkpoint_shapes(self) -> dict[str, tuple[int, ...]]:
        return {name: target.shape for name, target in self.targets().items()}

    def targets(self) -> Targets:
        """Every checkpoint tensor that has a place here, without the family's prefix."""
        hidden = whole(self.positions.shape[1])
        found = self.words.targets("embeddings.word_embeddings")
        for name, table in (("position", self.positions), ("token_type", self.types)):
            place = cut_target(plain(table), whole(len(table)), hidden)
            found[f"embeddings.{name}_embeddings.weight"] = place
        found |= self.norm.targets("embeddings.LayerNorm")
        for index, layer in enumerate(self.layers):
            found |= layer.targets(f"encoder.layer.{index}.")
        return found | self.head.targets()

    def _ignored(self, name: str) -> bool:
        # Position ids as a buffer; heads of pretraining; the pooler of a model that has no use.
        return name.startswith(("embeddings.position_ids", "cls.", "lm_head.", "pooler."))


class Bert(Encoder):
    """BERT (arXiv 1810.04805)."""

    @staticmethod
    def family(info: ModelInfo) -> Family:
        return Family(prefix="bert.", offset=0, head=("pooler.dense", "classifier"))


class Roberta(Encoder):
    """RoBERTa and XLM-R (arXiv 1907.11692, 1911.02116): rows up to the padding id are unused."""

    @staticmethod
    def family(info: ModelInfo) -> Family:
        offset = int(info.hf.get("pad_token_id") or 0) + 1
        head = ("classifier.dense", "classifier.out_proj")
        return Family(prefix="roberta.", offset=offset, head=head)


def _head_layers(family: Family, info: ModelInfo) -> list[HeadLayer]:
    hidden, labels = info.hidden_size, len(info.pooling.labels) if info.pooling else 0
    if not labels:
        return dense_layers(info)
    first, last = family.head
    return [
        HeadLayer(first, hidden, hidden, bias=True, activation="Tanh"),
        HeadLayer(last, hidden, labels, bias=True),
    ]


def _activation(info: ModelInfo) -> ops.Activation:
    name = str(info.hf.get("hidden_act", "gelu"))
    if name not in ACTIVATIONS:
        raise LoadError(
            f"unknown activation {name!r}; known: {', '.join(ACTIVATIONS)}", field="hidden_act"
        )
    return ACTIVATIONS[name]
