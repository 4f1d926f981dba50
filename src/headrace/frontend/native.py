"""SGLang's native protocol, shared by /generate and the Engine: body -> requests, deltas -> result.

    {"text" | "input_ids", ...}   --parse_generate-->  GenerateCall
    Delta, Delta, ...             --NativeResult-->    {"text", "output_ids", "meta_info"}

A list of prompts, or n > 1, makes a list of results, prompt after prompt and sample after sample.
Pure: no sockets, no tokenizer beyond the text of single tokens.
"""

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, TypeVar

import msgspec

from headrace.core.errors import BadRequest, Unsupported
from headrace.core.messages import (
    Delta,
    GenerateRequest,
    LogprobSpec,
    SamplingParams,
    SessionParams,
    TokenLogprobs,
    pack_ids,
    unpack_ids,
)
from headrace.frontend.requests import MAX_SAMPLES, fan_out, namespace, new_rid
from headrace.frontend.sampling import read_sampling

T = TypeVar("T")

MAX_BATCH = 4096
WEIGHT_VERSION = "default"

_REFUSED = {
    "input_embeds": "prompts as embeddings",
    "image_data": "images",
    "video_data": "videos",
    "audio_data": "audio",
    "session_id": "sessions without session_params",
    "lora_path": "LoRA adapters",
    "lora_id": "LoRA adapters",
    "positional_embed_overrides": "embedding overrides",
    "return_hidden_states": "hidden states",
    "return_routed_experts": "routed experts",
    "return_indexer_topk": "indexer results",
    "return_sampling_mask": "sampling masks",
    "return_entropy": "entropy",
    "return_bytes": "output as bytes",
    "return_flat_raw_top_logprobs": "flat logprobs",
    "watermark": "watermarks",
    "bootstrap_host": "disaggregation",
    "bootstrap_room": "disaggregation",
}


class GenerateCall(msgspec.Struct, frozen=True):
    """What a native body asks for. `as_list`: answer with a list, in the order of `requests`.

    With `prompt_token_ids` the caller gives the requests their ids (`TokenizerManager.with_ids`)
    before it makes results of them.
    """

    requests: list[GenerateRequest]
    as_list: bool
    stream: bool
    text_in_logprobs: bool
    prompt_token_ids: bool


