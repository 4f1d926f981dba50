"""Sampling fields as clients write them -> `SamplingParams`, with defaults laid under them.

Checks names and types; ranges are checked in `validate`, where all protocols meet. Pure.
"""

import json
from collections.abc import Mapping
from typing import Any, get_type_hints

import msgspec

from headrace.core.errors import BadRequest, Unsupported
from headrace.core.messages import GRAMMAR_FIELDS, SamplingParams
from headrace.core.model_info import ModelInfo
from headrace.core.serve_options import ServeOptions
from headrace.frontend.validate import MAX_LOGIT_BIAS, check_size

_TYPES = get_type_hints(SamplingParams)
_ALIASES = {"sampling_seed": "seed"}
_LISTS = ("stop", "stop_regex", "stop_token_ids")
# Fields whose empty text means absent.
_NAMED = (*GRAMMAR_FIELDS, "custom_logit_processor")
_REFUSED = {
    "beam_width": "beam search",
    "watermark": "watermarks",
}
# What of generation_config.json is a default of requests, as in SGLang.
_MODEL_DEFAULTS = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty")


def native_defaults(serve: ServeOptions) -> SamplingParams:
    """Defaults of /generate and the Engine: the fields' own, then preferred_sampling_params."""
    return read_sampling(_preferred(serve), SamplingParams())


def openai_defaults(serve: ServeOptions, info: ModelInfo) -> SamplingParams:
    """Defaults of the other protocols: also the checkpoint's, unless --sampling-defaults openai."""
    own: dict[str, Any] = {}
    if serve.sampling_defaults == "model":
        own = {name: info.generation.get(name) for name in _MODEL_DEFAULTS}
        # transformers writes 0 for "all tokens".
        own["top_k"] = own["top_k"] or -1
    return read_sampling(own | _preferred(serve), SamplingParams())


def read_sampling(body: Mapping[str, Any], defaults: SamplingParams) -> SamplingParams:
    """The object `sampling_params` of a request; None means absent (except max_new_tokens).

    Raises:
        BadRequest: an unknown name or a wrong type; `field` names it.
        Unsupported: a field that this server cannot honor.
    """
    changes: dict[str, Any] = {}
    for name, value in body.items():
        field = _ALIASES.get(name, name)
        if value is None and field != "max_new_tokens":
            continue
        if field in _NAMED and value == "":
            continue
        if field in _REFUSED:
            _refuse(field, value)
        elif field not in _TYPES:
            raise BadRequest(f"sampling_params has no field {name!r}", field=name)
        else:
            changes[field] = _typed(name, field, value)
    return msgspec.structs.replace(defaults, **changes) if changes else defaults


def _refuse(field: str, value: Any) -> None:
    """A value that changes nothing is fine."""
    if value in (False, "", {}) or (field == "beam_width" and value in (0, 1)):
        return
    raise Unsupported(f"{field}: {_REFUSED[field]} is not supported yet", field=field)


def _typed(name: str, field: str, value: Any) -> Any:
    if field in _LISTS and isinstance(value, str | int) and not isinstance(value, bool):
        value = (value,)
    if field in ("json_schema", "structural_tag") and isinstance(value, dict):
        return json_text(value)
    if field == "logit_bias":  # before it is read: keys of JSON are costly
        check_size(name, value, MAX_LOGIT_BIAS)
    try:
        # JSON has only text keys: logit_bias {"5": 1.0}.
        return msgspec.convert(value, _TYPES[field], str_keys=True)
    except msgspec.ValidationError as error:
        raise BadRequest(f"{name}: {error}", field=name) from None


def json_text(value: Any) -> str:
    """A grammar that came as an object, as the text of one; keys keep their order."""
    return json.dumps(value, ensure_ascii=False, separators=(",", ":"))


def _preferred(serve: ServeOptions) -> dict[str, Any]:
    try:
        return msgspec.json.decode(serve.preferred_sampling_params, type=dict[str, Any])
    except msgspec.DecodeError as error:
        raise BadRequest(
            f"--preferred-sampling-params must be a JSON object: {error}",
            field="preferred_sampling_params",
        ) from None
