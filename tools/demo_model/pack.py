"""Turns examples into packed rows of tokens with loss weights and segment numbers.

Invariants: a row holds whole conversations only; segment 0 is padding; only what the assistant says
(with its end-of-turn token) has weight, and a plain text has weight everywhere. One conversation
weighs the square root of its answer length, so that stories do not drown short answers.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from transformers import PreTrainedTokenizerFast

from .data.base import Example
from .tokenizer import END_OF_TEXT, TURN_END, TURN_START

OPEN_ROWS = 24


@dataclass(frozen=True)
class Rows:
    """tokens uint16, weights float16, segments uint8, all of shape [rows, length]."""

    tokens: np.ndarray
    weights: np.ndarray
    segments: np.ndarray

    def save(self, path: Path) -> None:
        np.savez(path, tokens=self.tokens, weights=self.weights, segments=self.segments)

    @classmethod
    def load(cls, path: Path) -> "Rows":
        with np.load(path, allow_pickle=False) as arrays:
            return cls(arrays["tokens"], arrays["weights"], arrays["segments"])


Document = tuple[list[int], list[float]]


class Encoder:
    """Examples to (token ids, loss weights), with the tokenizer's own chat template."""

    def __init__(self, tokenizer: PreTrainedTokenizerFast) -> None:
        self.tokenizer = tokenizer
        self.start = tokenizer.convert_tokens_to_ids(TURN_START)
        self.end = tokenizer.convert_tokens_to_ids(TURN_END)
        self.end_of_text = tokenizer.convert_tokens_to_ids(END_OF_TEXT)
        self.assistant = tokenizer.encode("assistant\n")

    def encode(self, item: Example | str) -> Document:
        if isinstance(item, str):
            ids = [*self.tokenizer.encode(item), self.end_of_text]
            return ids, self.scaled([1.0] * len(ids))
        text = self.tokenizer.apply_chat_template(
            item.messages, tools=list(item.tools) or None, tokenize=False
        )
        ids = self.tokenizer.encode(text)
        return ids, self.scaled(self.answer_mask(ids))

    def answer_mask(self, ids: list[int]) -> list[float]:
        """1.0 on the tokens from after `<|im_start|>assistant` to `<|im_end|>`, inclusive."""
        mask, inside, head = [0.0] * len(ids), False, len(self.assistant)
        for at, token in enumerate(ids):
            if token == self.start:
                inside = False
            elif ids[at - head : at] == self.assistant and ids[at - head - 1] == self.start:
                inside = True
            mask[at] = float(inside)
            if token == self.end:
                inside = False
        return mask

    @staticmethod
    def scaled(mask: list[float]) -> list[float]:
        scale = max(1.0, sum(mask)) ** -0.5
        return [m * scale for m in mask]


def first_fit(documents: Iterable[Document], length: int) -> Iterator[list[Document]]:
    """Put each document in the first open row with room; longer ones than a row are dropped."""
    rows: list[list[Document]] = [[] for _ in range(OPEN_ROWS)]
    room = [length] * OPEN_ROWS
    for document in documents:
        size = len(document[0])
        if size > length:
            continue
        at = next((i for i in range(OPEN_ROWS) if room[i] >= size), None)
        if at is None:
            at = room.index(min(room))
            yield rows[at]
            rows[at], room[at] = [], length
        rows[at].append(document)
        room[at] -= size


def pack(documents: Iterable[Document], length: int, count: int) -> Rows:
    """`count` rows of `length` tokens from an endless stream of documents."""
    rows = Rows(
        np.zeros((count, length), np.uint16),
        np.zeros((count, length), np.float16),
        np.zeros((count, length), np.uint8),
    )
    for index, row in zip(range(count), first_fit(documents, length), strict=False):
        at = 0
        for segment, (ids, weights) in enumerate(row, start=1):
            place = slice(at, at + len(ids))
            rows.tokens[index, place] = ids
            rows.weights[index, place] = weights
            rows.segments[index, place] = segment
            at += len(ids)
    return rows
