"""What the device side remembers of each row: tokens, page ids, how to sample.

A plan names rows; everything else about a sequence is looked up here. Sampled tokens are written
here first, so the next plan can run before the scheduler has seen them. Lives in host memory.
Knows nothing of requests or of the model. Invariant: every token id in the tables is below the
vocabulary size, whatever a plan brought.
"""

import numpy as np
import torch

from headrace.core.messages import SamplingParams, unpack_ids
from headrace.core.plan import NewRow, StepPlan
from headrace.ops.sampling import SampleTable, address, sample_row


class RowTables:
    """Columns indexed by row; `apply` is the only way a plan changes them.

    `tokens` int32 [rows, max_len + 1] holds prompt and output, `pages` int32 [rows, max_pages]
    page ids; both are touched by the system only where they are used. `problems` tells why a row
    cannot be served; its chunks are answered with that error. `sampling` is for `ops.sample`; the
    lists that its records name are in `_lists`.
    """

    def __init__(self, rows: int, max_len: int, page_size: int, vocab_size: int) -> None:
        self.page_size = page_size
        self.vocab_size = vocab_size
        self.tokens = np.zeros((rows, max_len + 1), dtype=np.int32)
        self.pages = np.zeros((rows, -(-max_len // page_size)), dtype=np.int32)
        self.page_table = torch.from_numpy(self.pages)
        self.specs: list[NewRow | None] = [None] * rows
        self.problems: dict[int, str] = {}
        self.prompt_len = np.zeros(rows, dtype=np.int32)
        self.scored = np.zeros(rows, dtype=bool)
        # Where the second text of a pair begins; beyond every position if there is none.
        self.second = np.full(rows, max_len, dtype=np.int32)
        self.sampling = SampleTable(rows)
        self._lists: list[tuple[np.ndarray, ...]] = [()] * rows

    def apply(self, plan: StepPlan) -> None:
        """Freed rows, new rows, pages: in this order, as a row may be freed and reused at once."""
        for row in plan.freed_rows:
            self.specs[row] = None
            self.problems.pop(row, None)
        for spec in plan.new_rows:
            self._admit(spec)
        for pages in plan.pages:
            self.pages[pages.row, pages.first : pages.first + len(pages.ids)] = pages.ids

    def spec(self, row: int) -> NewRow:
        """The row's sequence as the scheduler announced it."""
        spec = self.specs[row]
        assert spec is not None, f"the plan runs row {row}, which holds no sequence"
        return spec

    def _admit(self, spec: NewRow) -> None:
        row, sampling = spec.row, spec.sampling
        self.specs[row] = spec
        ids = unpack_ids(spec.tokens)
        problem = self._problem(spec, ids)
        if problem:
            self.problems[row] = problem
            ids = np.zeros_like(ids)
        self.tokens[row, : len(ids)] = ids
        self.prompt_len[row] = spec.prompt_len
        if spec.pool is not None:
            self.second[row] = spec.pool.second or self.tokens.shape[1]
        self.scored[row] = not problem and spec.logprobs is not None
        self._set_draw(spec, SamplingParams() if problem else sampling)

    def _set_draw(self, spec: NewRow, sampling: SamplingParams) -> None:
        """How the row is sampled, in the form of `ops.sample`."""
        row = spec.row
        bias_ids = np.fromiter(sampling.logit_bias.keys(), dtype=np.int32)
        bias = np.fromiter(sampling.logit_bias.values(), dtype=np.float32)
        stops = np.array(sampling.stop_token_ids, dtype=np.int64)
        stops = stops[(stops >= 0) & (stops < self.vocab_size)].astype(np.int32)
        self._lists[row] = (bias_ids, bias, stops)
        self.sampling.records[row] = sample_row(
            tokens=address(self.tokens) + row * self.tokens.strides[0],
            prompt_len=spec.prompt_len,
            bias_ids=address(bias_ids),
            bias=address(bias),
            bias_count=len(bias_ids),
            stops=address(stops),
            stop_count=len(stops),
            min_new_tokens=sampling.min_new_tokens,
            seed=spec.seed & (1 << 64) - 1,
            sample_index=spec.sample_index,
            temperature=0.0 if sampling.greedy else sampling.temperature,
            top_k=sampling.top_k if 0 < sampling.top_k < self.vocab_size else 0,
            top_p=sampling.top_p,
            min_p=sampling.min_p,
            frequency_penalty=sampling.frequency_penalty,
            presence_penalty=sampling.presence_penalty,
            repetition_penalty=sampling.repetition_penalty,
        )

    def _problem(self, spec: NewRow, ids: np.ndarray) -> str:
        """Why the model cannot take these ids, or "": one bad row must not end a whole step."""
        wanted = {
            "input_ids": ids,
            "logit_bias": np.array(list(spec.sampling.logit_bias), dtype=np.int64),
            "token_ids_logprob": np.array(spec.logprobs.ids if spec.logprobs else (), np.int64),
        }
        for field, values in wanted.items():
            if values.size and not 0 <= values.min() <= values.max() < self.vocab_size:
                return f"{field} has an id outside 0..{self.vocab_size - 1}, the vocabulary"
        return ""
