"""A runner without a model: the next token is a hash of the whole prefix it finds in its pages.

It keeps its own rows and pages, exactly as a device would, and asserts what a plan must guarantee:
no page belongs to two rows unless shared by prefix, and everything a chunk reads was written.
"""

import zlib
from collections.abc import Callable
from concurrent.futures import Future

import numpy as np

from headrace.core.messages import unpack_ids
from headrace.core.plan import ChunkResult, ScoredToken, StepPlan, StepResult


def next_token(prefix: np.ndarray, seed: int, sample_index: int, vocab: int) -> int:
    """The oracle's model: any difference in the prefix changes the token."""
    key = zlib.crc32(np.asarray(prefix, np.int32).tobytes(), seed & 0xFFFF)
    return zlib.crc32(sample_index.to_bytes(4, "little"), key) % vocab


class OracleRunner:
    """Runs plans against a paged memory of plain token ids."""

    def __init__(self, pages: int, page_size: int, vocab: int = 50, *, lazy: bool = True) -> None:
        self.memory = np.full((pages, page_size), -1, np.int64)
        self.page_size = page_size
        self.vocab = vocab
        self.rows: dict[int, dict] = {}
        self.chunks = 0
        self.lazy = lazy
        # Which plans fail, and the rows whose state is garbage since.
        self.broken: Callable[[StepPlan], bool] = lambda plan: False
        self.spoiled: set[int] = set()

    def launch(self, plan: StepPlan) -> "Future[StepResult]":
        # Lazy: run when the result is asked for or the next plan comes, as a busy device would.
        result = self.execute(plan)
        future: Future[StepResult] = Future()
        future.set_result(result)
        return future

    def execute(self, plan: StepPlan) -> StepResult:
        for row in plan.freed_rows:
            self.rows.pop(row, None)
        self.spoiled -= {new.row for new in plan.new_rows}
        for new in plan.new_rows:
            self.rows[new.row] = {
                "tokens": unpack_ids(new.tokens).tolist(),
                "pages": [],
                "spec": new,
            }
        for update in plan.pages:
            pages = self.rows[update.row]["pages"]
            pages[update.first : update.first + len(update.ids)] = update.ids
        if self.broken(plan):
            parts = (plan.new_rows, plan.pages, plan.chunks)
            self.spoiled |= {one.row for part in parts for one in part}
            return StepResult(chunks=[], error="a kernel failed")
        for source, target in plan.copies:
            self.memory[target] = self.memory[source]
        written: set[tuple[int, int]] = set()
        for chunk in plan.chunks:
            self._write(chunk, written)
        return StepResult(chunks=[self._sample(chunk) for chunk in plan.chunks])

    def _write(self, chunk, written: set[tuple[int, int]]) -> None:
        row = self.rows[chunk.row]
        self.chunks += 1
        for position in range(chunk.start, chunk.start + chunk.count):
            page, offset = divmod(position, self.page_size)
            place = (row["pages"][page], offset)
            assert place not in written, "two rows write the same slot in one step"
            written.add(place)
            spoiled = chunk.row in self.spoiled
            self.memory[place] = -2 if spoiled else row["tokens"][position]

    def _prefix(self, row: dict, length: int) -> np.ndarray:
        count = -(-length // self.page_size)
        return self.memory[row["pages"][:count]].reshape(-1)[:length]

    def _sample(self, chunk) -> ChunkResult:
        row = self.rows[chunk.row]
        if chunk.row in self.spoiled:
            return ChunkResult(tokens=[0] * chunk.samples)
        new = row["spec"]
        end = chunk.start + chunk.count
        prefix = self._prefix(row, end)
        assert (prefix == np.asarray(row["tokens"][:end])).all(), "a chunk reads foreign state"
        scores = []
        if chunk.logprob_start >= 0:
            first = max(chunk.start, chunk.logprob_start)
            for position in range(first, min(end, new.prompt_len - 1)):
                scores.append(ScoredToken(logprob=-float(row["tokens"][position + 1])))
        if not chunk.samples:
            return ChunkResult(prompt_scores=scores)
        token = next_token(prefix, new.seed, new.sample_index, self.vocab)
        del row["tokens"][end:]
        row["tokens"].append(token)
        out = [ScoredToken(logprob=-float(token))] if new.logprobs else []
        return ChunkResult(tokens=[token], scores=out, prompt_scores=scores)
