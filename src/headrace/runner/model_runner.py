"""Executes plans on one device: tables, pages, model, sampler, in this order.

Owns the row tables and the KV pool; the plan says what changes in them. Knows nothing of requests,
threads or memory planning. Invariant: when `execute` returns, sampled tokens are in the tables, so
the next plan may run them.
"""

import logging
import math
import time
from collections.abc import Sequence
from typing import Any, Protocol

import msgspec
import numpy as np
import torch

from headrace.core import faults
from headrace.core.blame import exhausted
from headrace.core.config import Limits
from headrace.core.errors import Unsupported
from headrace.core.plan import Chunk, ChunkResult, ScoredToken, StateSpec, StepPlan, StepResult
from headrace.loader.kv_scales import HasKvScales
from headrace.runner import graph
from headrace.runner.batch import Layout, build_batch, lay_out, write_drafts
from headrace.runner.logits import score_prompt, score_samples, slices
from headrace.runner.pool import KvPool
from headrace.runner.pooler import Pooler
from headrace.runner.sampler import Sampler
from headrace.runner.tables import RowTables

logger = logging.getLogger(__name__)

_NOT_FINITE = "the model's logits are not finite (NaN), or every token is masked"


class DeviceHalf(Protocol):
    """The part of a feature that works on logits; `extra` is the type of extras it picks up."""

    @property
    def extra(self) -> type: ...

    def edit(
        self,
        logits: torch.Tensor,
        rows: np.ndarray,
        positions: np.ndarray,
        extra: Any,
        tables: RowTables,
    ) -> None:
        """Change float32 logits [n, vocab] for `positions` of `rows`, before sampling."""
        ...


# Token, whether it means anything, and its score if asked for.
Drawn = tuple[int, bool, ScoredToken | None]


class Model(graph.Model, Protocol):
    """What a runner asks of an architecture."""

    def state_specs(self) -> list[StateSpec]:
        """What each layer keeps."""
        ...

    def prefix_scope(self, prompt_len: int) -> str:
        """Prompts of different scope must not share cached prefixes."""
        ...

    def checkpoint_shapes(self) -> dict[str, tuple[int, ...]]:
        """Name and whole shape of every tensor of the checkpoint."""
        ...


