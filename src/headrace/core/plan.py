"""What a scheduler asks of a runner (`StepPlan`) and what comes back (`StepResult`).

A plan is complete: a rank that sees only plans can execute them. It is never edited after launch.
Plans run in order, so a page or row freed by one plan may be reused by the next.
Prefill, chunked prefill, prefix hit, decode and draft verification are all a `Chunk` with other
numbers. Knows nothing of requests, torch or sockets.
"""

from typing import Any

import msgspec

from headrace.core.messages import LogprobSpec, PoolSpec, SamplingParams


class NewRow(msgspec.Struct, frozen=True, array_like=True):
    """A row of the device tables gets a sequence.

    `tokens`: all known token ids (int32 bytes), prompt and, after a retraction, output so far.
    `prompt_len`: where the output begins (penalties and min_new_tokens count from there).
    """

    row: int
    tokens: bytes
    prompt_len: int
    sampling: SamplingParams
    seed: int
    sample_index: int = 0
    logprobs: LogprobSpec | None = None
    pool: PoolSpec | None = None


class Pages(msgspec.Struct, frozen=True, array_like=True):
    """Page-table entries `first..first+len(ids)` of a row become `ids`."""

    row: int
    first: int
    ids: list[int]


class Chunk(msgspec.Struct, frozen=True, array_like=True):
    """Run tokens `start..start+count` of a row; write their state.

    `samples`: draw the token at position start+count from the last logits. `draft`: proposed tokens
    that follow (verified, in the same run). `logprob_start`: prompt positions p >= this one, inside
    the chunk, whose logits score token p+1 (-1: none).
    """

    row: int
    start: int
    count: int
    samples: bool = True
    draft: tuple[int, ...] = ()
    logprob_start: int = -1


class TokenMasks(msgspec.Struct, frozen=True, array_like=True, tag=True):
    """An extra: which tokens may be sampled at some (row, position) of the step.

    `words`: int32 little-endian [len(rows), ceil(vocab / 32)], token t is bit t % 32 of word
    t // 32, 1 means allowed. A position without an entry is free.
    """

    rows: list[int]
    positions: list[int]
    words: bytes


class ProcessedRows(msgspec.Struct, frozen=True, array_like=True, tag=True):
    """An extra: rows of the step whose logits a processor of their request changes."""

    rows: list[int]


Extra = TokenMasks | ProcessedRows
"""Every kind of extra that a plan may carry."""


class StepPlan(msgspec.Struct, frozen=True, array_like=True):
    """One step. Applied in this order: freed rows, new rows, pages, page copies, chunks.

    `copies`: (source page, destination page), done before any chunk writes.
    `extras`: structs of features, picked up by their device halves.
    """

    step: int
    chunks: list[Chunk]
    freed_rows: list[int] = []
    new_rows: list[NewRow] = []
    pages: list[Pages] = []
    copies: list[tuple[int, int]] = []
    extras: tuple[Any, ...] = ()


class ScoredToken(msgspec.Struct, frozen=True, array_like=True):
    """The log-probability of one token and, if asked, of alternatives at its position."""

    logprob: float
    top: list[tuple[int, float]] = []
    ids: list[tuple[int, float]] = []


class ChunkResult(msgspec.Struct, frozen=True, array_like=True):
    """Outcome of one chunk.

    `tokens`: sampled tokens (none if the chunk does not sample; several after accepted drafts).
    `scores`: parallel to `tokens` when the row asked for logprobs. `prompt_scores`: for each
    position p from max(start, logprob_start) inside the chunk, the score of prompt token p+1.
    `pooled`: fp32 bytes, from the chunk that ends the prompt of a row with `pool`.
    `error` fails the request of this chunk alone.
    """

    tokens: list[int] = []
    scores: list[ScoredToken] = []
    prompt_scores: list[ScoredToken] = []
    error: str = ""
    pooled: bytes = b""


class StepResult(msgspec.Struct, frozen=True, array_like=True):
    """Parallel to `StepPlan.chunks`. `seconds` is device time. `error` fails the whole step."""

    chunks: list[ChunkResult]
    seconds: float = 0.0
    extras: tuple[Any, ...] = ()
    error: str = ""


class StateSpec(msgspec.Struct, frozen=True, kw_only=True):
    """What one layer keeps per token or per sequence; pools are allocated from a list of these.

    kind "kv": paged keys and values, [page, page_size, kv_heads, head_dim] each. `window` > 0 means
    only the last `window` tokens are read. Kind "latent" (MLA): paged vectors, [page, page_size,
    kv_heads, head_dim], which are keys, and values as far as `value_dim`. Kind "recurrent": vectors
    [kv_heads, head_dim] per sequence, whatever its length.
    """

    kind: str = "kv"
    kv_heads: int
    head_dim: int
    window: int = 0
    value_dim: int = 0

    def bytes_per_token(self, element_size: int, scale_size: int = 0) -> int:
        """`scale_size`: bytes kept beside each stored vector."""
        copies = {"kv": 2, "latent": 1, "recurrent": 0}[self.kind]
        return copies * self.kv_heads * (self.head_dim * element_size + scale_size)
