"""How the text of one chat answer is to be read: which dialects, which tools, reasoning or not.

The seam between chat adapters and `headrace.text.parsers`. Flags choose the dialects, else the
chat template tells them. Whether the answer begins inside the reasoning is read off the end of the
prompt. Knows no protocol.
"""

import functools
import json
import uuid
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import msgspec

from headrace.core.errors import Unsupported
from headrace.core.messages import SamplingParams
from headrace.frontend.sampling import read_sampling
from headrace.server.context import Context
from headrace.text.parsers import (
    HARMONY,
    JSON_CALLS,
    REASONING,
    TOOL_DIALECTS,
    detect,
    dialect_of_calls,
    enforces,
    make_parser,
    markers,
    prompt_opens,
    reasoning_end,
    structure,
)
from headrace.text.parsers.events import OutputParser

# Where templates look for the switch of reasoning.
THINKING_NAMES = ("enable_thinking", "thinking")
# Enough tokens to hold the mark that opens or closes the reasoning.
_TAIL = 16
_MISTRAL_ID_LENGTH = 9


def dialects(context: Context) -> tuple[str, str]:
    """The model's reasoning family and tool dialect, "" for none."""
    serve = context.config.serve
    templates = context.manager.templates
    found = ("", "")
    if templates is not None and templates.has_template:
        found = _detected(templates.source(True), templates.source(False))
    return (
        _chosen(serve.reasoning_parser, found[0], REASONING),
        _chosen(serve.tool_call_parser, found[1], TOOL_DIALECTS),
    )


def _chosen(flag: str, detected: str, names: dict[str, str]) -> str:
    return detected if flag == "auto" else names.get(flag, "")


@functools.lru_cache(maxsize=16)
def _detected(with_tools: str, without: str) -> tuple[str, str]:
    reasoning, tools = detect(with_tools)
    return reasoning or detect(without)[0], tools


@dataclass(frozen=True)
class Speech:
    """One request's answers. `family` marks reasoning, told from content if `separate`. `tools`
    are those that may be called; `choice` is OpenAI's tool_choice; `opened` as `prompt_opens`."""

    family: str
    dialect: str
    tools: list[dict[str, Any]]
    choice: str | dict[str, Any]
    thinking: bool
    separate: bool
    opened: bool | None

    @property
    def reasoning(self) -> str:
        """The family whose reasoning is told from content, "" for none."""
        return self.family if self.separate else ""

    @property
    def reasoning_end(self) -> str:
        """The mark that must come before a grammar counts."""
        return reasoning_end(self.family, self.opened) if self.thinking else ""

    @property
    def plain(self) -> bool:
        """Whether the text is the content."""
        reasons = self.reasoning and (self.thinking or self.reasoning == HARMONY)
        return not reasons and not (self.tools and self.dialect)

    def parser(self) -> OutputParser:
        """A fresh parser of one answer."""
        return make_parser(
            self.reasoning, self.dialect, self.tools, thinking=self.thinking, opened=self.opened
        )

    def finish_reason(self, reason: str | None, called: bool) -> str | None:
        """OpenAI's word for an answer with calls; a named function is answered with "stop"."""
        calls_end_it = called and reason == "stop" and not isinstance(self.choice, dict)
        return "tool_calls" if calls_end_it else reason

    def call_id(self, own: str) -> str:
        """The id of a call: the model's own, or a fresh one that its template accepts."""
        return self.bound_id(own) or f"call_{uuid.uuid4().hex[:24]}"

    def bound_id(self, own: str) -> str:
        """The id of a call if the model gave it or its template accepts no other, else ""."""
        if own or self.dialect != "mistral":
            return own
        return uuid.uuid4().hex[:_MISTRAL_ID_LENGTH]

    def visible(self, sampling: SamplingParams, context: Context) -> SamplingParams:
        """`sampling` such that the parser sees its marks, special tokens or not."""
        tokenizer = context.manager.tokenizer
        if self.plain or tokenizer is None or not sampling.skip_special_tokens:
            return sampling
        marks = markers(self.reasoning, self.dialect if self.tools else "")
        if all(tokenizer.special_id(mark) is None for mark in marks):
            return sampling
        return msgspec.structs.replace(sampling, skip_special_tokens=False)

    def constrained(
        self, sampling: SamplingParams, context: Context, parallel: bool
    ) -> tuple[SamplingParams, list[str]]:
        """`sampling` with the grammar that the tools ask for, and the names of what is asked for
        but cannot be enforced.

        Raises:
            Unsupported: a forced call cannot be enforced.
        """
        own = "" if self.dialect == JSON_CALLS else self.dialect
        free, answer = _split_answer(sampling)
        taken = any((free.regex, free.ebnf, free.structural_tag))
        if self.choice == "auto" and (taken or not _has_grammars(context)):
            return sampling, self._wishes(parallel)
        tag = structure(own, self.tools, self.choice, parallel, answer)
        if tag is None:
            return sampling, [] if enforces(own, self.choice) else self._wishes(parallel)
        if not _has_grammars(context):
            raise Unsupported("tool_choice: this server enforces no grammars", field="tool_choice")
        return read_sampling({"structural_tag": json.dumps(tag)}, free), []

    def _wishes(self, parallel: bool) -> list[str]:
        strict = any(tool["function"].get("strict") for tool in self.tools)
        return ["tools.strict"] * strict + ["parallel_tool_calls"] * (not parallel)


def _has_grammars(context: Context) -> bool:
    return context.config.run.grammar_backend != "none"


def _split_answer(sampling: SamplingParams) -> tuple[SamplingParams, Any]:
    """`sampling` without the JSON schema of the answer, and the schema. What is no JSON stays."""
    text = sampling.json_schema
    with suppress(ValueError, RecursionError):
        if text:
            return msgspec.structs.replace(sampling, json_schema=None), json.loads(text)
    return sampling, None


def speech_of(
    context: Context,
    ids: list[int],
    *,
    tools: list[dict[str, Any]],
    choice: str | dict[str, Any] = "auto",
    thinking: bool = True,
    separate: bool = True,
    continues: bool = False,
) -> Speech:
    """How answers to the prompt `ids` are read.

    `thinking`: reasoning is not switched off. `separate`: it is to be told from content.
    `continues`: the answer goes on with a message of the prompt.
    """
    family, dialect = dialects(context)
    opened = None
    if family and context.manager.tokenizer is not None:
        tail = context.manager.tokenizer.decode(ids[-_TAIL:], skip_special_tokens=False)
        opened = prompt_opens(family, tail)
    if opened is not None:
        thinking = opened
    elif continues:
        thinking = False
    usable = tools if choice != "none" else []
    return Speech(
        family=family,
        dialect=dialect_of_calls(dialect, choice) if usable else "",
        tools=usable,
        choice=choice,
        thinking=thinking,
        separate=separate,
        opened=opened,
    )
