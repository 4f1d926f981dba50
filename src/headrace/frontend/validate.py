"""What a request may ask for: the bounds of every field, and whether it fits the context.

Where all protocols meet, so that a limit is written once. Nothing is changed silently: a request is
refused with a sentence that names the field and the limit, unless --allow-auto-truncate asked for
cutting. Pure.
"""

import logging
from collections.abc import Callable, Sized
from typing import Any

import msgspec
import numpy as np

from headrace.core.config import Limits
from headrace.core.errors import (
    BadRequest,
    HeadraceError,
    Overloaded,
    TooLong,
    Unsupported,
    WorkerLost,
)
from headrace.core.messages import (
    GRAMMAR_FIELDS,
    FinishReason,
    GenerateRequest,
    LogprobSpec,
    SamplingParams,
    pack_ids,
    unpack_ids,
)
from headrace.text.stop import validate_stops

logger = logging.getLogger(__name__)

MAX_TOP_LOGPROBS = 20
MAX_LOGPROB_IDS = 1024
MAX_STOP_TOKENS = 256
MAX_LOGIT_BIAS = 1024
MAX_RID_LENGTH = 256
MAX_PARAMS = 8192
MAX_PARAMS_DEPTH = 16
MAX_NAMESPACE_LENGTH = 1024
INT64 = (-(2**63), 2**63 - 1)
_INT32 = (-(2**31), 2**31 - 1)
_LARGEST = 1e9

_encode = msgspec.msgpack.Encoder().encode
_decode_sampling = msgspec.msgpack.Decoder(SamplingParams).decode
_decode_logprobs = msgspec.msgpack.Decoder(LogprobSpec).decode
_ERRORS: dict[int, type[HeadraceError]] = {
    400: BadRequest,
    500: WorkerLost,
    501: Unsupported,
    503: Overloaded,
}


def error_of(finish: FinishReason) -> HeadraceError | None:
    """The error to raise for a request that ended so; None for an answer, or an abort on demand."""
    if finish.type != "abort" or finish.status not in _ERRORS:
        return None
    error = _ERRORS[finish.status](finish.message)
    error.retry_after = finish.retry_after or None
    return error


def validate(
    request: GenerateRequest, vocab_size: int, limits: Limits, truncate: bool
) -> GenerateRequest:
    """The request, checked, with `max_new_tokens` filled in.

    `request.ids` must be there. With `truncate`, what does not fit is cut and logged.

    Raises:
        BadRequest: a field is out of its bounds; TooLong: the context is too short.
    """
    if not 1 <= len(request.rid) <= MAX_RID_LENGTH:
        raise BadRequest(f"rid must have 1 to {MAX_RID_LENGTH} characters", field="rid")
    if len(request.namespace) > MAX_NAMESPACE_LENGTH:
        raise BadRequest(
            f"cache_salt and extra_key may have {MAX_NAMESPACE_LENGTH} characters together",
            field="cache_salt",
        )
    if request.priority is not None:
        _within("priority", request.priority, *_INT32)
    ids = unpack_ids(request.ids)
    check_tokens(ids, vocab_size)
    check_sampling(request.sampling, vocab_size)
    fitted, max_new_tokens = fit(ids, request.sampling.max_new_tokens, limits, truncate)
    if request.logprobs is not None:
        check_logprobs(request.logprobs, len(fitted), vocab_size)
    return msgspec.structs.replace(
        request,
        ids=request.ids if len(fitted) == len(ids) else pack_ids(fitted),
        text=None,
        sampling=msgspec.structs.replace(request.sampling, max_new_tokens=max_new_tokens),
    )


def check_tokens(ids: np.ndarray, vocab_size: int) -> None:
    """Raise BadRequest for an empty prompt or an id outside the vocabulary."""
    if len(ids) == 0:
        raise BadRequest("the prompt is empty", field="input_ids")
    low, high = int(ids.min()), int(ids.max())
    if low < 0 or high >= vocab_size:
        raise BadRequest(
            f"input_ids holds {low if low < 0 else high}; "
            f"token ids of this model are 0 to {vocab_size - 1}",
            field="input_ids",
        )


