"""Builds what the model sees from a plan and the row tables.

All arithmetic is on whole arrays: the cost of a step does not grow with Python work per token.
Knows nothing of models or sampling.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from headrace.core.plan import Chunk
from headrace.layers.batch import ForwardBatch
from headrace.ops.meta import AttentionMeta, KvCache
from headrace.runner.tables import RowTables


@dataclass(frozen=True, eq=False)
class Layout:
    """Where the chunks of a plan lie among the tokens of a step; int64 [chunks] each.

    A chunk runs positions `start..end` of its `row`, its drafts included, and `offset` is the place
    of its first token. `known_end` is where drafts begin, and `samples` is bool. `decodes`: every
    chunk is one token without drafts and samples, as most steps are; much is simpler then.
    """

    row: np.ndarray
    start: np.ndarray
    known_end: np.ndarray
    end: np.ndarray
    offset: np.ndarray
    samples: np.ndarray
    tokens: int
    decodes: bool

    def targets(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Where tokens are sampled: after the last known token and after every draft.

        Rows, positions of the sampled tokens and places of the logits among the tokens of the
        step; int64 [n] each, in the order of the chunks.
        """
        if self.decodes:
            return self.row, self.end, self.offset
        chunk = np.flatnonzero(self.samples)
        positions = self.known_end[chunk]
        counts = self.end[chunk] - positions + 1
        if counts.any() and counts.max() > 1:
            first = np.cumsum(counts) - counts
            chunk = np.repeat(chunk, counts)
            positions = np.repeat(positions - first, counts) + np.arange(len(chunk))
        places = (self.offset - self.start - 1)[chunk] + positions
        return self.row[chunk], positions, places


def lay_out(chunks: Sequence[Chunk]) -> Layout:
    """Columns of the chunks of a plan (at least one)."""
    flat: list[int] = []
    decodes = True
    for chunk in chunks:
        drafts = len(chunk.draft)
        decodes = decodes and chunk.count == 1 and chunk.samples and not drafts
        flat += (chunk.row, chunk.start, chunk.count, drafts, chunk.samples)
    row, start, count, draft, samples = np.array(flat).reshape(-1, 5).T.copy()
    if decodes:
        end = start + 1
        offset = np.arange(len(chunks))
        return Layout(row, start, end, end, offset, samples, len(chunks), True)
    known_end = start + count
    ends = np.cumsum(count + draft)
    return Layout(
        row=row,
        start=start,
        known_end=known_end,
        end=known_end + draft,
        offset=ends - (count + draft),
        samples=samples.astype(bool),
        tokens=int(ends[-1]),
        decodes=False,
    )


def write_drafts(chunks: Sequence[Chunk], tables: RowTables) -> None:
    """Put proposed tokens where the model reads them, after the known ones."""
    for chunk in chunks:
        if chunk.draft:
            first = chunk.start + chunk.count
            tables.tokens[chunk.row, first : first + len(chunk.draft)] = chunk.draft


def build_batch(layout: Layout, tables: RowTables, caches: list[KvCache]) -> ForwardBatch:
    """Tokens, positions and attention metadata of a step, looked up in the tables."""
    chunks, tokens = len(layout.row), layout.tokens
    if layout.decodes:
        rows, positions = layout.row, layout.start
    else:
        length = layout.end - layout.start
        rows = np.repeat(layout.row, length)
        positions = np.arange(tokens) + np.repeat(layout.start - layout.offset, length)
    page = positions // tables.page_size
    # page id * page_size + offset in the page, without computing the offset
    slots = (tables.pages[rows, page] - page) * tables.page_size + positions
    query_start = np.empty(chunks + 1, dtype=np.int32)
    query_start[:-1], query_start[-1] = layout.offset, tokens
    meta = AttentionMeta(
        page_table=tables.page_table,
        rows=torch.from_numpy(layout.row.astype(np.int32)),
        query_start=torch.from_numpy(query_start),
        context=torch.from_numpy(layout.end.astype(np.int32)),
        slots=torch.from_numpy(slots),
        page_size=tables.page_size,
    )
    return ForwardBatch(
        ids=torch.from_numpy(tables.tokens[rows, positions].astype(np.int64)),
        positions=torch.from_numpy(positions),
        meta=meta,
        caches=caches,
        prompt_lens=torch.from_numpy(tables.prompt_len[layout.row]),
        seconds=torch.from_numpy(tables.second[rows]),
    )
