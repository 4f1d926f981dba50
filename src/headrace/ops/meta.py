"""Where the tokens of one forward pass live in the paged KV cache.

Plain index tensors made by the runner, read by attention operators. Knows nothing of requests.
Invariant: within a chunk, token i sits at absolute position context - count + i.
"""

from dataclasses import dataclass, field
from typing import Any

from torch import Tensor


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
