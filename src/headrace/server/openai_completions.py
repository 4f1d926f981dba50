"""POST /v1/completions: the body becomes requests, deltas become `text_completion` objects.

Prompts are text or token ids, one or many; choice number = prompt number * n + sample number. With
`echo` the prompt precedes the answer, and with `logprobs` it is scored too (`max_tokens` 0 or 1
then gives the log-likelihood of a text). Pure: no sockets, no clock.
"""

from typing import Any

from headrace.core.errors import BadRequest
from headrace.core.messages import Delta, GenerateRequest, LogprobSpec, TokenLogprobs, pack_ids
from headrace.frontend.native import MAX_BATCH
from headrace.frontend.requests import fan_out
from headrace.server.choices import Choices, Gathered, finish_fields
from headrace.server.context import Context, Job, Stamp
from headrace.server.logprobs import CompletionLogprobs
from headrace.server.sampling import namespace_of, sampling_params
from headrace.server.schemas import CompletionRequest, ignored_fields, read, refuse_unsupported
from headrace.server.sse import SLOT, event, split_event, to_json

DEFAULT_MAX_TOKENS = 16


def parse(raw: bytes, context: Context, stamp: Stamp) -> Job:
    """The job that a body describes.

    Raises:
        BadRequest: names the field.
        NotFound: the model is not served here.
    """
    body = read(CompletionRequest, raw)
    refuse_unsupported(body)
    context.check_model(body.model)
    prompts = [_prepare(body, prompt, context) for prompt in _prompts(body)]
    rids = _request_ids(body, len(prompts), stamp.id)
    requests = [
        sample
        for prompt, rid in zip(prompts, rids, strict=True)
        for sample in fan_out(_request(body, prompt, rid, context))
    ]
    stamp = stamp._replace(id=rids[0] if body.rid else stamp.id)
    reply = (CompletionEvents if body.stream else CompletionResult)(body, prompts, context, stamp)
    return Job(requests, reply, stamp.id, ignored_fields(body))


class Prompt:
    """One prompt: `text`, `ids`, or both where the answer needs both."""

    def __init__(self, text: str | None, ids: list[int] | None) -> None:
        self.text = text
        self.ids = ids


def _prompts(body: CompletionRequest) -> list[str] | list[list[int]]:
    """One entry per prompt; a flat list of ids is one prompt."""
    prompt: Any = body.prompt
    if not prompt:
        raise BadRequest("prompt: must not be empty", field="prompt")
    prompts = [prompt] if isinstance(prompt, str) or isinstance(prompt[0], int) else prompt
    if len(prompts) * (body.n or 1) > MAX_BATCH:
        raise BadRequest(
            f"n: {len(prompts)} prompts with {body.n} samples each are more than {MAX_BATCH}",
            field="n",
        )
    return prompts


def _prepare(body: CompletionRequest, prompt: str | list[int], context: Context) -> Prompt:
    """Text of ids that are echoed, ids of a text that are reported."""
    if isinstance(prompt, str):
        ids = None
        if body.return_token_ids:
            ids = context.tokenizer("return_token_ids").encode(prompt)
        return Prompt(prompt, ids)
    text = None
    if body.echo:
        skip = body.skip_special_tokens is not False
        text = context.tokenizer("echo").decode(prompt, skip_special_tokens=skip)
    return Prompt(text, prompt)


def _request_ids(body: CompletionRequest, count: int, fresh: str) -> list[str]:
    if isinstance(body.rid, list):
        if len(body.rid) != count:
            raise BadRequest(f"rid: {len(body.rid)} ids for {count} prompts", field="rid")
        return body.rid
    stem = body.rid or fresh
    return [stem] if count == 1 else [f"{stem}-{number}" for number in range(count)]


def _request(
    body: CompletionRequest, prompt: Prompt, rid: str, context: Context
) -> GenerateRequest:
    logprobs = None
    if body.logprobs is not None:
        context.tokenizer("logprobs")
        logprobs = LogprobSpec(start=0 if body.echo else -1, top=body.logprobs)
    return GenerateRequest(
        rid=rid,
        text=prompt.text if prompt.ids is None else None,
        ids=b"" if prompt.ids is None else pack_ids(prompt.ids),
        sampling=sampling_params(
            body, context.openai_sampling, context.max_tokens(body.max_tokens, DEFAULT_MAX_TOKENS)
        ),
        stream=bool(body.stream),
        logprobs=logprobs,
        priority=body.priority,
        namespace=namespace_of(body),
        timings=bool(body.return_timings),
    )


