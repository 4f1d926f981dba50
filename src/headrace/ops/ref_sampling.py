"""The definition of `sample` and `log_probs`, in numpy and torch.

Order: edits (penalties, bias, min_new_tokens), temperature, softmax, top-k, top-p, min-p,
then an inverse-CDF draw in the order of token ids with one uniform number per (seed, sample index,
position). Every filter is a probability below which tokens are dropped; tokens that tie with the
last kept one are kept, so no result depends on how a sort breaks ties.

Invariant: a row's token depends on its own logits, tokens and parameters only, bit by bit. Hence
exponentials come from `softmax`, which treats each row alone, sums run from left to right in
float64, and rows are grouped only by what they need.
"""

from ctypes import c_float, c_int32
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from headrace.core.noise import uniform
from headrace.ops.sampling import LogProbs, Sampled, SampleTable, array_at

# Rows without top-k look at about this many of the largest probabilities first.
_FIRST_LOOK = 64
# Tokens that share one entry when the k-th largest is bounded from below.
_STRIDE = 16
# Consecutive tokens summed to one entry when a token is drawn from the whole vocabulary.
_BLOCK = 256
_TINY = np.finfo(np.float32).smallest_subnormal


def sample(
    logits: Tensor,
    table: SampleTable,
    rows: np.ndarray,
    positions: np.ndarray,
    eos: np.ndarray,
) -> Sampled:
    values, draws = logits.numpy(), table.records[rows]
    for row, draw, position in zip(values, draws, positions.tolist(), strict=True):
        edit_logits(row, draw, position, eos)
    tokens = values.argmax(axis=-1)
    valid = np.isfinite(values[np.arange(len(draws)), tokens])
    drawn = np.flatnonzero(valid & (draws["temperature"] > 0))
    if len(drawn):
        tokens[drawn] = _draw(values[drawn], draws[drawn], positions[drawn])
    return Sampled(tokens, valid)


def log_probs(
    logits: Tensor, picks: np.ndarray, temperature: np.ndarray, ids: np.ndarray, top: int
) -> LogProbs:
    divisor = torch.from_numpy(np.where(temperature > 0, temperature, np.float32(1)))
    values = torch.log_softmax(logits[torch.from_numpy(picks)] / divisor[:, None], dim=-1).numpy()
    top = min(top, logits.shape[1])
    best = np.stack([largest(row, top) for row in values])
    return LogProbs(
        values=np.take_along_axis(values, ids, axis=-1),
        top_ids=best,
        top_values=np.take_along_axis(values, best, axis=-1),
    )


def largest(values: np.ndarray, count: int) -> np.ndarray:
    """Ids int64 of the `count` largest in falling order; of equal ones the lower comes first."""
    if not count:
        return np.empty(0, dtype=np.int64)
    last = np.partition(values, len(values) - count)[len(values) - count]
    ids = np.arange(count) if np.isnan(last) else np.flatnonzero(values >= last)
    chosen: np.ndarray = ids[np.argsort(-values[ids], kind="stable")[:count]]
    return chosen


def edit_logits(logits: np.ndarray, draw: np.void, position: int, eos: np.ndarray) -> None:
    """Change `logits` (float32 [vocab]) of the token at a position in place.

    With c the number of times a token is in the output:

        l = l - frequency_penalty * c - presence_penalty * [c > 0]
        l = l / repetition_penalty if l > 0 else l * repetition_penalty,  tokens of prompt + output
        l = l + bias
        l = -inf for end-of-sequence and stop ids while the output is shorter than min_new_tokens
    """
    tokens = array_at(draw["tokens"], position, c_int32)
    output = tokens[draw["prompt_len"] :]
    if (draw["frequency_penalty"] or draw["presence_penalty"]) and len(output):
        ids, counts = np.unique(output, return_counts=True)
        logits[ids] -= draw["frequency_penalty"] * counts.astype(np.float32)
        logits[ids] -= draw["presence_penalty"]
    if draw["repetition_penalty"] != 1:
        values, factor = logits[tokens], draw["repetition_penalty"]
        logits[tokens] = np.where(values > 0, values / factor, values * factor)
    count = int(draw["bias_count"])
    if count:
        logits[array_at(draw["bias_ids"], count, c_int32)] += array_at(draw["bias"], count, c_float)
    if len(output) < draw["min_new_tokens"]:
        stops = np.append(array_at(draw["stops"], int(draw["stop_count"]), c_int32), eos)
        logits[stops[(stops >= 0) & (stops < len(logits))]] = -np.inf


def _draw(logits: np.ndarray, draws: np.ndarray, positions: np.ndarray) -> np.ndarray:
    """Tokens int64 [n] of rows that are not greedy."""
    noise = uniform(draws["seed"], draws["sample_index"], positions)
    scaled = torch.from_numpy(logits) / torch.from_numpy(draws["temperature"].copy())[:, None]
    probs, vocab = torch.softmax(scaled, dim=-1).numpy(), logits.shape[1]
    top_k = np.where(draws["top_k"] > 0, np.minimum(draws["top_k"], vocab), vocab)
    filters = Filters(top_k, draws["top_p"], draws["min_p"])
    filtered = filters.active(vocab)
    tokens = np.empty(len(draws), dtype=np.int64)
    some, rest = np.flatnonzero(filtered), np.flatnonzero(~filtered)
    if len(some):
        tokens[some] = draw_filtered(probs[some], filters.of(some), noise[some])
    if len(rest):
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
