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
from headrace.layers.linear import qkv_linear, row_linear
from headrace.layers.norm import HeadNorm, Norm, NormSpec
from headrace.ops.meta import KvCache
from headrace.quant.base import Targets

_PLAIN = NormSpec(1e-6)


@dataclass(frozen=True)
class AttentionSpec:
    """An attention layer before it is cut.

    `window` 0 sees everything. `rope`: which of the decoder's rotary embeddings turns q and k, None
    for none. `qk_norm`: of each head with one weight ("head") or a weight per head ("heads"), or of
    all heads together ("all"). `scale` 0 is head_dim ** -0.5. `clip` bounds q, k, v.
    """

    hidden_size: int
    heads: int
    kv_heads: int
    head_dim: int
    window: int = 0
    qkv_bias: bool = False
    out_bias: bool = False
    rope: int | None = 0
    interleaved: bool = False
    qk_norm: Literal["", "head", "heads", "all"] = ""
    norm: NormSpec = _PLAIN
    scale: float = 0.0
    soft_cap: float = 0.0
    clip: float = 0.0

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
        dim = spec.head_dim
        # What a rank gives to a norm over all heads, and what it takes of the result.
        self.q_cuts = heads.q_cut(dim), heads.q_cut(dim)
        self.k_cuts = heads.owned_cut(dim), heads.kv_cut(dim)

    def __call__(self, x: Tensor, cos_sin: Tensor, batch: ForwardBatch, cache: KvCache) -> Tensor:
        spec = self.spec
        q, k, v = self._project(x)
        if spec.rope is None:
            ops.write_kv(k, v, cache, batch.meta.slots)
        else:
            q = ops.rotary_kv(q, k, v, cos_sin, cache, batch.meta.slots, spec.interleaved)
        mixed = ops.paged_attention(
            q,
            cache,
            batch.meta,
            scale=self.scale,
            window=spec.window,
            soft_cap=spec.soft_cap,
        )
        return self.out(mixed.flatten(1))

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

    def targets(self, prefix: str) -> Targets:
        found = self.qkv.targets(prefix) | self.out.targets(prefix)
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