def check_sampling(sampling: SamplingParams, vocab_size: int) -> None:
    """Raise BadRequest for a field of the wrong type or out of its bounds."""
    _check_sizes(sampling)
    check_params(sampling.custom_params)
    _check_types(sampling, _decode_sampling)
    for name, (low, high) in _BOUNDS.items():
        _within(name, getattr(sampling, name), low, high)
    for name in ("top_p", "repetition_penalty"):
        if not getattr(sampling, name) > 0.0:
            raise BadRequest(
                f"{name} must be greater than 0, not {getattr(sampling, name)}", field=name
            )
    if sampling.top_k == 0 or sampling.top_k < -1:
        raise BadRequest(
            f"top_k must be -1 (all) or at least 1, not {sampling.top_k}", field="top_k"
        )
    _check_lengths(sampling)
    if sampling.seed is not None:
        _within("seed", sampling.seed, *INT64)
    if sampling.stream_interval is not None:
        _within("stream_interval", sampling.stream_interval, 1, _INT32[1])
    check_grammars(sampling)
    validate_stops(sampling.stop, sampling.stop_regex)
    _check_ids("stop_token_ids", sampling.stop_token_ids, None)
    _check_ids("logit_bias", tuple(sampling.logit_bias), vocab_size)
    for token, bias in sampling.logit_bias.items():
        _within(f"logit_bias[{token}]", bias, -_LARGEST, _LARGEST)


def check_grammars(sampling: SamplingParams) -> None:
    """Raise BadRequest for a choice of grammars that cannot be honored."""
    names = [name for name, _ in sampling.grammars]
    if len(names) > 1:
        raise BadRequest(
            f"at most one of {', '.join(GRAMMAR_FIELDS)}; the request has {' and '.join(names)}",
            field=names[1],
        )
    if names and sampling.min_new_tokens and sampling.stop_token_ids:
        raise BadRequest(
            f"{names[0]}: min_new_tokens together with stop_token_ids may forbid every token that "
            "the grammar allows",
            field="min_new_tokens",
        )


def check_params(params: dict[str, Any]) -> None:
    """Raise BadRequest for parameters of a logit processor that are too many or nested too deep."""
    level: list[Any] = [params]
    for _ in range(MAX_PARAMS_DEPTH + 1):
        inner = [one.values() if isinstance(one, dict) else one for one in level]
        level = [one for part in inner for one in part]
        if len(level) > MAX_PARAMS:
            raise BadRequest(
                f"custom_params has more than {MAX_PARAMS} values", field="custom_params"
            )
        level = [one for one in level if isinstance(one, dict | list)]
    if level:
        raise BadRequest(
            f"custom_params is nested more than {MAX_PARAMS_DEPTH} deep", field="custom_params"
        )


def check_logprobs(spec: LogprobSpec, prompt_len: int, vocab_size: int) -> None:
    """Raise BadRequest for a wrong choice of log-probabilities."""
    _check_types(spec, _decode_logprobs)
    if not -1 <= spec.start < prompt_len:
        raise BadRequest(
            f"logprob_start_len must be -1 to {prompt_len - 1} for this prompt, not {spec.start}",
            field="logprob_start_len",
        )
    _within("top_logprobs_num", spec.top, 0, min(MAX_TOP_LOGPROBS, vocab_size))
    check_size("token_ids_logprob", spec.ids, MAX_LOGPROB_IDS)
    _check_ids("token_ids_logprob", spec.ids, vocab_size)


