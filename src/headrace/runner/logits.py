"""Log-probabilities that requests ask for, and how many logits fit in memory at once.

Output scores are log-softmax of the temperature-scaled, penalized and masked logits, before top-k,
top-p and min-p; of greedy rows the logits are not scaled. Prompt scores are log-softmax of the raw
logits. Only rows that ask pay. Knows no model or plan.
"""

from collections.abc import Iterator

import numpy as np
import torch

from headrace.core.messages import LogprobSpec
from headrace.core.plan import ScoredToken
from headrace.runner.memory import LOGITS_BYTES, LOGITS_COPIES
from headrace.runner.sampler import scaled
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
        chosen = scaled(logits[torch.from_numpy(asking)], tables.temperature[rows[asking]])
        values = torch.log_softmax(chosen, dim=-1).numpy()
        for index, row_values in zip(asking, values, strict=True):
            spec = tables.spec(int(rows[index])).logprobs
            scores[index] = score(row_values, int(tokens[index]), spec)
    return scores


def score_prompt(
    logits: torch.Tensor, next_tokens: np.ndarray, spec: LogprobSpec | None
) -> list[ScoredToken]:
    """Scores of the prompt tokens int32 [n] that follow the positions of logits [n, vocab]."""
    values = torch.log_softmax(logits, dim=-1).numpy()
    pairs = zip(values, next_tokens.tolist(), strict=True)
    return [score(row_values, token, spec) for row_values, token in pairs]


def score(values: np.ndarray, token: int, spec: LogprobSpec | None) -> ScoredToken:
    """What `spec` wants of the log-probabilities float32 [vocab] at one position."""
    if spec is None:
        return ScoredToken(float(values[token]))
    return ScoredToken(
        logprob=float(values[token]),
        top=largest(values, spec.top) if spec.top > 0 else [],
        ids=[(other, float(values[other])) for other in spec.ids],
    )


def largest(values: np.ndarray, count: int) -> list[tuple[int, float]]:
    """The `count` largest (id, value) in falling order; of equal ones the lower id comes first."""
    count = min(count, len(values))
    last = np.partition(values, len(values) - count)[len(values) - count]
    ids = np.flatnonzero(values >= last)
    ids = ids[np.argsort(-values[ids], kind="stable")[:count]]
    return list(zip(ids.tolist(), values[ids].tolist(), strict=True))
