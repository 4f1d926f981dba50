"""Sampling fields of the OpenAI routes -> SamplingParams, laid over the server's defaults.

From weak to strong: the protocol's own max_tokens, the server's defaults (`openai_defaults`), the
request. Ranges are checked by the tokenizer manager, for all protocols alike.
"""

from typing import Any

import msgspec

from headrace.core.messages import SamplingParams
from headrace.frontend.requests import namespace
from headrace.server.schemas import CommonFields

_SAME_NAME = (
    "temperature",
    "top_p",
    "top_k",
    "min_p",
    "frequency_penalty",
    "presence_penalty",
    "repetition_penalty",
    "ignore_eos",
    "skip_special_tokens",
    "spaces_between_special_tokens",
    "no_stop_trim",
    "logit_bias",
    "seed",
    "n",
)


def sampling_params(
    body: CommonFields, defaults: SamplingParams, max_tokens: int | None
) -> SamplingParams:
    """The request's fields over `defaults`; None means absent, except for `max_tokens`."""
    given: dict[str, Any] = {name: getattr(body, name) for name in _SAME_NAME}
    given["min_new_tokens"] = body.min_tokens
    given["stop"] = _strings(body.stop)
    given["stop_regex"] = _strings(body.stop_regex)
    given["stop_token_ids"] = None if body.stop_token_ids is None else tuple(body.stop_token_ids)
    changes = {name: value for name, value in given.items() if value is not None}
    return msgspec.structs.replace(defaults, max_new_tokens=max_tokens, **changes)


def namespace_of(body: CommonFields) -> str:
    """The prefix-cache namespace of a request, the same as for /generate."""
    return namespace(body.cache_salt, body.extra_key)


def _strings(value: str | list[str] | None) -> tuple[str, ...] | None:
    if value is None:
        return None
    return (value,) if isinstance(value, str) else tuple(value)
