"""Incremental parsers of what a model writes: reasoning, tool calls, content.

Pure functions of the text: they know no request, no protocol and no token. `make_parser` builds
one for a request; `TOOL_DIALECTS` and `REASONING` are the names it takes, with SGLang's aliases;
`detect` finds the names for a chat template; `markers` says what must be visible in the text.
"""

from typing import Any

from headrace.text.parsers import harmony, json_calls, python_calls, tagged_calls
from headrace.text.parsers import reasoning as reasoning_block
from headrace.text.parsers.calls import Grammar, marked, unmarked
from headrace.text.parsers.detect import detect
from headrace.text.parsers.events import OutputParser
from headrace.text.parsers.harmony import HARMONY
from headrace.text.parsers.reasoning import Block
from headrace.text.parsers.schema import Tools
from headrace.text.parsers.source import Chain, GrammarParser, Out, Source, Wait
from headrace.text.parsers.structure import enforces, structure

__all__ = [
    "HARMONY",
    "JSON_CALLS",
    "REASONING",
    "TOOL_DIALECTS",
    "detect",
    "dialect_of_calls",
    "enforces",
    "make_parser",
    "markers",
    "prompt_opens",
    "reasoning_end",
    "structure",
]

# What a model writes that a JSON schema forces to call tools; no model's own dialect.
JSON_CALLS = "json"

_MARKED = {
    "hermes": (json_calls.HERMES, json_calls.hermes),
    "mistral": (json_calls.MISTRAL, json_calls.mistral),
    "deepseekv3": (json_calls.DEEPSEEK, json_calls.deepseek),
    "deepseekv31": (json_calls.DEEPSEEK, json_calls.deepseek),
    "kimi_k2": (json_calls.KIMI, json_calls.kimi),
    "qwen3_coder": (
        tagged_calls.QWEN3_CODER,
        tagged_calls.tagged(tagged_calls.QWEN3_CODER_TAGS),
    ),
    "glm45": (tagged_calls.GLM45, tagged_calls.tagged(tagged_calls.GLM45_TAGS)),
    "minimax-m2": (tagged_calls.MINIMAX, tagged_calls.tagged(tagged_calls.MINIMAX_TAGS)),
    "step3": (tagged_calls.STEP3, tagged_calls.step3),
    "gemma4": (python_calls.GEMMA4, python_calls.gemma(python_calls.GEMMA4_QUOTE)),
    "functiongemma": (
        python_calls.FUNCTION_GEMMA,
        python_calls.gemma(python_calls.FUNCTION_GEMMA_QUOTE),
    ),
}
_UNMARKED = {
    "llama3": ((json_calls.LLAMA3_TAG,), json_calls.json_calls),
    "pythonic": ((python_calls.LLAMA4_TAG, python_calls.LLAMA4_END), python_calls.pythonic),
    JSON_CALLS: ((), json_calls.json_calls),
}
_BLOCKS: dict[str, Block] = {
    "deepseek-r1": reasoning_block.THINK_OPENED,
    "deepseek-v3": reasoning_block.THINK,
    "qwen3": reasoning_block.THINK_USUAL,
    "qwen3-thinking": reasoning_block.THINK_OPENED,
    "glm45": reasoning_block.THINK_USUAL,
    "kimi": reasoning_block.KIMI,
    "kimi_k2": reasoning_block.THINK,
    "mistral": reasoning_block.MISTRAL,
    "granite": reasoning_block.GRANITE,
    "gemma4": reasoning_block.GEMMA4,
    "minimax": reasoning_block.THINK_OPENED,
    "step3": reasoning_block.THINK_OPENED,
}
# Every name that --tool-call-parser takes -> the dialect it stands for.
TOOL_DIALECTS: dict[str, str] = {
    name: name for name in (*_MARKED, "llama3", "pythonic", HARMONY)
} | {
    "qwen": "hermes",
    "qwen25": "hermes",
    "interns1": "hermes",
    "llama4": "pythonic",
    "glm": "glm45",
    "glm47": "glm45",
    "gemma": "gemma4",
    "minimax": "minimax-m2",
    "gpt_oss": HARMONY,
}
# Every name that --reasoning-parser takes -> the family it stands for.
REASONING: dict[str, str] = {name: name for name in (*_BLOCKS, HARMONY)} | {
    "deepseek-v31": "deepseek-v3",
    "interns1": "qwen3",
    "granite_thinking_parser": "granite",
    "magistral": "mistral",
    "minimax-m2": "minimax",
    "gpt_oss": HARMONY,
}


