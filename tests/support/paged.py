"""Runs a model on chunks of sequences, with a hand-made page table.

Pages of different sequences are interleaved and never in order, and the caches begin full of NaN:
whoever reads a slot that was not written will show it.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from headrace.layers.batch import ForwardBatch
from headrace.loader.kv_scales import HasKvScales
from headrace.models import Model
from headrace.ops.meta import AttentionMeta
from headrace.runner.pool import KvPool


class PagedRun:
    """Sequences of tokens known in advance, run in any chunks."""

    def __init__(
        self,
        model: Model,
        sequences: Sequence[Sequence[int]],
        *,
        page_size: int = 4,
        dtype: torch.dtype = torch.float32,
        prompt_lens: Sequence[int] | None = None,
    ) -> None:
        self.model = model
        self.sequences = sequences
        self.page_size = page_size
        self.prompt_lens = prompt_lens
        self.done = [0] * len(sequences)
        width = max(-(-len(ids) // page_size) for ids in sequences)
        pages = width * len(sequences) + 1
        order = torch.randperm(pages - 1, generator=torch.Generator().manual_seed(7)) + 1
        self.table = order.view(width, len(sequences)).t().int().contiguous()
        scales = model.kv_scales() if isinstance(model, HasKvScales) else ()
        self.caches = KvPool(model.state_specs(), pages, page_size, dtype, scales).caches
        for tensor in (tensor for cache in self.caches for tensor in cache.tensors()):
            if tensor.dtype == torch.int8:
                tensor.fill_(127)
            else:
                tensor.copy_(torch.full((), float("nan")))

    def step(self, chunks: Sequence[tuple[int, int]]) -> list[Tensor]:
        """Run the next `count` tokens of each (row, count); fp32 logits [count, vocab] of each."""
        with torch.inference_mode():
            hidden = self.model.forward(self.batch(chunks))
            logits = self.model.logits(hidden)
        for row, count in chunks:
            self.done[row] += count
        return list(logits.split([count for _, count in chunks]))

    def batch(self, chunks: Sequence[tuple[int, int]]) -> ForwardBatch:
        rows = torch.tensor([row for row, _ in chunks], dtype=torch.int32)
        counts = torch.tensor([count for _, count in chunks])
        starts = torch.tensor([self.done[row] for row, _ in chunks])
        positions = torch.cat(
            [torch.arange(count) + start for count, start in zip(counts, starts, strict=True)]
        )
        ids = [
            torch.tensor(self.sequences[row][self.done[row] : self.done[row] + count])
            for row, count in chunks
        ]
        pages = self.table[rows.long().repeat_interleave(counts), positions // self.page_size]
        meta = AttentionMeta(
            page_table=self.table,
            rows=rows,
            query_start=torch.cat((torch.zeros(1), counts.cumsum(0))).int(),
            context=(starts + counts).int(),
            slots=pages.long() * self.page_size + positions % self.page_size,
            page_size=self.page_size,
        )
        lens = self.prompt_lens
        return ForwardBatch(
            ids=torch.cat(ids),
            positions=positions,
            meta=meta,
            caches=self.caches,
            prompt_lens=lens and torch.tensor([lens[row] for row, _ in chunks], dtype=torch.int32),
        )


def run_all(model: Model, sequences: Sequence[Sequence[int]], **options: object) -> list[Tensor]:
    """fp32 logits [tokens, vocab] of whole sequences, each in one chunk, all in one batch."""
    run = PagedRun(model, sequences, **options)  # type: ignore[arg-type]
    return run.step([(row, len(ids)) for row, ids in enumerate(sequences)])
