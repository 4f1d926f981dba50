"""What all kinds of examples share: the example type, seeded choice, the train / held-out split.

Knows nothing of tokens or models. Invariant: all randomness comes from the `Random` that the caller
passes, so one seed always gives the same data, and a wording or key that `pick` or `split_key`
reserves for the held-out side is never used on the training side.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from random import Random
from typing import Any, Literal
from zlib import crc32

Message = dict[str, Any]
Tool = dict[str, Any]
Check = Literal["words", "reply", "json", "call", "story"]


@dataclass(frozen=True)
class Example:
    """One conversation in the OpenAI message form; its last message is the answer to be learned.

    `check` names the rule of evaluate.py that judges a model's answer against `want`.
    """

    kind: str
    messages: list[Message]
    check: Check
    want: Any
    tools: tuple[Tool, ...] = ()


@dataclass(frozen=True)
class Wordings:
    """Ways to say one thing: those that training may use and those kept for evaluation."""

    train: Sequence[str]
    held: Sequence[str]

    def pick(self, rng: Random, held: bool) -> str:
        return rng.choice(self.held if held else self.train)


def split_key(key: str, share: int = 10) -> bool:
    """True for the one key in `share` that is reserved for the held-out side."""
    return crc32(key.encode()) % share == 0


def user(content: str) -> Message:
    return {"role": "user", "content": content}


def assistant(content: str) -> Message:
    return {"role": "assistant", "content": content}


def roughen(rng: Random, prompt: str) -> str:
    """Type like people do: now and then no capital at the start or no mark at the end."""
    if rng.random() < 0.15:
        prompt = prompt[0].lower() + prompt[1:]
    if rng.random() < 0.15:
        prompt = prompt.rstrip("?.!")
    return prompt


def pairs(table: str) -> list[tuple[str, str]]:
    """Read `left: right; left: right` tables; newlines count as blanks."""
    rows = (row.partition(":") for row in " ".join(table.split()).split(";") if row.strip())
    return [(left.strip(), right.strip()) for left, _, right in rows]


def words(table: str) -> list[str]:
    """Read a comma-separated list; newlines count as blanks."""
    return [word.strip() for word in " ".join(table.split()).split(",") if word.strip()]


def with_articles(text: str) -> str:
    """`text` with `an` in place of `a` before a vowel."""
    return re.sub(r"\b([Aa]) (?=[aeiou])", r"\1n ", text)


def upper_first(text: str) -> str:
    return text[0].upper() + text[1:]


def article(noun: str) -> str:
    """`noun` with its indefinite article."""
    return f"{'an' if noun[0].lower() in 'aeiou' else 'a'} {noun}"
