"""Self-attention over the paged cache, with grouped KV heads."""

from dataclasses import dataclass

import torch
from torch import Tensor

from headrace import ops
from headrace.core.plan import StateSpec
from headrace.dist.topology import split_heads
from headrace.layers.batch import ForwardBatch
from headrace.layers.build import Build
from headrace.layers.linear import RowLinear, qkv_linear
from headrace.layers.norm import RMSNorm
from headrace.ops.meta import KvCache
from headrace.quant.base import Targets


@dataclass(frozen=True)
class AttentionSpec:
    """Shape of an attention layer before it is cut; `window` 0 sees everything."""

    hidden_size: int
    heads: int
    kv_heads: int
    head_dim: int
    window: int = 0
    qkv_bias: bool = False
    out_bias: bool = False
    qk_norm: bool = False
    eps: float = 1e-6


class Attention:
    """x [tokens, hidden] -> [tokens, hidden]; writes the tokens' keys and values to the cache."""

    def __init__(self, spec: AttentionSpec, build: Build) -> None:
        heads = split_heads(spec.heads, spec.kv_heads, build.shard)
        self.spec = spec
        self.heads, self.kv_heads = len(heads.q), len(heads.kv)
        self.qkv = qkv_linear(heads, spec.head_dim, spec.hidden_size, build, bias=spec.qkv_bias)
        self.out = RowLinear(
            "o_proj", heads.q_cut(spec.head_dim), spec.hidden_size, build, bias=spec.out_bias
        )
        self.q_norm = RMSNorm(spec.head_dim, spec.eps, build) if spec.qk_norm else None
        self.k_norm = RMSNorm(spec.head_dim, spec.eps, build) if spec.qk_norm else None
        self.scale = spec.head_dim**-0.5

    def __call__(self, x: Tensor, cos_sin: Tensor, batch: ForwardBatch, cache: KvCache) -> Tensor:
        qkv = self.qkv(x).view(len(x), -1, self.spec.head_dim)
        q, k, v = torch.split(qkv, [self.heads, self.kv_heads, self.kv_heads], dim=1)
        if self.q_norm and self.k_norm:
            q, k = self.q_norm(q)[0], self.k_norm(k)[0]
        q = ops.rotary_kv(q, k, v, cos_sin, cache, batch.meta.slots)
        mixed = ops.paged_attention(q, cache, batch.meta, scale=self.scale, window=self.spec.window)
        return self.out(mixed.flatten(1))

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
