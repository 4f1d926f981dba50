"""Chooses the next token of each row from its logits.

Order: edits (penalties, bias, min_new_tokens), temperature, softmax, top-k, top-p, min-p, then an
inverse-CDF draw in the order of token ids with one uniform number per (seed, sample index,
position). Every filter is a probability below which tokens are dropped; tokens that tie with the
last kept one are kept, so no result depends on how a sort breaks ties.

Invariant: a row's token depends on its own logits, tokens and parameters only, bit by bit. Hence
exponentials come from `softmax`, which treats each row alone, sums run from left to right in
float64, and rows are grouped only by what they need. Knows no model, plan or page.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch

from headrace.runner.penalties import edit_logits
from headrace.runner.tables import RowTables

# Rows without top-k look at about this many of the largest probabilities first.
_FIRST_LOOK = 64
# Tokens that share one entry when the k-th largest is bounded from below.
_STRIDE = 16
# Consecutive tokens summed to one entry when a token is drawn from the whole vocabulary.
_BLOCK = 256
_TINY = np.finfo(np.float32).smallest_subnormal


class Sampler:
    """Samples for rows of the tables."""

    def __init__(self, tables: RowTables, eos_token_ids: Sequence[int]) -> None:
        self.tables = tables
        self.eos_token_ids = tuple(eos_token_ids)

    def sample(
        self, logits: torch.Tensor, rows: np.ndarray, positions: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray]:
        """Tokens int64 [n] for `positions` of `rows`, from float32 logits [n, vocab].

        The second array (bool [n]) is False where a row has no finite largest logit (NaN, or
        everything masked); its token means nothing. Applies the rows' edits to `logits` in place.
        """
        self._edit(logits, rows, positions)
        values = logits.numpy()
        tokens = values.argmax(axis=-1)
        valid = np.isfinite(values[np.arange(len(rows)), tokens])
        drawn = np.flatnonzero(valid & ~self.tables.greedy[rows])
        if len(drawn):
            chosen = logits if len(drawn) == len(rows) else logits[torch.from_numpy(drawn)]
            tokens[drawn] = self._draw(chosen, rows[drawn], positions[drawn])
        return tokens, valid

    def _edit(self, logits: torch.Tensor, rows: np.ndarray, positions: np.ndarray) -> None:
        for index in np.flatnonzero(self.tables.edited[rows]):
            row = int(rows[index])
            spec = self.tables.spec(row)
            edit_logits(
                logits[index].numpy(),
                self.tables.tokens[row, : positions[index]],
                spec.prompt_len,
                spec.sampling,
                self.eos_token_ids,
            )

    def _draw(self, logits: torch.Tensor, rows: np.ndarray, positions: np.ndarray) -> np.ndarray:
        tables = self.tables
        noise = tables.noise.at(rows, positions)
        probs = torch.softmax(scaled(logits, tables.temperature[rows]), dim=-1).numpy()
        filters = Filters(tables.top_k[rows], tables.top_p[rows], tables.min_p[rows])
        filtered = filters.active(probs.shape[1])
        if filtered.all():
            return draw_filtered(probs, filters, noise)
        if not filtered.any():
            return draw_any(probs, noise)
        tokens = np.empty(len(rows), dtype=np.int64)
        some, rest = np.flatnonzero(filtered), np.flatnonzero(~filtered)
        tokens[some] = draw_filtered(probs[some], filters.of(some), noise[some])
        tokens[rest] = draw_any(probs[rest], noise[rest])
        return tokens


class Filters(NamedTuple):
    """Per row [n]: top_k int64 (the vocabulary size means all), top_p float64, min_p float32."""

    top_k: np.ndarray
    top_p: np.ndarray
    min_p: np.ndarray

    def of(self, rows: np.ndarray) -> "Filters":
        return Filters(self.top_k[rows], self.top_p[rows], self.min_p[rows])

    def active(self, vocab: int) -> np.ndarray:
        """Rows that drop any token, bool [n]."""
        return (self.top_k < vocab) | (self.top_p < 1) | (self.min_p > 0)


def scaled(logits: torch.Tensor, temperature: np.ndarray) -> torch.Tensor:
    """Logits [n, vocab] divided by a temperature per row, float32 [n]."""
    if (temperature == 1).all():
        return logits
    return logits / torch.from_numpy(temperature)[:, None]


def survivors(probs: np.ndarray, filters: Filters) -> tuple[np.ndarray, np.ndarray]:
    """Tokens that pass the filters: ids int64 and weights float32, both [n, width].

    In the order of ids; a dropped token, or an empty place after the last one, has weight 0.
    Looks at as few of the largest probabilities as suffice: those above a bound from below.
    """
    vocab = probs.shape[1]
    bound = _bound(probs, np.where(filters.top_k < vocab, filters.top_k, _FIRST_LOOK))
    # Without top-k and top-p the cut is known; tokens this unlikely never enter a top-p set.
    plain = (filters.top_k == vocab) & (filters.top_p >= 1)
    bound[plain] = (filters.min_p * probs.max(axis=-1))[plain]
    floor = ((1 - filters.top_p) / (2 * vocab)).astype(np.float32)
    while True:
        ids, weights = _at_least(probs, np.maximum(bound, _TINY))
        cut, enough = _cut(weights, filters, vocab)
        enough |= plain | (bound <= 0)
        if enough.all():
            break
        bound = np.where(enough, bound, np.where(bound > floor, floor, 0))
    weights[weights < cut[:, None]] = 0
    return ids, weights


def _bound(probs: np.ndarray, rank: np.ndarray) -> np.ndarray:
    """A bound from below, float32 [n], of the `rank`-th largest of each row; cheap to find."""
    groups = probs.shape[1] // _STRIDE
    head = probs[:, : groups * _STRIDE].reshape(len(probs), _STRIDE, groups)
    largest = np.sort(head.max(axis=1), axis=-1)
    bound = largest[np.arange(len(probs)), np.maximum(groups - rank, 0)] if groups else 0
    return np.where(rank <= groups, bound, np.float32(0))


def _at_least(probs: np.ndarray, bound: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Ids int64 and probabilities [n, width] of tokens with p >= bound [n], padded with zeros."""
    count, vocab = probs.shape
    flat = np.flatnonzero(probs >= bound[:, None])
    starts = np.arange(count + 1) * vocab
    first = flat.searchsorted(starts)
    lengths = np.diff(first)
    width = int(lengths.max())
    places = np.arange(len(flat)) + np.repeat(np.arange(count) * width - first[:-1], lengths)
    ids = np.zeros(count * width, dtype=np.int64)
    weights = np.zeros(count * width, dtype=np.float32)
    ids[places] = flat - np.repeat(starts[:-1], lengths)
    weights[places] = probs.ravel().take(flat)
    return ids.reshape(count, width), weights.reshape(count, width)


