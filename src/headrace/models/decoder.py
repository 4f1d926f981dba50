"""A decoder-only transformer built from a description.

Knows no architecture by name: it reads the fields of `DecoderSpec` and nothing else. Names of
tensors are those of Llama; what is stored otherwise is renamed by the family's `Layout` before.
"""

from abc import ABC, abstractmethod
from collections.abc import Iterable
from dataclasses import replace

import torch
from torch import Tensor

from headrace import ops
from headrace.core.model_info import ModelInfo
from headrace.core.plan import StateSpec
from headrace.layers.attention import Attention
from headrace.layers.batch import ForwardBatch
from headrace.layers.build import Build
from headrace.layers.embedding import LMHead, PositionEmbedding, VocabEmbedding
from headrace.layers.kv_scale import with_kv_scales
from headrace.layers.latent import LatentAttention, LatentSpec
from headrace.layers.mlp import MLP
from headrace.layers.moe import MoE, MoESpec
from headrace.layers.norm import Norm, NormSpec
from headrace.layers.rope import Rope, prefix_scope
from headrace.layers.weights import load_targets
from headrace.models.spec import DecoderSpec, LayerSpec
from headrace.ops.meta import KvCache
from headrace.quant.base import Targets

# Name of the norm before and after attention, before and after the feed-forward; "" for none.
_NORMS = {
    "pre": ("input_layernorm", "", "post_attention_layernorm", ""),
    "post": ("", "post_attention_layernorm", "", "post_feedforward_layernorm"),
    "both": (
        "input_layernorm",
        "post_attention_layernorm",
        "pre_feedforward_layernorm",
        "post_feedforward_layernorm",
    ),
    "parallel": ("input_layernorm", "", "", ""),
    "parallel-two": ("input_layernorm", "", "post_attention_layernorm", ""),
}


class DecoderLayer:
    """Attention and feed-forward, wired as the spec says."""

    def __init__(self, spec: LayerSpec, norm: NormSpec, build: Build) -> None:
        hidden = spec.attention.hidden_size
        self.spec = spec
        self.parallel = spec.wiring.startswith("parallel")
        self.norms = [
            (name, Norm(hidden, norm, build) if name else None) for name in _NORMS[spec.wiring]
        ]
        self.attention = (
            LatentAttention(spec.attention, build.at("self_attn"))
            if isinstance(spec.attention, LatentSpec)
            else Attention(spec.attention, build.at("self_attn"))
        )
        self.mlp = (
            MoE(hidden, spec.mlp, build.at("mlp"))
            if isinstance(spec.mlp, MoESpec)
            else MLP(hidden, spec.mlp, build.at("mlp"))
        )

    def __call__(
        self,
        x: Tensor,
        residual: Tensor | None,
        cos_sin: Tensor,
        batch: ForwardBatch,
        cache: KvCache,
    ) -> tuple[Tensor, Tensor]:
        """What the layer adds last, and the stream before it: their sum is the layer's output."""
        before, after, before_mlp, after_mlp = (norm for _, norm in self.norms)
        inner, residual = _add(x, residual, before)
        mixed = self._branch(self.attention(inner, cos_sin, batch, cache), after)
        if self.parallel:
            inner = before_mlp(residual) if before_mlp else inner
            return ops.combine(mixed, self._branch(self.mlp(inner), after_mlp)), residual
        inner, residual = _add(mixed, residual, before_mlp)
        return self._branch(self.mlp(inner), after_mlp), residual

    def _branch(self, x: Tensor, norm: Norm | None) -> Tensor:
        x = norm(x) if norm else x
        scale = self.spec.branch_scale
        return x if scale == 1.0 else ops.combine(x, a=scale)

    def targets(self, prefix: str) -> Targets:
        found = self.attention.targets(f"{prefix}self_attn.") | self.mlp.targets(f"{prefix}mlp.")
        for name, norm in self.norms:
            found |= norm.targets(prefix + name) if norm else {}
        return found


def _add(x: Tensor, residual: Tensor | None, norm: Norm | None) -> tuple[Tensor, Tensor]:
    """(norm(x + residual), x + residual)."""
    if norm:
        return norm.add(x, residual)
    total = x if residual is None else ops.combine(x, residual)
    return total, total


