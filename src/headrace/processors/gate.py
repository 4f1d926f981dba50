"""The scheduler's half of logit processors: tells the device which rows of a plan have one.

Nothing else is needed: a processor is a function of prompt and output, which the device knows. So a
request that is retracted, or goes on after a crash, goes on with it. No torch.
"""

from collections.abc import Sequence

from headrace.core.plan import Chunk, ProcessedRows
from headrace.scheduler.feature import Feature
from headrace.scheduler.request import Request


class ProcessorGate(Feature):
    """Answers for requests with a processor; all others pass untouched."""

    def attach(self, chunks: Sequence[Chunk], requests: Sequence[Request]) -> ProcessedRows | None:
        rows = [
            chunk.row
            for chunk, request in zip(chunks, requests, strict=True)
            if chunk.samples and request.spec.sampling.custom_logit_processor
        ]
        return ProcessedRows(rows) if rows else None
