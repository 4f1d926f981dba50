"""Answers of /v1/responses: deltas become the response object and its stream of events.

Stream order: created, in_progress; for each item added, its parts and deltas, done; completed or
incomplete. Every event has the next sequence_number. Pure but for the time of completion.
"""

from collections.abc import Callable, Iterator
from typing import Any

from headrace.core.errors import HeadraceError
from headrace.core.messages import Delta
from headrace.server.answers import Answer, Piece, Segment
from headrace.server.context import Context, Stamp
from headrace.server.logprobs import chat_logprobs
from headrace.server.responses_input import ResponsesRequest, Understood
from headrace.server.sse import named_event

_ECHOED = (
    "background",
    "instructions",
    "max_output_tokens",
    "max_tool_calls",
    "previous_response_id",
    "prompt_cache_key",
    "safety_identifier",
    "service_tier",
    "user",
)


class ResponseBody:
    """The response object as far as it is known. `keep` is told of it when it is complete."""

    def __init__(
        self,
        body: ResponsesRequest,
        understood: Understood,
        answer: Answer,
        context: Context,
        stamp: Stamp,
        keep: Callable[[dict[str, Any]], None],
    ) -> None:
        self.answer = answer
        self.keep = keep
        self.id = stamp.id
        self._custom = understood.custom
        self._context = context
        self._logprobs: dict[int, list[Any]] = {}
        self._head = _head(body, context, stamp)

    def read(self, delta: Delta) -> list[Piece]:
        """What `delta` adds; its log-probabilities go with the text it makes."""
        pieces = self.answer.read(delta)
        text = next((piece.segment for piece in reversed(pieces) if piece.what == "more"), None)
        if delta.logprobs is not None and text is not None and text.kind == "text":
            found = chat_logprobs(delta.logprobs, self._context.tokenizer("top_logprobs"))
            self._logprobs.setdefault(text.number, []).extend(found["content"])
        return pieces

    def logprobs(self, segment: Segment) -> list[Any]:
        """Log-probabilities of a text so far."""
        return self._logprobs.get(segment.number, [])

    def running(self, status: str = "in_progress") -> dict[str, Any]:
        """The response before its end."""
        return {**self._head, "status": status, "output": [], "usage": None}

    def complete(self, now: float) -> dict[str, Any]:
        """The response at its end; `now` in unix seconds."""
        finish = self.answer.last.finish if self.answer.last else None
        status, reason = "completed", None
        if finish is not None and finish.type == "length":
            status, reason = "incomplete", {"reason": "max_output_tokens"}
        elif finish is not None and finish.type == "abort":
            status = "cancelled"
        last = "completed" if status == "completed" else "incomplete"
        return {
            **self._head,
            "status": status,
            "completed_at": int(now) if status == "completed" else None,
            "incomplete_details": reason,
            "output": self._output(last),
            "usage": self._usage(),
        }

    def broken(self, error: HeadraceError, status: str = "failed") -> dict[str, Any]:
        """The response when `error` has ended it."""
        code = "server_error" if error.status >= 500 else error.code or "invalid_prompt"
        detail = {"code": code, "message": error.message} if status == "failed" else None
        return {**self.running(status), "error": detail, "output": self._output("incomplete")}

    def _output(self, last: str) -> list[dict[str, Any]]:
        """All items; `last` is the status of the last one."""
        segments = self.answer.segments
        items = [self.item(segment, "completed") for segment in segments[:-1]]
        return items + [self.item(segment, last) for segment in segments[-1:]]

    def item_id(self, segment: Segment) -> str:
        """The id of an output item."""
        if segment.kind == "call":
            return f"ctc_{segment.key}" if self.is_custom(segment) else f"fc_{segment.key}"
        return f"msg_{segment.key}" if segment.kind == "text" else f"rs_{segment.key}"

    def item(self, segment: Segment, status: str) -> dict[str, Any]:
        """An output item; `in_progress` ones are empty."""
        empty = status == "in_progress"
        head: dict[str, Any] = {"id": self.item_id(segment)}
        state = {"status": status}
        if segment.kind == "text":
            content = [] if empty else [self.part(segment)]
            return {**head, "type": "message", "role": "assistant", **state, "content": content}
        if segment.kind == "reasoning":
            content = [] if empty else [self.part(segment)]
            head |= {"type": "reasoning", "summary": [], "encrypted_content": None}
            return {**head, "content": content, **state}
        call = {"call_id": segment.id or f"call_{segment.key}", "name": segment.name}
        if self.is_custom(segment):
            text = "" if empty else custom_input(segment)
            return {**head, "type": "custom_tool_call", **call, "input": text}
        text = "" if empty else segment.text or "{}"
        return {**head, "type": "function_call", **call, "arguments": text, **state}

    def part(self, segment: Segment) -> dict[str, Any]:
        """The content part of a text or of reasoning."""
        if segment.kind == "reasoning":
            return {"type": "reasoning_text", "text": segment.text}
        return {
            "type": "output_text",
            "text": segment.text,
            "annotations": [],
            "logprobs": self.logprobs(segment),
        }

    def is_custom(self, segment: Segment) -> bool:
        """Whether a call is of a tool that takes free text."""
        return segment.name in self._custom

    def _usage(self) -> dict[str, Any]:
        delta = self.answer.last or Delta("")
        reasoning = self.answer.text_of("reasoning")
        tokens = 0
        if reasoning:
            tokens = len(self._context.tokenizer("usage").encode(reasoning, False))
        return {
            "input_tokens": delta.prompt_tokens,
            "input_tokens_details": {"cached_tokens": delta.cached_tokens, "cache_write_tokens": 0},
            "output_tokens": delta.completion_tokens,
            "output_tokens_details": {"reasoning_tokens": min(tokens, delta.completion_tokens)},
            "total_tokens": delta.prompt_tokens + delta.completion_tokens,
        }


