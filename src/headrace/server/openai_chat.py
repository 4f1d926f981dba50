"""POST /v1/chat/completions: messages become one prompt, deltas become chat chunks.

Stream order of a choice: a chunk with the role; chunks with content, reasoning or a piece of a
tool call (its name first, then its arguments); one chunk with the finish reason; after all choices
the usage, if asked. Tools reach the prompt through the chat template; `speech` tells calls and
reasoning in the answer from content. Pure: no sockets, no clock.
"""

from typing import Any

from headrace.core.errors import BadRequest
from headrace.core.messages import Delta, GenerateRequest, LogprobSpec, pack_ids
from headrace.frontend.requests import fan_out
from headrace.server.answers import Chat, prompt_ids, understand
from headrace.server.choices import Choices, Gathered, finish_fields
from headrace.server.context import Context, Job, Stamp
from headrace.server.logprobs import chat_logprobs
from headrace.server.sampling import namespace_of, sampling_params
from headrace.server.schemas import (
    ChatRequest,
    TokenizeRequest,
    ignored_fields,
    read,
    refuse_unsupported,
)
from headrace.server.speech import THINKING_NAMES, Speech
from headrace.server.spoken import Spoken, part_of
from headrace.server.sse import SLOT, event, split_event, to_json
from headrace.server.tools import offered
from headrace.text.parsers.events import Content

_OWN_FIELDS = {"self", "messages", "tools", "add_generation_prompt", "continue_final_message"}


def parse(raw: bytes, context: Context, stamp: Stamp) -> Job:
    """The job that a body describes.

    Raises:
        BadRequest: names the field.
        NotFound: the model is not served here.
    """
    body = read(ChatRequest, raw)
    refuse_unsupported(body)
    context.check_model(body.model)
    chat = chat_of(body)
    ids = prompt_ids(chat, context) if body.input_ids is None else body.input_ids
    stamp = stamp._replace(id=body.rid or stamp.id)
    ignored = ignored_fields(body)
    if body.tools and body.input_ids is None and not context.templates.supports_tools:
        ignored.append("tools")
    request = _request(body, ids, stamp.id, context)
    request, speech, unenforced = understand(
        chat, request, context, separate=body.separate_reasoning is not False
    )
    reply = (ChatEvents if body.stream else ChatResult)(body, ids, context, stamp, speech)
    return Job(fan_out(request), reply, stamp.id, ignored + unenforced)


def chat_of(body: ChatRequest | TokenizeRequest) -> Chat:
    """The conversation of a body.

    Raises:
        BadRequest: names the field.
    """
    tools, choice = offered(body.tools, body.tool_choice)
    return Chat(
        body.messages or [],
        tools,
        choice,
        variables=_variables(body),
        continues=bool(body.continue_final_message),
        opens=body.add_generation_prompt,
        parallel=not isinstance(body, ChatRequest) or body.parallel_tool_calls is not False,
    )


def _variables(body: ChatRequest | TokenizeRequest) -> dict[str, Any]:
    """What a request adds to the variables of the chat template."""
    variables = dict(body.chat_template_kwargs or {})
    if taken := _OWN_FIELDS & variables.keys():
        name = min(taken)
        raise BadRequest(
            f"chat_template_kwargs.{name}: not a template variable that a request may set",
            field="chat_template_kwargs",
        )
    if body.reasoning_effort is not None:
        variables.setdefault("reasoning_effort", body.reasoning_effort)
    if body.reasoning_effort == "none":
        for name in THINKING_NAMES:
            variables.setdefault(name, False)
    return variables


def _request(body: ChatRequest, ids: list[int], rid: str, context: Context) -> GenerateRequest:
    if body.top_logprobs and not body.logprobs:
        raise BadRequest("top_logprobs: needs logprobs to be true", field="top_logprobs")
    asked = body.max_tokens if body.max_completion_tokens is None else body.max_completion_tokens
    return GenerateRequest(
        rid=rid,
        ids=pack_ids(ids),
        sampling=sampling_params(body, context.openai_sampling, context.max_tokens(asked, None)),
        stream=bool(body.stream),
        logprobs=LogprobSpec(top=body.top_logprobs or 0) if body.logprobs else None,
        priority=body.priority,
        namespace=namespace_of(body),
        timings=bool(body.return_timings),
    )


class _Answer:
    """What the streamed and the whole answer share."""

    def __init__(
        self, body: ChatRequest, ids: list[int], context: Context, stamp: Stamp, speech: Speech
    ) -> None:
        self.head: dict[str, Any] = {
            "id": stamp.id,
            "object": "chat.completion.chunk" if body.stream else "chat.completion",
            "created": stamp.created,
            "model": body.model or context.model_name,
        }
        self.count = body.n or 1
        self.choices = Choices(self.count, self.count, context.config.serve.enable_cache_report)
        self.token_ids = bool(body.return_token_ids)
        self.prompt_ids = ids if self.token_ids or body.return_prompt_token_ids else None
        self.tokenizer = context.tokenizer("logprobs") if body.logprobs else None
        self.speech = speech
        hold = body.stream_reasoning is False
        self.spoken = [Spoken(speech, hold_reasoning=hold) for _ in range(self.count)]
        self._reader = context.manager.tokenizer

    def usage(self, only: int | None = None) -> dict[str, Any]:
        """The `usage` object; at the end also how many tokens were reasoning."""
        usage = self.choices.usage(only)
        if self.speech.reasoning and self._reader is not None and only is None:
            # Counted on the text: a delta may hold tokens of both sides of the mark.
            texts = [spoken.reasoning for spoken in self.spoken if spoken.reasoning]
            count = sum(map(len, self._reader.encode_batch(texts, False))) if texts else 0
            usage["reasoning_tokens"] = count
            usage["completion_tokens_details"] = {"reasoning_tokens": count}
        return usage

    def finish(self, index: int, delta: Delta) -> dict[str, Any]:
        """`finish_reason` and `matched_stop` of a choice."""
        fields = finish_fields(delta)
        called = self.spoken[index].called
        fields["finish_reason"] = self.speech.finish_reason(fields["finish_reason"], called)
        return fields