class _Session(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """session_params of a body."""

    id: str
    rid: str | None = None
    offset: int | None = None
    replace: bool | None = None
    drop_previous_output: bool | None = None


class _Body(msgspec.Struct, frozen=True):
    """Types of the fields. A list beside a list of prompts holds one value for each prompt."""

    text: str | list[str] | None = None
    input_ids: list[int | list[int]] | None = None
    sampling_params: dict[str, Any] | list[dict[str, Any]] | None = None
    rid: str | list[str] | None = None
    stream: bool | None = False
    return_logprob: bool | list[bool] | None = False
    logprob_start_len: int | list[int] | None = -1
    top_logprobs_num: int | list[int] | None = 0
    top_logprobs: int | list[int] | None = None
    token_ids_logprob: list[int | list[int] | None] | None = None
    return_text_in_logprobs: bool | None = False
    return_prompt_token_ids: bool | None = False
    return_timings: bool | None = False
    priority: int | list[int | None] | None = None
    extra_key: str | list[str | None] | None = None
    cache_salt: str | list[str | None] | None = None
    session_params: _Session | list[_Session | None] | None = None
    custom_logit_processor: str | list[str | None] | None = None


def native_schema() -> dict[str, Any]:
    """The JSON Schema of a body, but for what `sampling_params` holds."""
    return msgspec.json.schema_components((_Body,))[1]["_Body"]


def parse_generate(body: Mapping[str, Any], defaults: SamplingParams) -> GenerateCall:
    """The requests that a native body describes; ranges are checked by the tokenizer manager.

    Raises:
        BadRequest: a wrong type, no prompt or two, lists of different lengths.
        Unsupported: a field that would change the answer but cannot be honored.
    """
    for name, what in _REFUSED.items():
        if body.get(name):
            raise Unsupported(f"{name}: {what} are not supported", field=name)
    try:
        fields = msgspec.convert(dict(body), _Body)
    except msgspec.ValidationError as error:
        raise _type_error(error) from None
    prompts, batch = _prompts(fields)
    requests = list(_requests(fields, prompts, batch, defaults))
    _check_sessions(fields, requests)
    samples = sum(min(request.sampling.n, MAX_SAMPLES) for request in requests)
    if samples > MAX_BATCH:
        raise BadRequest(
            f"{len(prompts)} prompts with their n samples are {samples} requests, more than "
            f"{MAX_BATCH}",
            field="n",
        )
    return GenerateCall(
        requests=[sample for request in requests for sample in fan_out(request)],
        as_list=batch or any(request.sampling.n > 1 for request in requests),
        stream=bool(fields.stream),
        text_in_logprobs=bool(fields.return_text_in_logprobs),
        prompt_token_ids=bool(fields.return_prompt_token_ids),
    )


def _prompts(fields: _Body) -> tuple[list[str | bytes], bool]:
    """(text or packed ids of each prompt, whether they came as a list)."""
    text, ids = fields.text, fields.input_ids
    if (text is None) == (ids is None):
        raise BadRequest("give exactly one of text and input_ids", field="text")
    found: list[str | bytes]
    if ids is None:
        assert text is not None
        batch, found = isinstance(text, list), list(text) if isinstance(text, list) else [text]
    else:
        batch = bool(ids) and isinstance(ids[0], list)
        found = [_packed(item) for item in (ids if batch else [ids])]
    if not 1 <= len(found) <= MAX_BATCH:
        raise BadRequest(
            f"a batch has 1 to {MAX_BATCH} prompts, not {len(found)}",
            field="text" if ids is None else "input_ids",
        )
    return found, batch


def _packed(ids: Any) -> bytes:
    if not isinstance(ids, list) or any(isinstance(item, list) for item in ids):
        raise BadRequest("input_ids mixes token ids and lists of them", field="input_ids")
    if not ids:
        raise BadRequest("input_ids is empty", field="input_ids")
    try:
        return pack_ids(ids)
    except OverflowError:
        raise BadRequest(
            "input_ids holds a number that is no token id", field="input_ids"
        ) from None


def _requests(
    fields: _Body, prompts: Sequence[str | bytes], batch: bool, defaults: SamplingParams
) -> Iterator[GenerateRequest]:
    """One request for each prompt, samples not yet told apart."""
    count = len(prompts) if batch else None

    def each(name: str, value: Any) -> list[Any]:
        return _each(name, value, count)

    rids = _rids(fields.rid, count)
    sampling = each("sampling_params", fields.sampling_params)
    logprobs = each("return_logprob", fields.return_logprob)
    starts = each("logprob_start_len", fields.logprob_start_len)
    top_field = "top_logprobs_num" if fields.top_logprobs is None else "top_logprobs"
    tops = each(top_field, getattr(fields, top_field))
    ids = _each_token_ids(fields.token_ids_logprob, count)
    priorities = each("priority", fields.priority)
    extra_keys = each("extra_key", fields.extra_key)
    salts = each("cache_salt", fields.cache_salt)
    sessions = each("session_params", fields.session_params)
    processors = each("custom_logit_processor", fields.custom_logit_processor)
    for i, prompt in enumerate(prompts):
        start = -1 if starts[i] is None else starts[i]
        yield GenerateRequest(
            rid=rids[i],
            ids=prompt if isinstance(prompt, bytes) else b"",
            text=prompt if isinstance(prompt, str) else None,
            sampling=read_sampling(_named(sampling[i] or {}, processors[i]), defaults),
            stream=bool(fields.stream),
            logprobs=LogprobSpec(start, tops[i] or 0, ids[i]) if logprobs[i] else None,
            priority=priorities[i],
            namespace=namespace(salts[i], extra_keys[i]),
            session=_session(sessions[i]),
            timings=bool(fields.return_timings),
        )


def _named(sampling: dict[str, Any], processor: str | None) -> dict[str, Any]:
    """SGLang has this one beside the sampling parameters, its own parameters among them."""
    return sampling | {"custom_logit_processor": processor} if processor else sampling


def _session(asked: _Session | None) -> SessionParams | None:
    if asked is None:
        return None
    return SessionParams(
        asked.id,
        asked.rid or "",
        asked.offset or 0,
        bool(asked.replace),
        bool(asked.drop_previous_output),
    )


def _check_sessions(fields: _Body, requests: Sequence[GenerateRequest]) -> None:
    """Raise BadRequest for what a request of a session cannot have."""
    for request in requests:
        if request.session is None:
            continue
        if request.sampling.n > 1:
            raise BadRequest("n must be 1 in a session", field="n")
        if fields.return_prompt_token_ids:
            raise BadRequest(
                "return_prompt_token_ids: the server, not the client, knows the whole prompt of a "
                "request in a session",
                field="return_prompt_token_ids",
            )


def _each(name: str, value: Any, count: int | None) -> list[Any]:
    """One value for each prompt. `count` is None for a prompt that is not in a list."""
    if not isinstance(value, list):
        return [value] * (count or 1)
    if count is None:
        raise BadRequest(f"{name} is a list, but there is one prompt", field=name)
    if len(value) != count:
        raise BadRequest(f"{name} has {len(value)} items for {count} prompts", field=name)
    return value


def _each_token_ids(value: list[Any] | None, count: int | None) -> list[tuple[int, ...]]:
    """A flat list of ids holds for every prompt."""
    if value is None or all(isinstance(item, int) for item in value):
        return [tuple(value or ())] * (count or 1)
    if any(isinstance(item, int) for item in value):
        raise BadRequest(
            "token_ids_logprob mixes token ids and lists of them", field="token_ids_logprob"
        )
    return [tuple(item or ()) for item in _each("token_ids_logprob", value, count)]


def _rids(rid: str | list[str] | None, count: int | None) -> list[str]:
    if rid is None:
        return [new_rid() for _ in range(count or 1)]
    if isinstance(rid, str) and count is not None:
        return [f"{rid}_{i}" for i in range(count)]
    return _each("rid", rid, count)


def _type_error(error: msgspec.ValidationError) -> BadRequest:
    """ "Expected `int`, got `str` - at `$.priority`" with the field in front."""
    what, _, path = str(error).partition(" - at `$.")
    field = path.rstrip("`")
    return BadRequest(f"{field}: {what}" if field else what, field=field or None)


class NativeResult:
    """The result of one request, as it grows.

    `token_text` gives the text of single tokens for `return_text_in_logprobs`. With `incremental`,
    each `to_dict` has only what is new since the one before; counters are totals always.
    """

    def __init__(
        self,
        request: GenerateRequest,
        *,
        token_text: Callable[[int], str] | None = None,
        prompt_token_ids: bool = False,
        incremental: bool = False,
    ) -> None:
        self._request = request
        self._token_text = token_text
        self._prompt_token_ids = prompt_token_ids
        self._incremental = incremental
        self._started = time.monotonic()
        self._last = Delta(request.rid)
        self._clear()

    def add(self, delta: Delta) -> None:
        """Take in news."""
        self._text += delta.text
        self._ids += delta.ids
        if delta.logprobs is not None:
            _extend(self._output_logprobs, delta.logprobs)
        if delta.input_logprobs is not None:
            _extend(self._input_logprobs, delta.input_logprobs)
        self._last = delta

    def to_dict(self) -> dict[str, Any]:
        """{"text", "output_ids", "meta_info"} of SGLang."""
        result = {"text": self._text, "output_ids": self._ids.copy(), "meta_info": self._meta()}
        if self._prompt_token_ids:
            result["prompt_token_ids"] = unpack_ids(self._request.ids).tolist()
        if self._incremental:
            self._clear()
        return result

    def _clear(self) -> None:
        self._text = ""
        self._ids: list[int] = []
        self._input_logprobs = TokenLogprobs([], [], [], [])
        self._output_logprobs = TokenLogprobs([], [], [], [])

    def _meta(self) -> dict[str, Any]:
        last = self._last
        meta: dict[str, Any] = {
            "id": last.rid,
            "finish_reason": last.finish.to_wire() if last.finish else None,
            "prompt_tokens": last.prompt_tokens,
            "completion_tokens": last.completion_tokens,
            "cached_tokens": last.cached_tokens,
            "reasoning_tokens": 0,
            "weight_version": WEIGHT_VERSION,
            "num_retractions": last.retractions,
        }
        if self._request.logprobs is not None:
            meta |= self._logprobs(self._request.logprobs)
        if last.finish is not None:
            meta |= self._timings(last)
        if last.timeline is not None:
            meta["timings"] = last.timeline.to_wire()
        return meta

    def _timings(self, last: Delta) -> dict[str, Any]:
        """Seconds. Queue and first token count from the scheduler's receipt of the request."""
        elapsed = time.monotonic() - self._started
        decoding = elapsed - last.first_token_time
        decoded = last.completion_tokens - 1
        return {
            "e2e_latency": elapsed,
            "queue_time": last.queue_time,
            "first_token_latency": last.first_token_time or None,
            "decode_throughput": decoded / decoding if decoded > 0 and decoding > 0 else None,
        }

    def _logprobs(self, spec: LogprobSpec) -> dict[str, Any]:
        meta: dict[str, Any] = {}
        for side, found in (("input", self._input_logprobs), ("output", self._output_logprobs)):
            meta[f"{side}_token_logprobs"] = [
                self._triple(token, value)
                for token, value in zip(found.tokens, found.values, strict=True)
            ]
            if spec.top > 0:
                meta[f"{side}_top_logprobs"] = self._alternatives(found.top)
            if spec.ids:
                meta[f"{side}_token_ids_logprobs"] = self._alternatives(found.ids)
        meta["output_token_logprobs_length"] = len(self._output_logprobs.tokens)
        return meta

    def _alternatives(
        self, positions: list[list[tuple[int, float]] | None]
    ) -> list[list[Any] | None]:
        return [
            pairs and [self._triple(token, value) for token, value in pairs] for pairs in positions
        ]

    def _triple(self, token: int, value: float | None) -> tuple[float | None, int, str | None]:
        return (value, token, self._token_text(token) if self._token_text else None)


def _extend(found: TokenLogprobs, more: TokenLogprobs) -> None:
    found.tokens.extend(more.tokens)
    found.values.extend(more.values)
    found.top.extend(more.top)
    found.ids.extend(more.ids)
