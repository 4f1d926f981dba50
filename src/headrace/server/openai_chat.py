"""POST /v1/chat/completions: messages become one prompt, deltas become chat chunks.

Stream order of a choice: a chunk with the role, chunks with content, one chunk with the finish
reason; after all choices the usage, if asked. Tools reach the prompt through the chat template;
the text of the answer comes back as content. Pure: no sockets, no clock.
"""

from typing import Any

from headrace.core.errors import BadRequest, Unsupported
from headrace.core.messages import Delta, GenerateRequest, LogprobSpec, pack_ids
from headrace.frontend.requests import fan_out
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
from headrace.server.sse import SLOT, event, split_event, to_json

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
    ids = prompt_ids(body, context) if body.input_ids is None else body.input_ids
    stamp = stamp._replace(id=body.rid or stamp.id)
    ignored = ignored_fields(body)
    if body.tools and body.input_ids is None and not context.templates.supports_tools:
        ignored.append("tools")
    reply = (ChatEvents if body.stream else ChatResult)(body, ids, context, stamp)
    return Job(fan_out(_request(body, ids, stamp.id, context)), reply, stamp.id, ignored)


def prompt_ids(body: ChatRequest | TokenizeRequest, context: Context) -> list[int]:
    """Messages and tools through the chat template, as token ids.

    Raises:
        BadRequest: the template cannot take these messages; names the message.
    """
    if not body.messages:
        raise BadRequest("messages: must hold at least one message", field="messages")
    if body.tool_choice not in (None, "auto", "none"):
        raise Unsupported(
            "tool_choice: only 'auto' and 'none' are supported yet", field="tool_choice"
        )
    variables = dict(body.chat_template_kwargs or {})
    if taken := _OWN_FIELDS & variables.keys():
        name = min(taken)
        raise BadRequest(
            f"chat_template_kwargs.{name}: not a template variable that a request may set",
            field="chat_template_kwargs",
        )
    if body.reasoning_effort is not None:
        variables.setdefault("reasoning_effort", body.reasoning_effort)
    tokenizer = context.tokenizer("messages")
    prompt = context.templates.render(
        body.messages,
        tools=body.tools if body.tools and body.tool_choice != "none" else None,
        add_generation_prompt=body.add_generation_prompt,
        continue_final_message=bool(body.continue_final_message),
        **variables,
    )
    return tokenizer.encode(prompt, add_special_tokens=False)


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
    )


class _Answer:
    """What the streamed and the whole answer share."""

    def __init__(
        self, body: ChatRequest, ids: list[int], context: Context, stamp: Stamp, kind: str
    ) -> None:
        self.head = {
            "id": stamp.id,
            "object": kind,
            "created": stamp.created,
            "model": body.model or context.model_name,
        }
        self.count = body.n or 1
        self.choices = Choices(self.count, self.count, context.config.serve.enable_cache_report)
        self.token_ids = bool(body.return_token_ids)
        self.prompt_ids = ids if self.token_ids or body.return_prompt_token_ids else None
        self.tokenizer = context.tokenizer("logprobs") if body.logprobs else None


class ChatEvents:
    """The streamed answer. Most chunks are content alone: bytes around it are made only once."""

    def __init__(self, body: ChatRequest, ids: list[int], context: Context, stamp: Stamp) -> None:
        self._answer = _Answer(body, ids, context, stamp, "chat.completion.chunk")
        options = body.stream_options
        self._usage_at_end = bool(options and options.include_usage)
        self._usage_always = bool(options and options.continuous_usage_stats)
        self._plain = not (body.logprobs or self._answer.token_ids or self._usage_always)
        self._frames = [
            split_event(self._chunk(index, self._choice(index, _content(SLOT))))
            for index in range(self._answer.count)
        ]

    def event(self, index: int, delta: Delta) -> bytes:
        out = b""
        if self._answer.choices.see(index, delta):
            out = event(self._chunk(index, self._first_choice(index)))
        if self._plain:
            if delta.text:
                before, after = self._frames[index]
                out += before + to_json(delta.text) + after
        elif delta.text or delta.ids:
            out += event(self._chunk(index, self._rich_choice(index, delta)))
        if delta.finish is not None:
            choice = {**self._choice(index, {}), **finish_fields(delta)}
            out += event(self._chunk(index, choice))
        return out

    def end(self) -> bytes:
        if not self._usage_at_end:
            return b""
        usage = self._answer.choices.usage()
        return event({**self._answer.head, "choices": [], "usage": usage})

    def _chunk(self, index: int, choice: dict[str, Any]) -> dict[str, Any]:
        chunk = {**self._answer.head, "choices": [choice]}
        if self._usage_always:
            chunk["usage"] = self._answer.choices.usage(only=index)
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
        choice = self._choice(index, {"role": "assistant", **_content("")})
        if self._answer.prompt_ids is not None:
            choice["prompt_token_ids"] = self._answer.prompt_ids
        return choice

    def _rich_choice(self, index: int, delta: Delta) -> dict[str, Any]:
        """Content with its log-probabilities and token ids."""
        choice = self._choice(index, _content(delta.text))
        if self._answer.tokenizer and delta.logprobs:
            choice["logprobs"] = chat_logprobs(delta.logprobs, self._answer.tokenizer)
        if self._answer.token_ids:
            choice["token_ids"] = delta.ids
        return choice


class ChatResult:
    """The answer in one piece."""

    def __init__(self, body: ChatRequest, ids: list[int], context: Context, stamp: Stamp) -> None:
        self._answer = _Answer(body, ids, context, stamp, "chat.completion")
        self._gathered = [Gathered() for _ in range(self._answer.count)]

    def add(self, index: int, delta: Delta) -> None:
        self._answer.choices.see(index, delta)
        self._gathered[index].add(delta)

    def result(self) -> dict[str, Any]:
        choices = [self._choice(index) for index in range(self._answer.count)]
        return {**self._answer.head, "choices": choices, "usage": self._answer.choices.usage()}

    def _choice(self, index: int) -> dict[str, Any]:
        answer, got = self._answer, self._gathered[index]
        message = {"role": "assistant", **_content(got.text), "tool_calls": None}
        logprobs = chat_logprobs(got.logprobs, answer.tokenizer) if answer.tokenizer else None
        choice = {"index": index, "message": message, "logprobs": logprobs, **got.finish}
        if answer.token_ids:
            choice["token_ids"] = got.ids
        if answer.prompt_ids is not None:
            choice["prompt_token_ids"] = answer.prompt_ids
        return choice


def _content(text: str) -> dict[str, Any]:
    """Content keys of a message or delta; clients of SGLang expect both."""
    return {"content": text, "reasoning_content": None}