class ModelRunner:
    """One model on one device; its KV cache is of `kv_dtype`, or of the model's dtype.

    `samples`: the model has logits; without them plans have no results (stages of a pipeline).
    """

    def __init__(
        self,
        model: Model,
        limits: Limits,
        vocab_size: int,
        eos_token_ids: Sequence[int],
        dtype: torch.dtype,
        kv_dtype: torch.dtype | None = None,
        halves: Sequence[DeviceHalf] = (),
        pooler: Pooler | None = None,
    ) -> None:
        self.model = model
        self.samples = True
        self.vocab_size = vocab_size
        self.dtype = dtype
        self.tables = RowTables(
            limits.max_running_requests, limits.context_length, limits.page_size, vocab_size
        )
        pages = limits.max_total_tokens // limits.page_size
        scales = model.kv_scales() if isinstance(model, HasKvScales) else ()
        self.pool = KvPool(model.state_specs(), pages, limits.page_size, kv_dtype or dtype, scales)
        self.sampler = Sampler(self.tables, eos_token_ids)
        self.graph: graph.Graph = graph.EagerGraph(model)
        self._pooler = pooler
        self._halves = {half.extra: half for half in halves}

    @torch.inference_mode()
    def record(self, tokens: int) -> None:
        """Record the model for steps of up to `tokens` tokens. Writes to page 0, so call it first.

        Without it, or for larger steps, the model runs call by call, with the same results.
        """
        self.graph = graph.make_graph(
            self.model,
            self.pool.caches,
            self.tables.page_size,
            tokens=tokens,
            picks=min(tokens, next(slices(tokens, self.vocab_size)).stop) if self.samples else 0,
        )

    def learn(self, tokens: Sequence[tuple[int, int, int]]) -> None:
        """(row, position, token) of tokens that were sampled elsewhere."""
        if tokens:
            rows, positions, values = np.array(tokens).T
            self.tables.tokens[rows, positions] = values

    @torch.inference_mode()
    def execute(self, plan: StepPlan) -> StepResult:
        """Run a plan to its end."""
        began = time.perf_counter()
        for extra in plan.extras:
            if type(extra) not in self._halves:
                raise Unsupported(f"nothing here handles {type(extra).__name__}")
        self.tables.apply(plan)
        if faults.ON:
            faults.strike("kernel", [self.tables.spec(chunk.row).seed for chunk in plan.chunks])
        self.pool.copy(plan.copies)
        results = self._run(plan.chunks, plan.extras) if plan.chunks else []
        return StepResult(chunks=results, seconds=time.perf_counter() - began)

    def _run(self, chunks: Sequence[Chunk], extras: Sequence[Any]) -> list[ChunkResult]:
        layout = lay_out(chunks)
        write_drafts(chunks, self.tables)
        hidden = self.graph.forward(build_batch(layout, self.tables, self.pool.caches))
        if not self.samples:
            return []
        drawn = self._sample(hidden, layout, extras)
        results, taken = [], 0
        for chunk, offset in zip(chunks, layout.offset.tolist(), strict=True):
            own = drawn[taken : taken + 1 + len(chunk.draft)] if chunk.samples else []
            taken += len(own)
            try:
                result = self._finish(self._answer(chunk, own), chunk, hidden, offset)
            except Exception as error:  # noqa: BLE001  it fails this row, not the step
                result = ChunkResult(error=self._failed("scoring", chunk.row, error))
            results.append(result)
        return results

    def _finish(
        self, result: ChunkResult, chunk: Chunk, hidden: torch.Tensor, offset: int
    ) -> ChunkResult:
        """The answer with what else is made of the hidden states, from `offset` on."""
        if self._pooler is not None and not result.error:
            states = hidden[offset : offset + chunk.count]
            result = self._pooler.take(chunk, self.tables.spec(chunk.row).prompt_len, states)
        if chunk.logprob_start >= 0 and not result.error:
            result = self._add_prompt_scores(result, chunk, hidden, offset)
        return result

    def _failed(self, what: str, row: int, error: Exception) -> str:
        """The row can go on no more: why, for its request. Raises what ends the process."""
        if exhausted(error):
            raise error
        logger.error("%s of row %d failed", what, row, exc_info=error)
        self.tables.problems[row] = f"{what} failed ({type(error).__name__})"
        return self.tables.problems[row]

    def _sample(self, hidden: torch.Tensor, layout: Layout, extras: Sequence[Any]) -> list[Drawn]:
        """Sample at every target of the layout, in its order, and write the tables.

        What follows a rejected draft is written too; a later step overwrites it before it is read.
        """
        rows, positions, places = layout.targets()
        drawn: list[Drawn] = []
        for part in slices(len(rows), self.vocab_size):
            at = rows[part], positions[part], places[part]
            try:
                drawn += self._draw(hidden, *at, extras)
            except Exception:  # noqa: BLE001  one after the other tells whose it is
                for i in range(len(at[0])):
                    row, position, place = (values[i : i + 1] for values in at)
                    try:
                        drawn += self._draw(hidden, row, position, place, extras)
                    except Exception as error:  # noqa: BLE001  it fails this row, not the step
                        self._failed("sampling", int(row[0]), error)
                        drawn.append((0, False, None))
        return drawn

    def _draw(
        self,
        hidden: torch.Tensor,
        rows: np.ndarray,
        positions: np.ndarray,
        places: np.ndarray,
        extras: Sequence[Any],
    ) -> list[Drawn]:
        """Sample for `positions` of `rows`, whose hidden states are at `places`."""
        if faults.ON:
            faults.strike("sample", [self.tables.spec(row).seed for row in rows.tolist()])
        logits = self.graph.logits(hidden, places)
        for extra in extras:
            self._halves[type(extra)].edit(logits, rows, positions, extra, self.tables)
        tokens, valid = self.sampler.sample(logits, rows, positions)
        scores = score_samples(logits, tokens, rows, self.tables)
        self.tables.tokens[rows, positions] = np.where(valid, tokens, 0)
        return list(zip(tokens.tolist(), valid.tolist(), scores, strict=True))

    def _answer(self, chunk: Chunk, drawn: list[Drawn]) -> ChunkResult:
        """The first token, and one more for every draft that is what sampling gave."""
        if chunk.row in self.tables.problems:
            return ChunkResult(error=self.tables.problems[chunk.row])
        if chunk.draft:
            right = [
                guess == token for guess, (token, _, _) in zip(chunk.draft, drawn, strict=False)
            ]
            drawn = drawn[: 1 + [*right, False].index(False)]
        tokens, scores = [], []
        for token, valid, score in drawn:
            if not valid:
                return ChunkResult(error=_NOT_FINITE)
            tokens.append(token)
            if score is not None:
                scores.append(score)
        return ChunkResult(tokens, scores)

    def _add_prompt_scores(
        self, result: ChunkResult, chunk: Chunk, hidden: torch.Tensor, offset: int
    ) -> ChunkResult:
        """Score the prompt tokens after the chunk's positions; row `offset` is `chunk.start`."""
        spec = self.tables.spec(chunk.row)
        if faults.ON:
            faults.strike("prompt", [spec.seed])
        first = max(chunk.start, chunk.logprob_start)
        stop = min(chunk.start + chunk.count, spec.prompt_len - 1)
        scores: list[ScoredToken] = []
        for part in slices(max(0, stop - first), self.vocab_size):
            begin, end = first + part.start, first + part.stop
            places = np.arange(begin, end) + (offset - chunk.start)
            logits = self.graph.logits(hidden, places)
            following = self.tables.tokens[chunk.row, begin + 1 : end + 1]
            scores += score_prompt(logits, following, spec.logprobs)
        if any(math.isnan(score.logprob) for score in scores):
            return ChunkResult(error=_NOT_FINITE)
        return msgspec.structs.replace(result, prompt_scores=scores)
