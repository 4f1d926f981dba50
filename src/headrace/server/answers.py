"""What the chat protocols share: a conversation becomes a prompt, generated text becomes segments.

    body --adapter--> Chat --prompt_ids--> token ids
    Delta --Answer.read--> Piece, Piece, ... --adapter--> events of its protocol

What `speech` says of a model's dialects meets the segments that protocols send; knows no protocol.
Pure but for the dice of ids.
"""

import uuid
from collections.abc import Callable, Iterator
from typing import Any, Literal

import msgspec
import orjson

from headrace.core.errors import BadRequest, TooLong
from headrace.core.messages import Delta, GenerateRequest, SamplingParams, unpack_ids
from headrace.frontend.sampling import read_sampling
from headrace.server.context import Context
from headrace.server.speech import THINKING_NAMES, Speech, speech_of
from headrace.text.messages import read_arguments
from headrace.text.parsers.events import Arguments, Content, Event, OutputParser, Reasoning


class Chat(msgspec.Struct, frozen=True):
    """A conversation in OpenAI's form, whichever protocol it came in.

    `choice` is OpenAI's tool_choice, `parallel`: more than one call may be made. `variables` go to
    the template. `continues`: the last message is to be gone on with; `opens`: the prompt ends
    with the head of an answer, None for the usual. `schema`: the answer must be JSON of this JSON
    Schema.
    """

    messages: list[dict[str, Any]]
    tools: list[dict[str, Any]] = []
    choice: str | dict[str, Any] = "auto"
    variables: dict[str, Any] = {}
    continues: bool = False
    opens: bool | None = None
    schema: dict[str, Any] | None = None
    parallel: bool = True

    @property
    def thinking(self) -> bool:
        """Whether reasoning is not switched off."""
        return all(self.variables.get(name, True) for name in THINKING_NAMES)

    @property
    def usable_tools(self) -> list[dict[str, Any]]:
        """The tools that the model may call."""
        return [] if self.choice == "none" else self.tools


def thinking_variables(on: bool) -> dict[str, Any]:
    """Template variables that switch reasoning on or off."""
    return dict.fromkeys(THINKING_NAMES, on)


def prompt_ids(chat: Chat, context: Context) -> list[int]:
    """The conversation through the chat template.

    Raises:
        BadRequest: the template cannot take these messages; names the message.
        TooLong: there are more messages than tokens in the context.
    """
    if len(chat.messages) > context.context_length:
        raise TooLong(
            f"messages: {len(chat.messages)} messages do not fit into the context of "
            f"{context.context_length} tokens",
            field="messages",
        )
    tokenizer = context.tokenizer("messages")
    prompt = context.templates.render(
        chat.messages,
        tools=chat.usable_tools or None,
        add_generation_prompt=chat.opens,
        continue_final_message=chat.continues,
        **chat.variables,
    )
    return tokenizer.encode(prompt, add_special_tokens=False)


def listen(
    chat: Chat, request: GenerateRequest, context: Context
) -> tuple[GenerateRequest, "Answer", list[str]]:
    """(the request with the grammar that `chat` asks for, its answer, names of wishes that cannot
    be enforced).

    Raises:
        Unsupported: this server cannot enforce what must be.
    """
    request, speech, unenforced = understand(chat, request, context)
    return request, Answer(parser_for(speech), speech.bound_id), unenforced


def understand(
    chat: Chat, request: GenerateRequest, context: Context, *, separate: bool = True
) -> tuple[GenerateRequest, Speech, list[str]]:
    """`listen`, but how answers are to be read instead of one answer. `separate`: reasoning is to
    be told from content."""
    speech = speech_of(
        context,
        unpack_ids(request.ids).tolist(),
        tools=chat.tools,
        choice=chat.choice,
        thinking=chat.thinking,
        separate=separate,
        continues=chat.continues,
    )
    sampling = with_schema(speech.visible(request.sampling, context), chat.schema)
    sampling, unenforced = speech.constrained(sampling, context, chat.parallel)
    request = msgspec.structs.replace(
        request, sampling=sampling, reasoning_end=speech.reasoning_end
    )
    return request, speech, unenforced


def parser_for(speech: Speech) -> OutputParser:
    """A fresh parser for one answer."""
    return speech.parser()


def with_schema(sampling: SamplingParams, schema: dict[str, Any] | None) -> SamplingParams:
    """`sampling` with a JSON Schema for the answer, if there is one."""
    if schema is None:
        return sampling
    return read_sampling({"json_schema": json_text(schema, "schema")}, sampling)