def fit(
    ids: np.ndarray, max_new_tokens: int | None, limits: Limits, truncate: bool
) -> tuple[np.ndarray, int]:
    """(prompt, max_new_tokens) that fit; without `max_new_tokens` the output may fill the context.

    Raises:
        TooLong: they do not fit, and `truncate` does not allow to cut them.
    """
    longest, context = limits.max_request_tokens, limits.context_length
    count = len(ids)
    most = longest if max_new_tokens == 0 else longest - 1
    if truncate and count > most:
        logger.warning("cut a prompt of %d tokens to %d (--allow-auto-truncate)", count, most)
        ids, count = ids[:most], most
    if count > context:
        raise TooLong(
            f"The input ({count} tokens) is longer than the model's context length "
            f"({context} tokens).",
            field="input_ids",
        )
    room = longest - count
    if max_new_tokens is None and room > 0:
        return ids, room
    if max_new_tokens is not None and max_new_tokens <= room:
        return ids, max_new_tokens
    if truncate and room > 0:
        return ids, room
    wanted = 1 if max_new_tokens is None else max_new_tokens
    limit = "the model's context length" if longest == context else "the KV cache"
    if max_new_tokens == 0:
        raise TooLong(
            f"The input ({count} tokens) is longer than {limit} ({longest} tokens).",
            field="input_ids",
        )
    raise TooLong(
        f"The input ({count} tokens) and max_new_tokens ({wanted}) add up to {count + wanted}; "
        f"the limit is {longest} tokens, {limit}.",
        field="max_new_tokens",
    )


def _check_lengths(sampling: SamplingParams) -> None:
    most = sampling.max_new_tokens
    if most is not None:
        _within("max_new_tokens", most, 0, _INT32[1])
    _within("min_new_tokens", sampling.min_new_tokens, 0, _INT32[1])
    if most is not None and sampling.min_new_tokens > most:
        raise BadRequest(
            f"min_new_tokens ({sampling.min_new_tokens}) is more than max_new_tokens ({most})",
            field="min_new_tokens",
        )


def _check_types(
    value: SamplingParams | LogprobSpec, decode: Callable[[bytes], SamplingParams | LogprobSpec]
) -> None:
    """What the scheduler's decoder would refuse is refused here, where there is someone to tell."""
    try:
        decode(_encode(value))
    except msgspec.ValidationError as error:
        raise _named(str(error), value) from None
    except (OverflowError, TypeError, UnicodeEncodeError) as error:
        raise BadRequest(f"{_unwritable(value)}: {error}", field=_unwritable(value)) from None


def _named(text: str, value: SamplingParams | LogprobSpec) -> BadRequest:
    """ "Expected `int`, got `str` - at `$[3]`" with the field's name instead of its number."""
    what, _, path = text.partition(" - at `$[")
    number = path.partition("]")[0]
    name = value.__struct_fields__[int(number)] if number.isdigit() else "sampling_params"
    return BadRequest(f"{name}: {what}", field=name)


def _unwritable(value: SamplingParams | LogprobSpec) -> str:
    """The name of the first field that has no wire form: a number beyond 64 bits, half a pair."""
    for name in value.__struct_fields__:
        try:
            _encode(getattr(value, name))
        except (OverflowError, TypeError, UnicodeEncodeError):
            return name
    return "sampling_params"


def _check_sizes(sampling: SamplingParams) -> None:
    """First of all, so that nothing is spent on what is far too much; types are looked at later."""
    check_size("stop_token_ids", sampling.stop_token_ids, MAX_STOP_TOKENS)
    check_size("logit_bias", sampling.logit_bias, MAX_LOGIT_BIAS)


def check_size(name: str, ids: Any, most: int) -> None:
    """Raise BadRequest for more than `most` token ids; of a wrong type others complain."""
    if isinstance(ids, Sized) and len(ids) > most:
        raise BadRequest(f"{name} has {len(ids)} token ids; the limit is {most}", field=name)


def _check_ids(name: str, ids: tuple[int, ...], vocab_size: int | None) -> None:
    high = _INT32[1] if vocab_size is None else vocab_size - 1
    for token in ids:
        _within(name, token, 0, high)


def _within(name: str, value: float, low: float, high: float) -> None:
    if not low <= value <= high:  # also refuses NaN
        bounds = " to ".join(f"{x:g}" if isinstance(x, float) else str(x) for x in (low, high))
        raise BadRequest(f"{name} must be {bounds}, not {value}", field=name.partition("[")[0])


_BOUNDS: dict[str, tuple[float, float]] = {
    "temperature": (0.0, _LARGEST),
    "top_p": (0.0, 1.0),
    "min_p": (0.0, 1.0),
    "frequency_penalty": (-2.0, 2.0),
    "presence_penalty": (-2.0, 2.0),
    "repetition_penalty": (0.0, 2.0),
}
