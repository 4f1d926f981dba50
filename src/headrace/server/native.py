"""POST /generate, SGLang's native protocol. Bodies and results are those of the Engine.

A stream repeats the text so far in every event, unless --incremental-streaming-output; events of a
batch carry the `index` of their request. Pure: no sockets.
"""

from typing import Any

import msgspec
import orjson

from headrace.core.errors import BadRequest
from headrace.core.messages import Delta, GenerateRequest, pack_ids
from headrace.frontend.native import GenerateCall, NativeResult, parse_generate
from headrace.server.context import Context, Job
from headrace.server.sse import event

HONORED = frozenset(
    (
        "text",
        "input_ids",
        "sampling_params",
        "custom_logit_processor",
        "rid",
        "stream",
        "return_logprob",
        "logprob_start_len",
        "top_logprobs_num",
        "top_logprobs",
        "token_ids_logprob",
        "return_text_in_logprobs",
        "return_prompt_token_ids",
        "return_timings",
        "priority",
        "extra_key",
        "cache_salt",
        "session_params",
    )
)


def parse(raw: bytes, context: Context) -> Job:
    """The job that a body describes.

    Raises:
        BadRequest: names the field.
    """
    body = read_object(raw)
    call = parse_generate(body, context.native_sampling)
    if call.prompt_token_ids:
        call = msgspec.structs.replace(call, requests=_with_ids(call.requests, context))
    reply = (NativeEvents if call.stream else NativeAnswer)(call, context)
    ignored = [name for name, value in body.items() if name not in HONORED and value is not None]
    return Job(call.requests, reply, ignored=ignored)


def _with_ids(requests: list[GenerateRequest], context: Context) -> list[GenerateRequest]:
    """The requests with ids in place of text; samples of one text share them."""
    texts = list({request.text: None for request in requests if request.text is not None})
    if not texts:
        return requests
    found = context.tokenizer("text").encode_batch(texts)
    ids = {text: pack_ids(tokens) for text, tokens in zip(texts, found, strict=True)}
    return [
        msgspec.structs.replace(request, ids=ids[request.text], text=None)
        for request in requests
        if request.text is not None
    ]


def read_object(raw: bytes) -> dict[str, Any]:
    """A JSON object; BadRequest otherwise."""
    try:
        body = orjson.loads(raw)
    except orjson.JSONDecodeError as error:
        raise BadRequest(f"The body is not valid JSON: {error}") from None
    if not isinstance(body, dict):
        raise BadRequest("The body must be a JSON object.")
    return body


class NativeEvents:
    """The streamed answer."""

    def __init__(self, call: GenerateCall, context: Context) -> None:
        incremental = context.config.serve.incremental_streaming_output
        self._results = _results(call, context, incremental)
        self._numbered = call.as_list

    def event(self, index: int, delta: Delta) -> bytes:
        result = self._results[index]
        result.add(delta)
        if not (delta.text or delta.ids or delta.finish):
            return b""
        value = result.to_dict()
        return event({"index": index, **value} if self._numbered else value)

    def end(self) -> bytes:
        return b""


class NativeAnswer:
    """The answer in one piece: an object, or a list for a batch or n > 1."""

    def __init__(self, call: GenerateCall, context: Context) -> None:
        self._results = _results(call, context, incremental=False)
        self._as_list = call.as_list

    def add(self, index: int, delta: Delta) -> None:
        self._results[index].add(delta)

    def result(self) -> Any:
        results = [result.to_dict() for result in self._results]
        return results if self._as_list else results[0]


def _results(call: GenerateCall, context: Context, incremental: bool) -> list[NativeResult]:
    token_text = None
    if call.text_in_logprobs:
        token_text = context.tokenizer("return_text_in_logprobs").token_text
    return [
        NativeResult(
            request,
            token_text=token_text,
            prompt_token_ids=call.prompt_token_ids,
            incremental=incremental,
        )
        for request in call.requests
    ]
