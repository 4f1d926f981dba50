"""Self-attention over the paged cache, with grouped KV heads."""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from headrace import ops
from headrace.core.errors import LoadError
from headrace.core.plan import StateSpec
from headrace.dist.topology import Cut, split_heads
from headrace.layers.batch import ForwardBatch
from headrace.layers.build import Build
from headrace.layers.kv_scale import scale_targets
from headrace.layers.linear import qkv_linear, row_linear
from headrace.layers.norm import HeadNorm, Norm, NormSpec
from headrace.ops.meta import AttentionMeta, KvCache
from headrace.quant.base import Targets, cut_target, plain

_PLAIN = NormSpec(1e-6)


@dataclass(frozen=True)
class AttentionSpec:
    """An attention layer before it is cut.

    `window` 0 sees everything; `in_chunks`: it cuts the sequence into chunks, and a token sees its
    own. `slopes` of all heads, none without ALiBi. `rope`: which of the decoder's rotary embeddings
    turns q and k, None for none; `rope_scales`: it is a table of factors of q. `qk_norm`: of
    each head with one weight ("head") or a weight per head ("heads"), or of all heads together
    ("all"). `scale` 0 is head_dim ** -0.5. `clip` bounds q, k, v. `sinks`: each head has a logit
    more in its softmax that carries no value.
    """

    hidden_size: int
    heads: int
    kv_heads: int
    head_dim: int
    window: int = 0
    in_chunks: bool = False
    slopes: tuple[float, ...] = ()
    qkv_bias: bool = False
    out_bias: bool = False
    rope: int | None = 0
    rope_scales: bool = False
    interleaved: bool = False
    qk_norm: Literal["", "head", "heads", "all"] = ""
    norm: NormSpec = _PLAIN
    scale: float = 0.0
    soft_cap: float = 0.0
    clip: float = 0.0
    sinks: bool = False

    def __post_init__(self) -> None:
        if self.heads % self.kv_heads:
            raise LoadError(
                f"num_attention_heads {self.heads} is not a multiple of "
                f"num_key_value_heads {self.kv_heads}",
                field="num_key_value_heads",
            )


class Attention:
    """x [tokens, hidden] -> [tokens, hidden]; writes the tokens' keys and values to the cache."""

    def __init__(self, spec: AttentionSpec, build: Build) -> None:
        try:
            heads = split_heads(spec.heads, spec.kv_heads, build.shard)
        except ValueError as error:
            raise LoadError(str(error), field="deterministic_tp") from error
        self.spec, self.group = spec, build.group
        self.heads, self.kv_heads = len(heads.q), len(heads.kv)
        self.qkv = qkv_linear(heads, spec.head_dim, spec.hidden_size, build, bias=spec.qkv_bias)
        self.out = row_linear(
            "o_proj", heads.q_cut(spec.head_dim), spec.hidden_size, build, bias=spec.out_bias
        )
        self.q_norm = _head_norm(spec, spec.heads, heads.q_cut(1), build)
        self.k_norm = _head_norm(spec, spec.kv_heads, heads.kv_cut(1), build)
        self.scale = spec.scale or spec.head_dim**-0.5
        self.kv_scale = torch.ones(2)
        self.sinks = torch.zeros(self.heads) if spec.sinks else None
        self._sinks_cut = heads.q_cut(1)
        self.slopes: Tensor | None = None
        if spec.slopes:
            local = [0.0 if head is None else spec.slopes[head] for head in heads.q]
            self.slopes = torch.tensor(local, dtype=torch.float32)
        dim = spec.head_dim
        # What a rank gives to a norm over all heads, and what it takes of the result.
        self.q_cuts = heads.q_cut(dim), heads.q_cut(dim)
        self.k_cuts = heads.owned_cut(dim), heads.kv_cut(dim)

    def __call__(self, x: Tensor, cos_sin: Tensor, batch: ForwardBatch, cache: KvCache) -> Tensor:
        spec = self.spec
        q, k, v = self._project(x)
        if spec.rope is None or spec.rope_scales:
            ops.write_kv(k, v, cache, batch.meta.slots)
            if spec.rope_scales:
                q = ops.turn(q, cos_sin)
        else:
            q = ops.rotary_kv(q, k, v, cos_sin, cache, batch.meta.slots, spec.interleaved)
        return self.out(self._mixed(q, cache, batch.meta).flatten(1))

    def _mixed(self, q: Tensor, cache: KvCache, meta: AttentionMeta) -> Tensor:
        spec = self.spec
        if spec.in_chunks:
            return ops.chunked_attention(q, cache, meta, scale=self.scale, size=spec.window)
        if self.slopes is not None:
            return ops.sloped_attention(q, cache, meta, scale=self.scale, slopes=self.slopes)
        return ops.paged_attention(
            q,
            cache,
            meta,
            scale=self.scale,
            window=spec.window,
            soft_cap=spec.soft_cap,
            sinks=self.sinks,
        )

    def _project(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """q, k, v [tokens, heads, dim] of the local heads, normalized."""
        spec = self.spec
        qkv = self.qkv(x).view(len(x), -1, spec.head_dim)
        q, k, v = torch.split(qkv, [self.heads, self.kv_heads, self.kv_heads], dim=1)
        if self.q_norm and self.k_norm:
            q = self._normalized(self.q_norm, q, *self.q_cuts)
            k = self._normalized(self.k_norm, k, *self.k_cuts)
        if spec.clip:
            q, k, v = (
                ops.combine(part.flatten(1), limit=spec.clip).view(part.shape) for part in (q, k, v)
            )
        return q, k, v

    def _normalized(self, norm: Norm | HeadNorm, x: Tensor, given: Cut, taken: Cut) -> Tensor:
        if self.spec.qk_norm != "all":
            return norm(x)
        y = norm(self.group.all_gather(x.flatten(1), given))
        if taken.local < taken.full or taken.padded:
            spans = tuple((span.source, span.target, span.count) for span in taken.spans)
            y = ops.take_part(y, spans, taken.local)
        return y.view(x.shape)

    def state_spec(self) -> StateSpec:
        """What this rank keeps per token."""
        return StateSpec(
            kv_heads=self.kv_heads, head_dim=self.spec.head_dim, window=self.spec.window
        )

    def kv_scales(self) -> tuple[float, float]:
        """What a stored 1 means in an fp8 cache, of keys and of values."""
        keys, values = self.kv_scale.tolist()
        return keys, values

    def set_kv_scale(self, scale: float) -> None:
        self.kv_scale.fill_(scale)

    def targets(self, prefix: str) -> Targets:
        found = self.qkv.targets(prefix) | self.out.targets(prefix)
        found |= scale_targets(prefix, self.kv_scale)
        if self.sinks is not None:
            found[f"{prefix}sinks"] = cut_target(plain(self.sinks), self._sinks_cut)
        if self.q_norm and self.k_norm:
            found |= self.q_norm.targets(f"{prefix}q_norm")
            found |= self.k_norm.targets(f"{prefix}k_norm")
        return found


def _head_norm(spec: AttentionSpec, heads: int, local: Cut, build: Build) -> Norm | HeadNorm | None:
    """The norm of the queries or of the keys."""
    if spec.qk_norm == "head":
        return Norm(spec.head_dim, spec.norm, build)
    if spec.qk_norm == "heads":
        return HeadNorm(local, spec.head_dim, spec.norm.eps, build)
    if spec.qk_norm == "all":
        return Norm(heads * spec.head_dim, spec.norm, build)
    return None
