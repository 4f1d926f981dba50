"""Judges a checkpoint on held-out prompts, greedily with transformers; writes the model card.

Knows nothing of how the model was trained. Invariant: the score of a kind is the share of its
held-out prompts whose answer passes the rule named by `Example.check`, with the weights as shipped.
"""

import json
import re
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from .data.base import Example

CARD = Path(__file__).with_name("card.md")
CALL = re.compile(r"^<tool_call>\n(.*)\n</tool_call>$", re.DOTALL)
MAX_NEW_TOKENS, BATCH = 200, 32


def has_words(answer: str, want: Sequence[str]) -> bool:
    """Each wanted piece is there, not as a part of a longer word or number."""
    return all(re.search(rf"(?<!\w){re.escape(piece)}(?!\w)", answer) for piece in want)


def is_reply(answer: str, want: Sequence[str]) -> bool:
    return answer in want


def is_json(answer: str, want: Any) -> bool:
    try:
        return bool(json.loads(answer) == want)
    except json.JSONDecodeError:
        return False


def is_call(answer: str, want: Any) -> bool:
    found = CALL.match(answer)
    return found is not None and is_json(found[1], want)


def is_story(answer: str, want: Sequence[str]) -> bool:
    """Names what was asked for, ends as stories end, and has the length of one."""
    return (
        has_words(answer, want) and answer.endswith("The end.") and 40 <= len(answer.split()) <= 160
    )


RULES: dict[str, Callable[[str, Any], bool]] = {
    "words": has_words,
    "reply": is_reply,
    "json": is_json,
    "call": is_call,
    "story": is_story,
}


@dataclass(frozen=True)
class Verdict:
    example: Example
    answer: str
    passed: bool


def answers(folder: Path, examples: Sequence[Example], dtype: torch.dtype) -> list[str]:
    """Greedy answers, in the order of `examples`."""
    tokenizer = AutoTokenizer.from_pretrained(folder, padding_side="left")
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).eval()
    prompts = [prompt_text(tokenizer, example) for example in examples]
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
    texts = [""] * len(prompts)
    for at in range(0, len(order), BATCH):
        chunk = order[at : at + BATCH]
        inputs = tokenizer([prompts[i] for i in chunk], return_tensors="pt", padding=True)
        inputs.pop("token_type_ids", None)
        with torch.no_grad():
            out = model.generate(**inputs, do_sample=False, max_new_tokens=MAX_NEW_TOKENS)
        news = out[:, inputs["input_ids"].shape[1] :]
        for i, text in zip(
            chunk, tokenizer.batch_decode(news, skip_special_tokens=True), strict=True
        ):
            texts[i] = text
    return texts


def prompt_text(tokenizer: Any, example: Example) -> str:
    """The conversation up to the answer, with the answer's turn opened."""
    text = tokenizer.apply_chat_template(
        example.messages[:-1],
        tools=list(example.tools) or None,
        add_generation_prompt=True,
        tokenize=False,
    )
    assert isinstance(text, str)
    return text


def evaluate(folder: Path, examples: Sequence[Example]) -> list[Verdict]:
    texts = answers(folder, examples, torch.float32)
    return [
        Verdict(example, text, RULES[example.check](text, example.want))
        for example, text in zip(examples, texts, strict=True)
    ]


def score_table(verdicts: Sequence[Verdict]) -> str:
    """Passed and asked per kind, and over all, as a Markdown table."""
    kinds: dict[str, list[bool]] = defaultdict(list)
    for verdict in verdicts:
        kinds[verdict.example.kind].append(verdict.passed)
    kinds["**all**"] = [verdict.passed for verdict in verdicts]
    rows = [
        f"| {kind} | {sum(passed)} of {len(passed)} | {sum(passed) / len(passed):.0%} |"
        for kind, passed in kinds.items()
    ]
    return "\n".join(["| kind | right | share |", "|---|---|---|", *rows])


def samples(verdicts: Sequence[Verdict]) -> str:
    """The first judged prompt of each kind, right or wrong, with the answer as it came."""
    first: dict[str, Verdict] = {}
    for verdict in verdicts:
        first.setdefault(verdict.example.kind, verdict)
    blocks = []
    for kind, verdict in first.items():
        asked = verdict.example.messages[-2]["content"]
        mark = "" if verdict.passed else " (judged wrong)"
        blocks.append(f"{kind}{mark}\n> {asked}\n{verdict.answer}")
    return "\n\n".join(blocks)


def write_card(folder: Path, verdicts: Sequence[Verdict], facts: dict[str, str]) -> None:
    """Fill the card's template with the scores, samples and `facts` and write README.md."""
    fields = {"SCORES": score_table(verdicts), "SAMPLES": samples(verdicts), **facts}
    text = CARD.read_text(encoding="utf-8")
    for name, value in fields.items():
        text = text.replace(f"@{name}@", value)
    (folder / "README.md").write_text(text, encoding="utf-8")


def write_report(path: Path, verdicts: Sequence[Verdict]) -> None:
    """All answers judged wrong, for whoever improves the data."""
    lines = [
        f"[{v.example.kind}] {v.example.messages[-2]['content']}\n"
        f"  want {v.example.want}\n  got  {v.answer}"
        for v in verdicts
        if not v.passed
    ]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