def json_text(value: Any, field: str) -> str:
    """The JSON of what came in a body.

    Raises:
        BadRequest: a number beyond 64 bits, or nested too deep.
    """
    try:
        return orjson.dumps(value).decode()
    except TypeError as error:
        raise BadRequest(f"{field}: {error}", field=field) from None


def room_for(asked: int | None, prompt: list[int], context: Context) -> int | None:
    """`asked` new tokens, or None (what the context holds) if they do not fit behind `prompt`."""
    limits = context.manager.limits
    if asked is None or limits is None or len(prompt) + asked > limits.max_request_tokens:
        return None
    return asked


class Segment:
    """A stretch of an answer: reasoning, text, or one tool call with its arguments as JSON."""

    def __init__(
        self, kind: Literal["reasoning", "text", "call"], number: int, name: str = "", id: str = ""
    ) -> None:
        self.kind = kind
        self.number = number
        self.name = name
        self.id = id
        # Unique among all answers; protocols make item and call ids of it.
        self.key = uuid.uuid4().hex[:24]
        self._pieces: list[str] = []

    def add(self, text: str) -> None:
        self._pieces.append(text)

    @property
    def text(self) -> str:
        return "".join(self._pieces)

    def arguments(self) -> dict[str, Any]:
        """The arguments of a call; see `read_arguments`."""
        return read_arguments(self.text)


class Piece(msgspec.Struct, frozen=True):
    """A segment starts, grows by `text`, or ends."""

    what: Literal["start", "more", "end"]
    segment: Segment
    text: str = ""


class Answer:
    """One answer as it grows. Segments follow one another; at most one is open.

    `name_call` makes the id of a call of the one that the model gave, "" if it gave none.
    """

    def __init__(self, parser: OutputParser, name_call: Callable[[str], str] = str) -> None:
        self._parser = parser
        self._name_call = name_call
        self._open: Segment | None = None
        self.segments: list[Segment] = []
        self.last: Delta | None = None

    def read(self, delta: Delta) -> list[Piece]:
        """What `delta` adds; the final one closes the last segment."""
        self.last = delta
        events = self._parser.feed(delta.text) if delta.text else []
        if delta.finish is not None:
            events = [*events, *self._parser.finish()]
        pieces = [piece for event in events for piece in self._apply(event)]
        if delta.finish is not None:
            pieces += self._close()
        return pieces

    @property
    def calls(self) -> list[Segment]:
        """The tool calls so far."""
        return [segment for segment in self.segments if segment.kind == "call"]

    def text_of(self, kind: Literal["reasoning", "text"]) -> str:
        """All text of one kind."""
        return "".join(segment.text for segment in self.segments if segment.kind == kind)

    def _apply(self, event: Event) -> Iterator[Piece]:
        if isinstance(event, Content | Reasoning | Arguments):
            if not event.text:
                return
            if not isinstance(event, Arguments):
                kind: Literal["text", "reasoning"] = (
                    "text" if isinstance(event, Content) else "reasoning"
                )
                if self._open is None or self._open.kind != kind:
                    yield from self._start(Segment(kind, len(self.segments)))
            assert self._open is not None
            self._open.add(event.text)
            yield Piece("more", self._open, event.text)
        else:
            id = self._name_call(event.id)
            yield from self._start(Segment("call", len(self.segments), event.name, id))

    def _start(self, segment: Segment) -> Iterator[Piece]:
        yield from self._close()
        self._open = segment
        self.segments.append(segment)
        yield Piece("start", segment)

    def _close(self) -> Iterator[Piece]:
        if self._open is not None:
            yield Piece("end", self._open)
            self._open = None


def tool_of(name: str, description: Any, parameters: Any, **more: Any) -> dict[str, Any]:
    """A tool in OpenAI's form."""
    function = {"name": name, "parameters": parameters or {"type": "object", "properties": {}}}
    if description:
        function["description"] = description
    return {"type": "function", "function": function | more}


def call_of(id: str, name: str, arguments: str) -> dict[str, Any]:
    """A tool call of an assistant message in OpenAI's form."""
    return {
        "id": id,
        "type": "function",
        "function": {"name": name, "arguments": arguments},
    }


def text_only(kind: Any, where: str) -> BadRequest:
    """The refusal of a content part that is no text."""
    return BadRequest(
        f"{where}: content of type {kind!r} is not supported; this model reads only text",
        field=where,
    )