def custom_input(segment: Segment) -> str:
    """The free text of a call: what its argument `input` holds."""
    value = segment.arguments().get("input")
    return value if isinstance(value, str) else segment.text


def _head(body: ResponsesRequest, context: Context, stamp: Stamp) -> dict[str, Any]:
    """What is known of a response from the start; options as they will be honored."""
    defaults = context.openai_sampling
    form = body.text.format if body.text and body.text.format else None
    return {
        "id": stamp.id,
        "object": "response",
        "created_at": stamp.created,
        "model": body.model or context.model_name,
        "error": None,
        "incomplete_details": None,
        "metadata": body.metadata or {},
        "parallel_tool_calls": True,
        "reasoning": {"effort": body.reasoning.effort if body.reasoning else None, "summary": None},
        "store": context.config.serve.enable_response_store and body.store is not False,
        "temperature": defaults.temperature if body.temperature is None else body.temperature,
        "text": {"format": form.model_dump(by_alias=True, exclude_none=True) if form else _TEXT},
        "tool_choice": body.tool_choice or "auto",
        "tools": body.tools or [],
        "top_logprobs": body.top_logprobs or 0,
        "top_p": defaults.top_p if body.top_p is None else body.top_p,
        "truncation": "disabled",
        **{name: getattr(body, name) for name in _ECHOED},
    }


_TEXT = {"type": "text"}


class ResponseEvents:
    """The streamed answer."""

    def __init__(self, response: ResponseBody, clock: Callable[[], float]) -> None:
        self._response = response
        self._clock = clock
        self._number = 0
        # How many log-probabilities of each segment have been told.
        self._told: dict[int, int] = {}

    def event(self, index: int, delta: Delta) -> bytes:
        response = self._response
        out = []
        if response.answer.last is None:
            out.append(self._event("response.created", response=response.running()))
            out.append(self._event("response.in_progress", response=response.running()))
        for piece in response.read(delta):
            out += self._events_of(piece)
        if delta.finish is not None:
            value = response.complete(self._clock())
            response.keep(value)
            name = "completed" if value["status"] == "completed" else "incomplete"
            out.append(self._event(f"response.{name}", response=value))
        return b"".join(out)

    def end(self) -> bytes:
        return b""

    def failed(self, error: HeadraceError) -> bytes:
        """The last event of a stream that an error has ended."""
        value = self._response.broken(error)
        self._response.keep(value)
        return self._event("response.failed", response=value)

    def _event(self, name: str, /, **fields: Any) -> bytes:
        self._number += 1
        return named_event(name, sequence_number=self._number - 1, **fields)

    def _events_of(self, piece: Piece) -> Iterator[bytes]:
        segment, response = piece.segment, self._response
        at = {"output_index": segment.number}
        inside = {**at, "item_id": response.item_id(segment)}
        if piece.what == "start":
            item = response.item(segment, "in_progress")
            yield self._event("response.output_item.added", **at, item=item)
        if segment.kind == "call":
            yield from self._call_events(piece, inside)
        else:
            yield from self._text_events(piece, {**inside, "content_index": 0})
        if piece.what == "end":
            item = response.item(segment, "completed")
            yield self._event("response.output_item.done", **at, item=item)

    def _call_events(self, piece: Piece, inside: dict[str, Any]) -> Iterator[bytes]:
        """Free text is known only when the JSON around it is complete."""
        name = "response.function_call_arguments"
        if self._response.is_custom(piece.segment):
            name = "response.custom_tool_call_input"
            if piece.what == "end":
                text = custom_input(piece.segment)
                yield self._event(f"{name}.delta", **inside, delta=text)
                yield self._event(f"{name}.done", **inside, input=text)
        elif piece.what == "more":
            yield self._event(f"{name}.delta", **inside, delta=piece.text)
        elif piece.what == "end":
            text = piece.segment.text
            if not text:
                text = "{}"
                yield self._event(f"{name}.delta", **inside, delta=text)
            yield self._event(f"{name}.done", **inside, arguments=text, name=piece.segment.name)

    def _text_events(self, piece: Piece, inside: dict[str, Any]) -> Iterator[bytes]:
        segment = piece.segment
        is_text = segment.kind == "text"
        name = "response.output_text" if is_text else "response.reasoning_text"
        if piece.what == "start":
            part = {**self._response.part(segment), "text": ""}
            if is_text:
                part["logprobs"] = []
            yield self._event("response.content_part.added", **inside, part=part)
        elif piece.what == "more":
            extra = {"logprobs": self._new_logprobs(segment)} if is_text else {}
            yield self._event(f"{name}.delta", **inside, delta=piece.text, **extra)
        else:
            part = self._response.part(segment)
            extra = {"logprobs": part["logprobs"]} if is_text else {}
            yield self._event(f"{name}.done", **inside, text=segment.text, **extra)
            yield self._event("response.content_part.done", **inside, part=part)

    def _new_logprobs(self, segment: Segment) -> list[Any]:
        """Those that no event has told yet."""
        found = self._response.logprobs(segment)
        told, self._told[segment.number] = self._told.get(segment.number, 0), len(found)
        return found[told:]


class ResponseResult:
    """The answer in one piece."""

    def __init__(self, response: ResponseBody, clock: Callable[[], float]) -> None:
        self._response = response
        self._clock = clock

    def add(self, index: int, delta: Delta) -> None:
        self._response.read(delta)

    def result(self) -> dict[str, Any]:
        value = self._response.complete(self._clock())
        self._response.keep(value)
        return value
