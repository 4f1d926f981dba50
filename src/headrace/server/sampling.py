"""Sampling fields of the OpenAI routes -> SamplingParams, laid over the server's defaults.

From weak to strong: the protocol's own max_tokens, the server's defaults (`openai_defaults`), the
request. Ranges are checked by the tokenizer manager, for all protocols alike.
"""

from typing import Any

import msgspec

from headrace.core.errors import BadRequest
from headrace.core.messages import GRAMMAR_FIELDS, SamplingParams
from headrace.frontend.requests import namespace
from headrace.frontend.sampling import json_text
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
    "custom_params",
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
    given["custom_logit_processor"] = body.custom_logit_processor or None
    given |= grammars_of(body)
    changes = {name: value for name, value in given.items() if value is not None}
    return msgspec.structs.replace(defaults, max_new_tokens=max_tokens, **changes)


def grammars_of(body: CommonFields) -> dict[str, str]:
    """The grammars that a body asks for, by the field of SamplingParams.

    Raises:
        BadRequest: `response_format` is none of the known forms, or more than one is given.
    """
    given = {name: getattr(body, name) for name in GRAMMAR_FIELDS}
    found = {name: _text(value) for name, value in given.items() if value not in (None, "")}
    if body.response_format is not None:
        name, text = _response_format(body.response_format)
        if name in found:
            raise BadRequest(
                f"response_format and {name} must not both be given", field="response_format"
            )
        found |= {name: text} if name else {}
    return found


def _response_format(value: dict[str, Any]) -> tuple[str, str]:
    """(field of SamplingParams, grammar), or two empty strings for plain text."""
    kind = value.get("type")
    if kind == "text":
        return "", ""
    if kind == "json_object":
        return "json_schema", '{"type":"object"}'
    if kind == "structural_tag":
        return "structural_tag", json_text(value)
    if kind != "json_schema":
        raise BadRequest(
            "response_format.type: must be text, json_object, json_schema or structural_tag",
            field="response_format",
        )
    details = value.get("json_schema")
    schema = details.get("schema") if isinstance(details, dict) else None
    if not isinstance(schema, dict | bool):
        raise BadRequest(
            "response_format.json_schema.schema: must be a JSON schema", field="response_format"
        )
    return "json_schema", json_text(schema)


def _text(grammar: str | dict[str, Any]) -> str:
    return grammar if isinstance(grammar, str) else json_text(grammar)


def namespace_of(body: CommonFields) -> str:
    """The prefix-cache namespace of a request, the same as for /generate."""
    return namespace(body.cache_salt, body.extra_key)


def _strings(value: str | list[str] | None) -> tuple[str, ...] | None:
    if value is None:
        return None
    return (value,) if isinstance(value, str) else tuple(value)
