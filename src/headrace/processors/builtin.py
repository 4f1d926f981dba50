"""Processors that every server has: forbidden tokens, a budget for thinking, no repeated n-grams.

Each declares its parameters as a Struct, so that a wrong one is named to the client.
"""

from collections.abc import Mapping
from typing import Any, TypeVar

import msgspec
import numpy as np

from headrace.processors import Facts

T = TypeVar("T", bound=msgspec.Struct)
_MOST_IDS = 4096


class _Disallowed(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    token_ids: list[int]


class _Budget(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    thinking_budget: int
    min_thinking: int = 0
    begin: str = "<think>"
    end: str = "</think>"


class _NoRepeat(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    ngram_size: int
    window_size: int = 0
    whitelist_token_ids: list[int] = []


class DisallowedTokens:
    """`token_ids` are never sampled."""

    def __init__(self, params: Mapping[str, Any], facts: Facts) -> None:
        self._ids = _token_ids("token_ids", _read(params, _Disallowed).token_ids, facts)

    def __call__(self, logits: np.ndarray, prompt: np.ndarray, output: np.ndarray) -> None:
        logits[self._ids] = -np.inf


class ThinkingBudget:
    """At most `thinking_budget` tokens of reasoning, then its end mark; at least `min_thinking`.

    Counts from the mark `begin`, in the prompt or in the output. An output that does not reason is
    left alone.
    """

    def __init__(self, params: Mapping[str, Any], facts: Facts) -> None:
        read = _read(params, _Budget)
        self._most, self._least = read.thinking_budget, read.min_thinking
        if not 0 <= self._least <= self._most:
            raise ValueError("0 <= min_thinking <= thinking_budget must hold")
        self._begin = np.array(facts.ids(read.begin), dtype=np.int32)
        self._end = np.array(facts.ids(read.end), dtype=np.int32)
        self._eos = np.array(facts.eos_token_ids, dtype=np.int64)

    def __call__(self, logits: np.ndarray, prompt: np.ndarray, output: np.ndarray) -> None:
        start = self._start(prompt, output)
        if start < 0 or _last(output[start:], self._end) >= 0:
            return
        used = len(output) - start
        if used >= self._most:
            forced = self._end[min(used - self._most, len(self._end) - 1)]
            value = logits[forced]
            logits[:] = -np.inf
            logits[forced] = value if np.isfinite(value) else 0
        elif used < self._least:
            logits[self._end[0]] = -np.inf
            logits[self._eos] = -np.inf

    def _start(self, prompt: np.ndarray, output: np.ndarray) -> int:
        """Where in the output reasoning begins, -1 if it does not."""
        opened = _last(prompt, self._begin)
        if opened >= 0 and _last(prompt[opened:], self._end) < 0:
            return 0
        begun = _last(output, self._begin)
        return begun + len(self._begin) if begun >= 0 else -1


class NoRepeatNgram:
    """No `ngram_size` tokens come twice among the last `window_size` (0: all), but those of
    `whitelist_token_ids` may."""

    def __init__(self, params: Mapping[str, Any], facts: Facts) -> None:
        read = _read(params, _NoRepeat)
        if read.ngram_size < 1 or read.window_size < 0:
            raise ValueError("ngram_size must be at least 1 and window_size at least 0")
        self._size, self._window = read.ngram_size, read.window_size
        self._free = _token_ids("whitelist_token_ids", read.whitelist_token_ids, facts)

    def __call__(self, logits: np.ndarray, prompt: np.ndarray, output: np.ndarray) -> None:
        tokens = np.concatenate([prompt, output])[-self._window :]
        if len(tokens) < self._size:
            return
        grams = np.lib.stride_tricks.sliding_window_view(tokens, self._size)
        head = tokens[len(tokens) - self._size + 1 :]
        repeats = grams[(grams[:, :-1] == head).all(axis=1), -1]
        logits[repeats[~np.isin(repeats, self._free)]] = -np.inf


def _read(params: Mapping[str, Any], kind: type[T]) -> T:
    """Raises ValueError for a missing, unknown or wrong parameter."""
    try:
        return msgspec.convert(params, kind)
    except msgspec.ValidationError as error:
        raise ValueError(str(error)) from None


def _token_ids(name: str, ids: list[int], facts: Facts) -> np.ndarray:
    if len(ids) > _MOST_IDS:
        raise ValueError(f"{name} has {len(ids)} token ids; the limit is {_MOST_IDS}")
    if any(not 0 <= token < facts.vocab_size for token in ids):
        raise ValueError(f"{name}: token ids of this model are 0 to {facts.vocab_size - 1}")
    return np.array(ids, dtype=np.int64)


def _last(tokens: np.ndarray, mark: np.ndarray) -> int:
    """Where `mark` begins for the last time, -1 if nowhere."""
    places = np.flatnonzero(tokens[: len(tokens) - len(mark) + 1] == mark[0])
    for place in places[::-1].tolist():
        if (tokens[place : place + len(mark)] == mark).all():
            return int(place)
    return -1