class _Answer:
    """What the streamed and the whole answer share: its head, its choices, its options."""

    def __init__(
        self, body: CompletionRequest, prompts: list[Prompt], context: Context, stamp: Stamp
    ) -> None:
        self.head = {
            "id": stamp.id,
            "object": "text_completion",
            "created": stamp.created,
            "model": body.model or context.model_name,
        }
        self.n = body.n or 1
        self.count = len(prompts) * self.n
        self.prompts = prompts
        self.echo = bool(body.echo)
        self.token_ids = bool(body.return_token_ids)
        self.choices = Choices(self.count, self.n, context.config.serve.enable_cache_report)
        self._logprobs: list[CompletionLogprobs] = []
        if body.logprobs is not None:
            tokenizer = context.tokenizer("logprobs")
            skip = body.skip_special_tokens is not False
            self._logprobs = [
                CompletionLogprobs(tokenizer, at_start=self.echo, skip_special_tokens=skip)
                for _ in range(self.count)
            ]

    def prompt(self, index: int) -> Prompt:
        return self.prompts[index // self.n]

    def prefix(self, index: int) -> str:
        """The echoed prompt."""
        return (self.prompt(index).text or "") if self.echo else ""

    def logprobs(self, index: int, *pieces: TokenLogprobs | None) -> dict[str, Any] | None:
        return self._logprobs[index].render(*pieces) if self._logprobs else None


class CompletionEvents:
    """The streamed answer. Most chunks are `text` alone: bytes around it are made only once."""

    def __init__(
        self, body: CompletionRequest, prompts: list[Prompt], context: Context, stamp: Stamp
    ) -> None:
        self._answer = _Answer(body, prompts, context, stamp)
        options = body.stream_options
        self._usage_at_end = bool(options and options.include_usage)
        self._usage_always = bool(options and options.continuous_usage_stats)
        self._plain = (
            body.logprobs is None and not self._answer.token_ids and not self._usage_always
        )
        self._frames = [
            split_event(self._chunk(index, SLOT, Delta(rid=""), None, first=False))
            for index in range(self._answer.count)
        ]

    def event(self, index: int, delta: Delta) -> bytes:
        first = self._answer.choices.see(index, delta)
        text = self._answer.prefix(index) + delta.text if first else delta.text
        if self._plain and delta.finish is None:
            before, after = self._frames[index]
            return before + to_json(text) + after if text else b""
        if not (text or delta.ids or delta.finish):
            return b""
        found = self._answer.logprobs(index, delta.input_logprobs, delta.logprobs)
        return event(self._chunk(index, text, delta, found, first=first))

    def end(self) -> bytes:
        if not self._usage_at_end:
            return b""
        usage = self._answer.choices.usage()
        return event({**self._answer.head, "choices": [], "usage": usage})

    def _chunk(
        self, index: int, text: str, delta: Delta, found: dict[str, Any] | None, *, first: bool
    ) -> dict[str, Any]:
        choice = {"index": index, "text": text, "logprobs": found, **finish_fields(delta)}
        if self._answer.token_ids:
            choice["token_ids"] = delta.ids
            if first:
                choice["prompt_token_ids"] = self._answer.prompt(index).ids
        chunk: dict[str, Any] = {**self._answer.head, "choices": [choice]}
        if self._usage_always:
            chunk["usage"] = self._answer.choices.usage(only=index)
        elif self._usage_at_end:
            chunk["usage"] = None
        return chunk


class CompletionResult:
    """The answer in one piece."""

    def __init__(
        self, body: CompletionRequest, prompts: list[Prompt], context: Context, stamp: Stamp
    ) -> None:
        self._answer = _Answer(body, prompts, context, stamp)
        self._gathered = [Gathered() for _ in range(self._answer.count)]

    def add(self, index: int, delta: Delta) -> None:
        self._answer.choices.see(index, delta)
        self._gathered[index].add(delta)

    def result(self) -> dict[str, Any]:
        answer = self._answer
        choices = [self._choice(index) for index in range(answer.count)]
        return {**answer.head, "choices": choices, "usage": answer.choices.usage()}

    def _choice(self, index: int) -> dict[str, Any]:
        answer, got = self._answer, self._gathered[index]
        choice = {
            "index": index,
            "text": answer.prefix(index) + got.text,
            "logprobs": answer.logprobs(index, got.input_logprobs, got.logprobs),
            **got.finish,
        }
        if answer.token_ids:
            choice["token_ids"] = got.ids
            choice["prompt_token_ids"] = answer.prompt(index).ids
        return choice
