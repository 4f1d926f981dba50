"""How a model is run: call by call, or as a program recorded once and replayed in one native call.

A recorded model costs no Python and no dispatch per operator. What differs between steps (tokens,
positions, pages, rows whose logits are wanted) goes in as a `Step`. Steps with more tokens than
were recorded run call by call: kernels give a row the same value either way. Knows no plan, row
table or request. Invariant: a recorded model is used only after it gave, bit by bit, what the model
gives call by call; one that computes outside of operators does not, and runs call by call.
"""

import logging
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from headrace import ops
from headrace.layers.batch import ForwardBatch
from headrace.ops.cpu.library import LIBRARY, Step
from headrace.ops.cpu.record import Arena, recording
from headrace.ops.meta import AttentionMeta, KvCache

logger = logging.getLogger(__name__)

Caches = list[KvCache]

_FIRST_ARENA = 1 << 26
_MOST_ARENA = 1 << 40  # addresses; memory is what steps touch


class Model(Protocol):
    """What a graph asks of an architecture."""

    def forward(self, batch: ForwardBatch) -> Tensor:
        """Hidden states [tokens, hidden]; writes the state of the tokens to `batch.caches`."""
        ...

    def logits(self, hidden: Tensor) -> Tensor:
        """Float32 [n, vocab] for hidden states [n, hidden]."""
        ...

    def cos_sin(self, batch: ForwardBatch) -> Tensor:
        """`ForwardBatch.cos_sin` of these tokens."""
        ...


class Graph(Protocol):
    """Runs one model. What it returns may be overwritten by the next call of the same method."""

    def forward(self, batch: ForwardBatch) -> Tensor:
        """As the model's."""
        ...

    def logits(self, hidden: Tensor, places: np.ndarray) -> Tensor:
        """Float32 [n, vocab] of rows `places`, int64 [n], of what `forward` returned."""
        ...


class EagerGraph:
    """Calls the model's operators one after the other."""

    def __init__(self, model: Model) -> None:
        self.model = model

    def forward(self, batch: ForwardBatch) -> Tensor:
        return self.model.forward(batch)

    def logits(self, hidden: Tensor, places: np.ndarray) -> Tensor:
        if len(places) < len(hidden):
            hidden = hidden[torch.from_numpy(places)]
        return self.model.logits(hidden)


class RecordedGraph:
    """Replays a model for steps of up to `tokens` tokens and `picks` rows of logits, 0: none.

    Raises:
        MemoryError: the activations need more addresses than there are.
    """

    def __init__(
        self, model: Model, caches: Caches, page_size: int, *, tokens: int, picks: int
    ) -> None:
        self.model = model
        self.eager = EagerGraph(model)
        self.tokens, self.picks = tokens, picks
        batch = _blank_batch(caches, page_size, 1)
        width = model.cos_sin(batch).shape[1]
        self.cos_sin = torch.empty(tokens, width)
        self.angles = self.cos_sin.numpy()  # assigning through numpy takes half the time
        self.caches = caches
        size = _FIRST_ARENA
        while True:
            try:
                self._record(Arena(size), page_size)
                return
            except MemoryError:
                if size >= _MOST_ARENA:
                    raise
                size *= 4

    def _record(self, arena: Arena, page_size: int) -> None:
        batch = _blank_batch(self.caches, page_size, self.tokens, self.cos_sin)
        with recording(arena) as self.body:
            self.hidden = self.model.forward(batch)
        with recording(arena) as self.head:
            if self.picks:
                self.scores = self.model.logits(ops.gather(self.hidden, batch.ids[: self.picks]))

    def forward(self, batch: ForwardBatch) -> Tensor:
        tokens = len(batch.ids)
        if tokens > self.tokens:
            return self.eager.forward(batch)
        self.angles[:tokens] = self.model.cos_sin(batch).numpy()
        self.body.replay(_step(batch))
        return self.hidden[:tokens]

    def logits(self, hidden: Tensor, places: np.ndarray) -> Tensor:
        count = len(places)
        if count > self.picks or hidden.data_ptr() != self.hidden.data_ptr():
            return self.eager.logits(hidden, places)
        picks = torch.from_numpy(places).data_ptr()
        self.head.replay(Step(tokens=count, picked=count, picks=picks))
        return self.scores[:count]


def make_graph(model: Model, caches: Caches, page_size: int, *, tokens: int, picks: int) -> Graph:
    """The recorded model, or the model itself if it cannot be recorded; the log says why."""
    eager = EagerGraph(model)
    if LIBRARY is None:
        return eager
    try:
        recorded = RecordedGraph(model, caches, page_size, tokens=tokens, picks=picks)
    except MemoryError as error:
        logger.info("the model runs call by call: %s", error)
        return eager
    if not _agree(recorded, eager, _blank_batch(caches, page_size, min(3, page_size)), picks):
        logger.warning("the recorded model differs from the model, which runs call by call")
        return eager
    logger.info("recorded %d operators per step", len(recorded.body) + len(recorded.head))
    return recorded


def _agree(recorded: Graph, eager: Graph, batch: ForwardBatch, picks: int) -> bool:
    """Both give the same bits for a batch. Writes to its pages."""
    results = []
    places = np.arange(len(batch.ids))[-2:]
    for graph in (recorded, eager):
        hidden = graph.forward(batch)
        scores = graph.logits(hidden, places) if picks else hidden
        results.append((hidden.clone(), scores.clone()))
    return all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def _blank_batch(
    caches: Caches, page_size: int, tokens: int, cos_sin: Tensor | None = None
) -> ForwardBatch:
    """One sequence of `tokens` times token 0, in page 0."""
    positions = torch.arange(tokens)
    meta = AttentionMeta(
        page_table=torch.zeros(1, 1, dtype=torch.int32),
        rows=torch.zeros(1, dtype=torch.int32),
        query_start=torch.tensor([0, tokens], dtype=torch.int32),
        context=torch.tensor([tokens], dtype=torch.int32),
        slots=positions,
        page_size=page_size,
    )
    ids = torch.zeros(tokens, dtype=torch.int64)
    return ForwardBatch(ids=ids, positions=positions, meta=meta, caches=caches, cos_sin=cos_sin)


def _step(batch: ForwardBatch) -> Step:
    """What the operators read of a batch, which must outlive it."""
    meta = batch.meta
    return Step(
        tokens=len(batch.ids),
        chunks=len(meta.rows),
        ids=batch.ids.data_ptr(),
        positions=batch.positions.data_ptr(),
        slots=meta.slots.data_ptr(),
        page_table=meta.page_table.data_ptr(),
        page_stride=meta.page_table.stride(0),
        rows=meta.rows.data_ptr(),
        query_start=meta.query_start.data_ptr(),
        context=meta.context.data_ptr(),
    )
