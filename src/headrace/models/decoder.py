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
from headrace.core.errors import LoadError
from headrace.core.model_info import OWN_NAMES, ModelInfo
from headrace.core.plan import StateSpec
from headrace.dist.topology import stage_layers
from headrace.layers.attention import Attention
from headrace.layers.batch import ForwardBatch
from headrace.layers.build import Build, Stage
from headrace.layers.embedding import LMHead, PositionEmbedding, VocabEmbedding
from headrace.layers.kv_scale import with_kv_scales
from headrace.layers.latent import LatentAttention, LatentSpec
from headrace.layers.mlp import MLP
from headrace.layers.moe import MoE, MoESpec
from headrace.layers.names import Layout
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
    """The `Model` of a decoder, or of one stage of it. A family only overrides `describe`.

    The first stage has the embedding, the last one the final norm and the head, which is the
    embedding once more where it is tied.
    """

    def __init__(self, info: ModelInfo, build: Build) -> None:
        spec = self.describe(info)
        if info.hf.get(OWN_NAMES):
            spec = replace(spec, layout=Layout())
        self.spec = spec
        self.stage, self.dtype = build.split.stage, build.dtype
        hidden, first, last = spec.hidden_size, self.stage.first, self.stage.last
        self.first_layer, stop = _layers(len(spec.layers), self.stage)
        build = replace(build, quant=build.quant.renamed(spec.layout.rename))
        self.embedding = (
            VocabEmbedding(spec.vocab_size, hidden, build, "model.embed_tokens")
            if first or (last and spec.tied)
            else None
        )
        self.positions = (
            PositionEmbedding(spec.positions, hidden, build, spec.first_position)
            if spec.positions and first
            else None
        )
        self.embedding_norm = (
            Norm(hidden, spec.norm, build) if spec.embedding_norm and first else None
        )
        self.layers = [
            DecoderLayer(spec.layers[index], spec.norm, build.at(f"model.layers.{index}"))
            for index in range(self.first_layer, stop)
        ]
        self.norm = Norm(hidden, spec.norm, build) if last else None
        tied = self.embedding if spec.tied else None
        self.head = (
            LMHead(spec.vocab_size, hidden, build, tied=tied, bias=spec.head_bias) if last else None
        )
        self.ropes = [Rope(rope) for rope in spec.ropes]

    @staticmethod
    @abstractmethod
    def describe(info: ModelInfo) -> DecoderSpec:
        """Read config.json; raises LoadError for what the family cannot be."""

    def forward(self, batch: ForwardBatch) -> Tensor:
        x, residual = self._begin(batch)
        tables = self._tables(self.cos_sin(batch) if batch.cos_sin is None else batch.cos_sin)
        for layer, cache in zip(self.layers, batch.caches, strict=True):
            table = tables[layer.spec.attention.rope or 0]
            x, residual = layer(x, residual, table, batch, cache)
        return self._end(x, residual)

    def _begin(self, batch: ForwardBatch) -> tuple[Tensor, Tensor | None]:
        """The stream before the first layer here, in two parts that are to be added."""
        before = self.stage.before
        if before is None:
            return self._embed(batch), None
        shape = len(batch.ids), self.spec.hidden_size
        return before.receive(shape, self.dtype), before.receive(shape, self.dtype)

    def _end(self, x: Tensor, residual: Tensor | None) -> Tensor:
        if self.stage.after is not None:
            assert residual is not None  # there is a layer here
            self.stage.after.send(x)
            self.stage.after.send(residual)
        return self.norm.add(x, residual)[0] if self.norm else x

    def _embed(self, batch: ForwardBatch) -> Tensor:
        assert self.embedding is not None
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
        assert self.head is not None, "only the last stage has logits"
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
        if 0 <= layer - self.first_layer < len(self.layers):
            self.layers[layer - self.first_layer].attention.set_kv_scale(scale)

    def prefix_scope(self, prompt_len: int) -> str:
        return "".join(prefix_scope(rope.spec, prompt_len) for rope in self.ropes)

    def load_weights(self, weights: Iterable[tuple[str, Tensor]]) -> None:
        self.fill(self.spec.layout.canonical(weights))

    def fill(self, weights: Iterable[tuple[str, Tensor]]) -> None:
        targets = self.targets()
        load_targets(targets, with_kv_scales(weights, targets), self._ignored)

    def checkpoint_shapes(self) -> dict[str, tuple[int, ...]]:
        return {
            name: target.shape
            for name, target in self.targets().items()
            if not target.covers and not target.optional
        }

    def targets(self) -> Targets:
        """Every tensor that has a place here, by its name here."""
        found: Targets = {}
        if self.embedding is not None:
            found |= self.embedding.targets("model.embed_tokens")
        if self.positions is not None:
            found |= self.positions.targets("model.embed_positions")
        if self.embedding_norm is not None:
            found |= self.embedding_norm.targets("model.embed_norm")
        for index, layer in enumerate(self.layers, self.first_layer):
            found |= layer.targets(f"model.layers.{index}.")
        if self.norm is not None:
            found |= self.norm.targets("model.norm")
        return found | (self.head.targets("lm_head") if self.head else {})

    def foreign(self, name: str) -> bool:
        """Whether a tensor that has no place here belongs to another stage."""
        if self.stage.shard.size == 1:
            return False
        if name.startswith("model.layers."):
            index = name.split(".")[2]
            return (
                index.isdigit()
                and int(index) < len(self.spec.layers)
                and not (0 <= int(index) - self.first_layer < len(self.layers))
            )
        return name.startswith(("model.embed_", "model.norm.", "lm_head."))

    def _ignored(self, name: str) -> bool:
        # Old checkpoints carry rotary buffers; tied ones may carry the head a second time.
        rotary = ".rotary_emb." in name
        return rotary or (self.spec.tied and name == "lm_head.weight") or self.foreign(name)


def _layers(count: int, stage: Stage) -> tuple[int, int]:
    """Where the layers of a stage begin and end."""
    if count < stage.shard.size:
        raise LoadError(f"{count} layers cannot be {stage.shard.size} stages", field="pp_size")
    here = stage_layers(count, stage.shard)
    return here.start, here.stop
