"""The paged KV cache of a layer, and where the tokens of one forward pass live in it.

Plain tensors made by the runner, read by attention operators. Knows nothing of requests.
Invariant: within a chunk, token i sits at absolute position context - count + i.
"""

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

KV_DTYPES = {"bf16": torch.bfloat16, "fp8_e4m3": torch.float8_e4m3fn, "int8": torch.int8}
"""Types of a cache by the name that --kv-cache-dtype gives them."""


@dataclass(frozen=True, eq=False)
class KvCache:
    """Keys and values of one layer, [pages, page_size, kv_heads, head_dim] each.

    The dtype is a float type, float8_e4m3fn or int8. What is stored times its scale is the value.
    int8 has a scale per token and KV head, fp32 [pages, page_size, kv_heads], written with the
    value: the largest size of the head / 127. float8_e4m3fn has one number, which is given.
    """

    keys: Tensor
    values: Tensor
    key_scale: Tensor | float = 1.0
    value_scale: Tensor | float = 1.0

    @property
    def latent(self) -> bool:
        """Whether a value is the beginning of its key, as in multi-head latent attention."""
        return self.values.data_ptr() == self.keys.data_ptr()

    def tensors(self) -> list[Tensor]:
        """All that belongs to a page; the first dimension is pages."""
        stored = (self.keys, self.values, self.key_scale, self.value_scale)
        own = stored[::2] if self.latent else stored
        return [x for x in own if isinstance(x, Tensor)]


def latent_cache(stored: Tensor, value_dim: int, scale: Tensor | float = 1.0) -> KvCache:
    """A cache of vectors [pages, page_size, heads, dim] that are keys, and values as far as
    `value_dim`."""
    return KvCache(stored, stored[..., :value_dim], scale, scale)


@dataclass(frozen=True, eq=False)
class AttentionMeta:
    """Any mix of prefill chunks and decode rows.

    `page_table`: int32 [rows, max_pages], page ids of each row's sequence; entries of pages that
        are not needed may hold anything.
    `rows`: int32 [chunks], the row of each chunk.
    `query_start`: int32 [chunks + 1], where each chunk begins in the flat token dimension.
    `context`: int32 [chunks], tokens visible after the chunk (start + count).
    `slots`: int64 [tokens], page * page_size + offset where each token's keys and values go.
    `derived`: what an implementation computed from these, shared by all layers of the pass.
    """

    page_table: Tensor
    rows: Tensor
    query_start: Tensor
    context: Tensor
    slots: Tensor
    page_size: int
    derived: dict[Any, Any] = field(default_factory=dict, repr=False)