class Decoder(ABC):
    """The `Model` of a decoder. A family is a subclass that only overrides `describe`."""

    def __init__(self, info: ModelInfo, build: Build) -> None:
        self.spec = spec = self.describe(info)
        hidden = spec.hidden_size
        build = replace(build, quant=build.quant.renamed(spec.layout.rename))
        self.embedding = VocabEmbedding(spec.vocab_size, hidden, build, "model.embed_tokens")
        self.positions = (
            PositionEmbedding(spec.positions, hidden, build, spec.first_position)
            if spec.positions
            else None
        )
        self.embedding_norm = Norm(hidden, spec.norm, build) if spec.embedding_norm else None
        self.layers = [
            DecoderLayer(layer, spec.norm, build.at(f"model.layers.{index}"))
            for index, layer in enumerate(spec.layers)
        ]
        self.norm = Norm(hidden, spec.norm, build)
        tied = self.embedding if spec.tied else None
        self.head = LMHead(spec.vocab_size, hidden, build, tied=tied, bias=spec.head_bias)
        self.ropes = [Rope(rope) for rope in spec.ropes]

    @staticmethod
    @abstractmethod
    def describe(info: ModelInfo) -> DecoderSpec:
        """Read config.json; raises LoadError for what the family cannot be."""

    def forward(self, batch: ForwardBatch) -> Tensor:
        x, residual = self._embed(batch), None
        tables = self._tables(self.cos_sin(batch) if batch.cos_sin is None else batch.cos_sin)
        for layer, cache in zip(self.layers, batch.caches, strict=True):
            table = tables[layer.spec.attention.rope or 0]
            x, residual = layer(x, residual, table, batch, cache)
        return self.norm.add(x, residual)[0]

    def _embed(self, batch: ForwardBatch) -> Tensor:
        x, scale = self.embedding(batch.ids), self.spec.embedding_scale
        if self.embedding_norm is not None:
            x = self.embedding_norm(x)
        if self.positions is not None:
            return ops.combine(x, self.positions(batch.positions), a=scale)
        return x if scale == 1.0 else ops.combine(x, a=scale)

    def cos_sin(self, batch: ForwardBatch) -> Tensor:
        """The tables of all rotary embeddings side by side."""
        tables = [rope.prepare(batch) for rope in self.ropes]
        if len(tables) == 1:
            return tables[0]
        return torch.cat(tables, dim=1) if tables else torch.empty(len(batch.ids), 0)

    def _tables(self, cos_sin: Tensor) -> list[Tensor]:
        widths = [rope.spec.dim for rope in self.ropes]
        return list(torch.split(cos_sin, widths, dim=1)) if widths else [cos_sin]

    def logits(self, hidden: Tensor) -> Tensor:
        scores, spec = self.head(hidden), self.spec
        if spec.logit_scale == 1.0 and not spec.logit_cap:
            return scores
        return ops.combine(scores, a=spec.logit_scale, soft_cap=spec.logit_cap)

    def state_specs(self) -> list[StateSpec]:
        return [layer.attention.state_spec() for layer in self.layers]

    def kv_scales(self) -> list[tuple[float, float]]:
        """What a stored 1 means in an fp8 cache: keys and values of each layer."""
        return [layer.attention.kv_scales() for layer in self.layers]

    def set_kv_scale(self, layer: int, scale: float) -> None:
        self.layers[layer].attention.set_kv_scale(scale)

    def prefix_scope(self, prompt_len: int) -> str:
        return "".join(prefix_scope(rope.spec, prompt_len) for rope in self.ropes)

    def load_weights(self, weights: Iterable[tuple[str, Tensor]]) -> None:
        targets = self.targets()
        weights = with_kv_scales(self.spec.layout.canonical(weights), targets)
        load_targets(targets, weights, self._ignored)

    def checkpoint_shapes(self) -> dict[str, tuple[int, ...]]:
        return {
            name: target.shape
            for name, target in self.targets().items()
            if not target.covers and not target.optional
        }

    def targets(self) -> Targets:
        """Every tensor that has a place here, by its name here."""
        found = self.embedding.targets("model.embed_tokens")
        if self.positions is not None:
            found |= self.positions.targets("model.embed_positions")
        if self.embedding_norm is not None:
            found |= self.embedding_norm.targets("model.embed_norm")
        for index, layer in enumerate(self.layers):
            found |= layer.targets(f"model.layers.{index}.")
        return found | self.norm.targets("model.norm") | self.head.targets("lm_head")

    def _ignored(self, name: str) -> bool:
        # Old checkpoints carry rotary buffers; tied ones may carry the head a second time.
        return ".rotary_emb." in name or (self.spec.tied and name == "lm_head.weight")