def _cut(weights: np.ndarray, filters: Filters, vocab: int) -> tuple[np.ndarray, np.ndarray]:
    """The smallest probability each row keeps, float32 [n], and whether `weights` suffice.

    With probabilities in falling order top-k keeps the first k; top-p those of them for which all
    before sum to less than p of what top-k kept; min-p those at least min_p times the first.
    """
    count, width = weights.shape
    rows = np.arange(count)
    top = np.sort(weights, axis=-1)[:, ::-1]
    mass = np.cumsum(top, axis=-1, dtype=np.float64)
    limited = filters.top_k < vocab
    kth = np.minimum(filters.top_k, width) - 1
    kept = np.where(limited, mass[rows, kth], 1.0)
    # The first place where the sum reaches the limit is the last one kept.
    reached = (mass < (filters.top_p * kept)[:, None]).sum(axis=-1)
    last = np.where(filters.top_p < 1, np.minimum(reached, kth), kth)
    cut = np.maximum(top[rows, last], filters.min_p * top[:, 0])
    return cut, limited | (reached < width)


def draw_filtered(probs: np.ndarray, filters: Filters, noise: np.ndarray) -> np.ndarray:
    """Token int64 [n] among those of probs [n, vocab] that pass the filters."""
    ids, weights = survivors(probs, filters)
    tokens: np.ndarray = ids[np.arange(len(ids)), draw(weights, noise)]
    return tokens


def draw(weights: np.ndarray, noise: np.ndarray) -> np.ndarray:
    """Index int64 [n] into weights [n, width], each with probability weight / sum of weights.

    `noise` is float64 [n] in [0, 1), at most 1 - 2**-52, so a place of weight 0 is never drawn.
    """
    sums = np.cumsum(weights, axis=-1, dtype=np.float64)
    return first_above(sums, noise * sums[:, -1])


def first_above(sums: np.ndarray, target: np.ndarray) -> np.ndarray:
    """Index int64 [n] of the first of the rising sums [n, width] above target [n]; one must be."""
    found: np.ndarray = np.argmax(sums > target[:, None], axis=-1)
    return found


def draw_any(probs: np.ndarray, noise: np.ndarray) -> np.ndarray:
    """Token int64 [n] among all of probs [n, vocab]: first a block of ids, then one in it."""
    vocab = probs.shape[1]
    rows = np.arange(len(probs))
    blocks = np.add.reduceat(probs, np.arange(0, vocab, _BLOCK), axis=-1)
    sums = np.cumsum(blocks, axis=-1, dtype=np.float64)
    target = noise * sums[:, -1]
    block = first_above(sums, target)
    before: np.ndarray = np.where(block > 0, sums[rows, block - 1], 0.0)
    # Past the end of the last row `take` repeats a value; no row may see what is not its own.
    first = block * _BLOCK
    width = np.arange(min(_BLOCK, vocab))
    inside = probs.ravel().take((rows * vocab + first)[:, None] + width, mode="clip")
    inside[first[:, None] + width >= vocab] = 0
    share = (target - before) / (sums[rows, block] - before)
    tokens: np.ndarray = first + draw(inside, np.minimum(share, 1 - 2.0**-52))
    return tokens