class ChatEvents:
    """The streamed answer. Most chunks are content alone: bytes around it are made only once."""

    def __init__(
        self, body: ChatRequest, ids: list[int], context: Context, stamp: Stamp, speech: Speech
    ) -> None:
        self._answer = _Answer(body, ids, context, stamp, speech)
        options = body.stream_options
        self._usage_at_end = bool(options and options.include_usage)
        self._usage_always = bool(options and options.continuous_usage_stats)
        self._plain = not (body.logprobs or self._answer.token_ids or self._usage_always)
        self._frames = [
            split_event(self._chunk(index, self._choice(index, part_of(Content(SLOT), speech))))
            for index in range(self._answer.count)
        ]

    def event(self, index: int, delta: Delta) -> bytes:
        out = b""
        if self._answer.choices.see(index, delta):
            out = event(self._chunk(index, self._first_choice(index)))
        said = self._answer.spoken[index].read(delta)
        if self._plain:
            for one in said:
                if isinstance(one, Content):
                    before, after = self._frames[index]
                    out += before + to_json(one.text) + after
                else:
                    part = part_of(one, self._answer.speech)
                    out += event(self._chunk(index, self._choice(index, part)))
        elif said or delta.ids:
            for number, one in enumerate(said or [Content("")]):
                choice = self._choice(index, part_of(one, self._answer.speech))
                if number == 0:
                    self._add_tokens(choice, delta)
                out += event(self._chunk(index, choice))
        if delta.finish is not None:
            choice = {**self._choice(index, {}), **self._answer.finish(index, delta)}
            out += event(self._chunk(index, choice))
        return out

    def end(self) -> bytes:
        if not self._usage_at_end:
            return b""
        return event({**self._answer.head, "choices": [], "usage": self._answer.usage()})

    def _chunk(self, index: int, choice: dict[str, Any]) -> dict[str, Any]:
        chunk = {**self._answer.head, "choices": [choice]}
        if self._usage_always:
            chunk["usage"] = self._answer.usage(only=index)
        elif self._usage_at_end:
            chunk["usage"] = None
        return chunk

    def _choice(self, index: int, delta: dict[str, Any]) -> dict[str, Any]:
        return {
            "index": index,
            "delta": delta,
            "logprobs": None,
            "finish_reason": None,
            "matched_stop": None,
        }

    def _first_choice(self, index: int) -> dict[str, Any]:
        choice = self._choice(
            index, {"role": "assistant", "content": "", "reasoning_content": None}
        )
        if self._answer.prompt_ids is not None:
            choice["prompt_token_ids"] = self._answer.prompt_ids
        return choice

    def _add_tokens(self, choice: dict[str, Any], delta: Delta) -> None:
        """The log-probabilities and token ids of a delta."""
        if self._answer.tokenizer and delta.logprobs:
            choice["logprobs"] = chat_logprobs(delta.logprobs, self._answer.tokenizer)
        if self._answer.token_ids:
            choice["token_ids"] = delta.ids


class ChatResult:
    """The answer in one piece."""

    def __init__(
        self, body: ChatRequest, ids: list[int], context: Context, stamp: Stamp, speech: Speech
    ) -> None:
        self._answer = _Answer(body, ids, context, stamp, speech)
        self._gathered = [Gathered() for _ in range(self._answer.count)]

    def add(self, index: int, delta: Delta) -> None:
        self._answer.choices.see(index, delta)
        self._answer.spoken[index].read(delta)
        self._gathered[index].add(delta)

    def result(self) -> dict[str, Any]:
        choices = [self._choice(index) for index in range(self._answer.count)]
        return {**self._answer.head, "choices": choices, "usage": self._answer.usage()}

    def _choice(self, index: int) -> dict[str, Any]:
        answer, got = self._answer, self._gathered[index]
        message = answer.spoken[index].message()
        logprobs = chat_logprobs(got.logprobs, answer.tokenizer) if answer.tokenizer else None
        choice = {"index": index, "message": message, "logprobs": logprobs, **got.finish}
        choice["finish_reason"] = answer.speech.finish_reason(
            choice["finish_reason"], answer.spoken[index].called
        )
        if answer.token_ids:
            choice["token_ids"] = got.ids
        if answer.prompt_ids is not None:
            choice["prompt_token_ids"] = answer.prompt_ids
        return choice
