"""A decoder-only transformer built from a description.

Knows no architecture by name: it reads the fields of `DecoderSpec` and nothing else. Checkpoint
names follow the layout that nearly all dense decoders share.
"""

from abc import ABC, abstractmethod
from collections.abc import Iterable
from dataclasses import dataclass, replace

from torch import Tensor

from headrace.core.model_info import ModelInfo
from headrace.core.plan import StateSpec
from headrace.layers.attention import Attention, AttentionSpec
from headrace.layers.batch import ForwardBatch
from headrace.layers.build import Build
from headrace.layers.embedding import LMHead, VocabEmbedding
from headrace.layers.mlp import GatedMLP
from headrace.layers.norm import RMSNorm
from headrace.layers.rope import Rope, prefix_scope
from headrace.layers.rope_scaling import RopeSpec
from headrace.layers.weights import load_targets
from headrace.ops.meta import KvCache
from headrace.quant.base import Targets


@dataclass(frozen=True)
class DecoderSpec:
    """One dense decoder. `windows`: sliding window of each layer, 0 sees everything."""

    vocab_size: int
    inner_size: int
    activation: str
    attention: AttentionSpec
    windows: tuple[int, ...]
    rope: RopeSpec
    eps: float
    mlp_bias: bool = False
    tied: bool = False


class DecoderLayer:
    """Attention and feed-forward, each behind a norm, on a residual stream."""

    def __init__(self, spec: DecoderSpec, window: int, build: Build) -> None:
        hidden = spec.attention.hidden_size
        self.norm = RMSNorm(hidden, spec.eps, build)
        self.attention = Attention(replace(spec.attention, window=window), build)
        self.mlp_norm = RMSNorm(hidden, spec.eps, build)
        self.mlp = GatedMLP(hidden, spec.inner_size, spec.activation, build, bias=spec.mlp_bias)

    def __call__(
        self,
        x: Tensor,
        residual: Tensor | None,
        cos_sin: Tensor,
        batch: ForwardBatch,
        cache: KvCache,
    ) -> tuple[Tensor, Tensor]:
        x, residual = self.norm(x, residual)
        x = self.attention(x, cos_sin, batch, cache)
        x, residual = self.mlp_norm(x, residual)
        return self.mlp(x), residual

    def targets(self, prefix: str) -> Targets:
        return (
            self.norm.targets(f"{prefix}input_layernorm")
            | self.attention.targets(f"{prefix}self_attn.")
            | self.mlp_norm.targets(f"{prefix}post_attention_layernorm")
            | self.mlp.targets(f"{prefix}mlp.")
        )


class Decoder(ABC):
    """The `Model` of a dense decoder. A family is a subclass that only overrides `describe`."""

    def __init__(self, info: ModelInfo, build: Build) -> None:
        spec = self.describe(info)
        hidden = spec.attention.hidden_size
        self.tied = spec.tied
        self.embedding = VocabEmbedding(spec.vocab_size, hidden, build)
        self.layers = [DecoderLayer(spec, window, build) for window in spec.windows]
        self.norm = RMSNorm(hidden, spec.eps, build)
        self.head = LMHead(
            spec.vocab_size, hidden, build, tied=self.embedding if spec.tied else None
        )
        self.rope = Rope(spec.rope)

    @staticmethod
    @abstractmethod
    def describe(info: ModelInfo) -> DecoderSpec:
        """Read config.json; raises LoadError for what the family cannot be."""

    def forward(self, batch: ForwardBatch) -> Tensor:
        x, residual = self.embedding(batch.ids), None
        cos_sin = self.cos_sin(batch) if batch.cos_sin is None else batch.cos_sin
        for layer, cache in zip(self.layers, batch.caches, strict=True):
            x, residual = layer(x, residual, cos_sin, batch, cache)
        return self.norm(x, residual)[0]

    def cos_sin(self, batch: ForwardBatch) -> Tensor:
        return self.rope.prepare(batch)

    def logits(self, hidden: Tensor) -> Tensor:
        return self.head(hidden)

    def state_specs(self) -> list[StateSpec]:
        return [layer.attention.state_spec() for layer in self.layers]

    def prefix_scope(self, prompt_len: int) -> str:
        return prefix_scope(self.rope.spec, prompt_len)

    def load_weights(self, weights: Iterable[tuple[str, Tensor]]) -> None:
        load_targets(self.targets(), weights, self._ignored)

    def checkpoint_shapes(self) -> dict[str, tuple[int, ...]]:
        return {name: t.shape for name, t in self.targets().items() if not t.covers}

    def targets(self) -> Targets:
        """Every checkpoint tensor that has a place here."""
        found = self.embedding.targets("model.embed_tokens")
        for index, layer in enumerate(self.layers):
            found |= layer.targets(f"model.layers.{index}.")
        return found | self.norm.targets("model.norm") | self.head.targets("lm_head")

    def _ignored(self, name: str) -> bool:
        # Old checkpoints carry rotary buffers; tied ones may carry the head a second time.
        return ".rotary_emb." in name or (self.tied and name == "lm_head.weight")