def make_parser(
    reasoning: str,
    tools_dialect: str,
    tools: list[dict[str, Any]],
    *,
    thinking: bool,
    opened: bool | None = None,
) -> OutputParser:
    """A parser for one answer.

    `reasoning` and `tools_dialect` are names of `REASONING` and `TOOL_DIALECTS` (or JSON_CALLS),
    "" for none. Without `tools` there are no calls. Not `thinking`: reasoning is off for this
    request, all text is content or calls. `opened`: whether the prompt ends inside the reasoning;
    None takes what is usual for the family.

    Raises:
        KeyError: an unknown name.
    """
    family = REASONING[reasoning] if reasoning else ""
    dialect = tools_dialect if tools_dialect in ("", JSON_CALLS) else TOOL_DIALECTS[tools_dialect]
    known = Tools(tools) if tools and dialect else None
    if HARMONY in (family, dialect):
        own_tools = known if dialect == HARMONY else None
        first = GrammarParser(harmony.harmony(own_tools, reasoning=family == HARMONY))
        if known is None or dialect == HARMONY:
            return first
        return Chain(first, GrammarParser(_calls(dialect, known)))
    grammars: list[Grammar] = []
    if family and thinking:
        starts_inside = _BLOCKS[family].opened if opened is None else opened
        grammars.append(_reasoning(family, starts_inside, dialect if known else ""))
    if known is not None:
        grammars.append(_calls(dialect, known))
    parsers = [GrammarParser(grammar) for grammar in grammars or [_plain]]
    return parsers[0] if len(parsers) == 1 else Chain(parsers[0], parsers[1])


def prompt_opens(reasoning: str, prompt: str) -> bool | None:
    """True if `prompt` (its end is enough) ends inside the reasoning, False if just behind it, so
    that there is none to come; None if it says nothing."""
    block = _BLOCKS.get(REASONING.get(reasoning, ""))
    if block is None:
        return None
    text = prompt.rstrip()
    if text.endswith(block.begin):
        return True
    return False if text.endswith(block.end) else None


def reasoning_end(reasoning: str, opened: bool | None) -> str:
    """The mark behind which a grammar begins to count, "" if no reasoning is to be expected.

    `opened` as `prompt_opens` gives it. gpt-oss has channels instead: its grammar counts at once.
    """
    block = _BLOCKS.get(REASONING.get(reasoning, ""))
    if block is None or opened is False or not (opened or block.usual):
        return ""
    return block.end[0]


def dialect_of_calls(tools_dialect: str, choice: str | dict[str, Any]) -> str:
    """The dialect in which calls come: a model without one, when forced, writes JSON_CALLS."""
    dialect = TOOL_DIALECTS.get(tools_dialect, tools_dialect)
    return dialect or (JSON_CALLS if choice not in ("auto", "none") else "")


def markers(reasoning: str, tools_dialect: str) -> tuple[str, ...]:
    """The marks that a parser looks for. Those that are special tokens of the tokenizer must not
    be skipped in the text that it is fed."""
    dialect = TOOL_DIALECTS.get(tools_dialect, tools_dialect)
    family = REASONING.get(reasoning, "")
    found: tuple[str, ...] = harmony.MARKERS if HARMONY in (family, dialect) else ()
    if block := _BLOCKS.get(family):
        found += block.begin + block.end
    if dialect in _MARKED:
        found += _MARKED[dialect][0].all
    if dialect in _UNMARKED:
        found += _UNMARKED[dialect][0]
    return found


def _reasoning(family: str, opened: bool, dialect: str) -> Grammar:
    around = _MARKED[dialect][0] if dialect in _MARKED else None
    interrupts = around.triggers if around and around.special else ()
    return reasoning_block.split_reasoning(_BLOCKS[family], opened, interrupts)


def _calls(dialect: str, tools: Tools) -> Grammar:
    if dialect in _MARKED:
        around, body = _MARKED[dialect]
        return marked(around, body, tools)
    tags, body = _UNMARKED[dialect]
    return unmarked(body, tags, tools)


def _plain(source: Source, out: Out) -> Wait[None]:
    yield from source.rest(out.content)
