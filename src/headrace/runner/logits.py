"""Log-probabilities that requests ask for, and how many logits fit in memory at once.

Output scores are log-softmax of the temperature-scaled, penalized and masked logits, before top-k,
top-p and min-p; of greedy rows the logits are not scaled. Prompt scores are log-softmax of the raw
logits. Only rows that ask pay. Knows no model or plan.
"""

from collections.abc import Iterator

import numpy as np
import torch

from headrace import ops
from headrace.core.messages import LogprobSpec
from headrace.core.plan import ScoredToken
from headrace.runner.memory import LOGITS_BYTES, LOGITS_COPIES
from headrace.runner.tables import RowTables


def slices(count: int, vocab_size: int) -> Iterator[slice]:
    """Cut `count` positions so that the logits of a slice and their copies stay bounded."""
    step = max(1, LOGITS_BYTES // (4 * LOGITS_COPIES * vocab_size))
    for first in range(0, count, step):
        yield slice(first, min(first + step, count))


def score_samples(
    logits: torch.Tensor, tokens: np.ndarray, rows: np.ndarray, tables: RowTables
) -> list[ScoredToken | None]:
    """Scores of sampled tokens int64 [n] from edited logits [n, vocab]; None if not asked for."""
    scores: list[ScoredToken | None] = [None] * len(rows)
    asking = np.flatnonzero(tables.scored[rows])
    if len(asking):
        specs = [tables.spec(row).logprobs for row in rows[asking].tolist()]
        temperature = tables.sampling.records["temperature"][rows[asking]]
        found = _scores(logits, asking, temperature, tokens[asking], specs)
        for index, score in zip(asking.tolist(), found, strict=True):
            scores[index] = score
    return scores


def score_prompt(
    logits: torch.Tensor, next_tokens: np.ndarray, spec: LogprobSpec | None
) -> list[ScoredToken]:
    """Scores of the prompt tokens int32 [n] that follow the positions of logits [n, vocab]."""
    count = len(next_tokens)
    temperature = np.ones(count, dtype=np.float32)
    return _scores(logits, np.arange(count), temperature, next_tokens, [spec] * count)


def _scores(
    logits: torch.Tensor,
    picks: np.ndarray,
    temperature: np.ndarray,
    tokens: np.ndarray,
    specs: list[LogprobSpec | None],
) -> list[ScoredToken]:
    """What each spec wants at rows `picks` of the logits."""
    wanted = [spec or LogprobSpec() for spec in specs]
    ids = np.zeros((len(picks), 1 + max(len(spec.ids) for spec in wanted)), dtype=np.int64)
    ids[:, 0] = tokens
    for row, spec in zip(ids, wanted, strict=True):
        row[1 : 1 + len(spec.ids)] = spec.ids
    top = max(spec.top for spec in wanted)
    found = ops.log_probs(logits, picks, temperature, ids, top)
    columns = zip(wanted, *(column.tolist() for column in found), strict=True)
    return [
        ScoredToken(
            logprob=values[0],
            top=list(zip(best[: spec.top], best_values[: spec.top], strict=True)),
            ids=list(zip(spec.ids, values[1:], strict=False)),
        )
        for spec, values, best, best_values in columns
    ]
