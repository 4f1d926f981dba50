"""The demo model's data: seeded, made from nothing, one stream for training and one for evaluation.

`MIX` says how much of each kind training sees. Invariant: `training` never yields a conversation
whose context is in `held_out` (checked per conversation, beside the split inside each kind).
"""

import json
from collections.abc import Callable, Iterator
from dataclasses import replace
from random import Random

from .about import about_headrace, about_text
from .arithmetic import sum_text, sums, units
from .base import Example, Message
from .extract import extract
from .facts import fact, fact_text
from .smalltalk import greeting, orders, small_talk
from .stories import stories, story_text
from .toolcalls import tool_answer, tool_call, tool_free
from .turns import several_turns

Maker = Callable[[Random, bool], Example]

# kind: (maker, weight in training)
MIX: dict[str, tuple[Maker, float]] = {
    "greeting": (greeting, 3),
    "small talk": (small_talk, 7),
    "orders": (orders, 16),
    "arithmetic": (sums, 20),
    "units": (units, 4),
    "facts": (fact, 22),
    "headrace": (about_headrace, 5),
    "stories": (stories, 6),
    "extraction": (extract, 14),
    "tool call": (tool_call, 14),
    "tool answer": (tool_answer, 5),
    "no tool": (tool_free, 2),
    "several turns": (several_turns, 9),
}
TEXTS: tuple[Callable[[Random], str], ...] = (
    fact_text,
    fact_text,
    story_text,
    about_text,
    sum_text,
)
SYSTEM_SHARE, TEXT_SHARE, JOINED_SHARE = 0.15, 0.07, 0.1
SYSTEMS = (
    "You are a helpful assistant.", "You are the demo model of headrace.",
    "You are a friendly assistant.",
    "Answer in short sentences.", "Be kind and brief.", "You are a helpful AI assistant.",
)  # fmt: skip


def context_key(example: Example) -> str:
    """What the model sees before the answer, without the system turn."""
    turns = [m for m in example.messages[:-1] if m["role"] != "system"]
    return json.dumps([turns, example.tools], sort_keys=True)


def held_out(seed: int, per_kind: int) -> list[Example]:
    """`per_kind` different examples of each kind (fewer where a kind has fewer), for evaluation."""
    found: dict[str, Example] = {}
    for kind, (make, _) in MIX.items():
        rng = Random(f"{seed} held {kind}")
        mine: dict[str, Example] = {}
        for _ in range(per_kind * 40):
            example = make(rng, True)
            mine.setdefault(context_key(example), example)
            if len(mine) == per_kind:
                break
        found |= mine
    return list(found.values())


def chat(rng: Random) -> Example:
    """One conversation to train on: mostly one example, now and then a few of them in a row."""
    makers = [make for make, _ in MIX.values()]
    weights = [weight for _, weight in MIX.values()]
    first = rng.choices(makers, weights)[0](rng, False)
    if first.tools or rng.random() > JOINED_SHARE:
        return first
    messages = list(first.messages)
    for _ in range(rng.randint(1, 4)):
        more = rng.choices(makers, weights)[0](rng, False)
        messages += [] if more.tools else more.messages
    return replace(first, messages=messages)


def training(seed: int, reserved: list[Example]) -> Iterator[Example | str]:
    """An endless stream of conversations and, as `str`, plain texts."""
    rng = Random(f"{seed} train")
    keys = {context_key(example) for example in reserved}
    while True:
        if rng.random() < TEXT_SHARE:
            yield rng.choice(TEXTS)(rng)
            continue
        example = chat(rng)
        if context_key(example) in keys:
            continue
        if rng.random() < SYSTEM_SHARE:
            system: Message = {"role": "system", "content": rng.choice(SYSTEMS)}
            example = replace(example, messages=[system, *example.messages])
        yield example
