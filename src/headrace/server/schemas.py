"""The bodies of the OpenAI routes: every field that has an effect is declared here.

None means absent, for every field: routers in front of a server fill in nulls. A field that would
change the answer but is not built yet is refused (`REFUSED`); any other field has no effect and is
reported back by name (`ignored_fields`), so that nothing is dropped in silence. Ranges of sampling
fields are checked where all protocols meet (`headrace.frontend`); here are types, and the ranges of
names that only OpenAI has. Knows nothing of HTTP.
"""

from typing import Annotated, Any, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError
from pydantic.json_schema import models_json_schema

from headrace.core.errors import Unsupported
from headrace.frontend.native import MAX_BATCH
from headrace.frontend.requests import MAX_SAMPLES
from headrace.server import shapes
from headrace.server.errors import explain

Body = TypeVar("Body", bound=BaseModel)

Int64 = Annotated[int, Field(ge=-(2**63), le=2**63 - 1)]
Count = Annotated[int, Field(ge=0, le=2**31 - 1)]
TokenId = Annotated[int, Field(ge=0, le=2**31 - 1)]
TokenIds = Annotated[list[TokenId], Field(fail_fast=True)]
RequestId = Annotated[str, Field(pattern=r"^[!-~]{1,256}$")]
Objects = Annotated[list[dict[str, Any]], Field(fail_fast=True)]
NATIVE = "NativeRequest"
ENCODE = "EncodeRequest"
SCHEMA_PATH = "#/components/schemas/{model}"
Prompts = Annotated[list[str], Field(fail_fast=True, max_length=MAX_BATCH)]
PromptsOfIds = Annotated[list[TokenIds], Field(fail_fast=True, max_length=MAX_BATCH)]

_STRUCTURE = "not supported under this name; use response_format, json_schema, regex or ebnf"
REFUSED: dict[str, str] = {
    "structured_outputs": _STRUCTURE,
    "guided_json": _STRUCTURE,
    "guided_regex": _STRUCTURE,
    "guided_choice": _STRUCTURE,
    "guided_grammar": _STRUCTURE,
    "suffix": "fill-in-the-middle is not supported yet",
    "functions": "the old function calling is not supported; use tools",
    "function_call": "the old function calling is not supported; use tools",
    "lora_path": "LoRA adapters are not supported yet",
    "session_id": "sessions are not supported yet",
    "session_params": "sessions are for /generate",
    "input_embeds": "prompts as embeddings are not supported",
    "prompt_embeds": "prompts as embeddings are not supported",
    "logits_processors": "code from requests is never run",
    "watermark": "watermarks are not supported yet",
    "return_hidden_states": "hidden states are not supported yet",
    "return_routed_experts": "routed experts are not supported yet",
    "return_sampling_mask": "sampling masks are not supported yet",
    "prompt_logprobs": "use echo with logprobs, or /generate with logprob_start_len",
    "use_beam_search": "beam search is not supported yet",
    "beam_width": "beam search is not supported yet",
    "audio": "audio is not supported yet",
    "web_search_options": "this server does not search",
}


class StreamOptions(BaseModel):
    """What a stream reports besides the text."""

    model_config = ConfigDict(extra="allow")

    include_usage: bool | None = None
    continuous_usage_stats: bool | None = None


class CommonFields(BaseModel):
    """Fields of both OpenAI routes. Sampling fields have SGLang's limits."""

    model_config = ConfigDict(extra="allow", allow_inf_nan=False)

    model: str | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    n: Annotated[int, Field(ge=1, le=MAX_SAMPLES)] | None = None
    seed: Int64 | None = None
    stop: str | Prompts | None = None
    temperature: float | None = None
    top_p: float | None = None
    frequency_penalty: float | None = None
    presence_penalty: float | None = None
    logit_bias: dict[TokenId, float] | None = None
    # Extras of SGLang.
    top_k: Int64 | None = None
    min_p: float | None = None
    min_tokens: Count | None = None
    repetition_penalty: float | None = None
    stop_token_ids: TokenIds | None = None
    stop_regex: str | Prompts | None = None
    ignore_eos: bool | None = None
    no_stop_trim: bool | None = None
    skip_special_tokens: bool | None = None
    spaces_between_special_tokens: bool | None = None
    response_format: dict[str, Any] | None = None
    json_schema: str | dict[str, Any] | None = None
    regex: str | None = None
    ebnf: str | None = None
    structural_tag: str | dict[str, Any] | None = None
    custom_logit_processor: str | None = None
    custom_params: dict[str, Any] | None = None
    extra_key: str | None = None
    cache_salt: str | None = None
    priority: Int64 | None = None
    return_token_ids: bool | None = None
    return_timings: bool | None = None


class CompletionRequest(CommonFields):
    """POST /v1/completions."""

    prompt: str | TokenIds | Prompts | PromptsOfIds
    max_tokens: Count | None = None
    echo: bool | None = None
    logprobs: Count | None = None
    rid: RequestId | list[RequestId] | None = None


class ChatRequest(CommonFields):
    """POST /v1/chat/completions. `messages` and `tools` go to the template as they are."""

    messages: Annotated[Objects, shapes.ChatMessages] | None = None
    input_ids: TokenIds | None = None
    max_tokens: Count | None = None
    max_completion_tokens: Count | None = None
    logprobs: bool | None = None
    top_logprobs: Count | None = None
    tools: Annotated[Objects, shapes.ChatTools] | None = None
    tool_choice: Literal["auto", "none", "required"] | dict[str, Any] | None = None
    parallel_tool_calls: bool | None = None
    separate_reasoning: bool | None = None
    stream_reasoning: bool | None = None
    reasoning_effort: str | float | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    add_generation_prompt: bool | None = None
    continue_final_message: bool | None = None
    return_prompt_token_ids: bool | None = None
    rid: RequestId | None = None


class TokenizeRequest(BaseModel):
    """POST /tokenize: a prompt, or messages as for a chat."""

    model_config = ConfigDict(extra="allow")

    prompt: str | Prompts | None = None
    add_special_tokens: bool | None = None
    messages: Annotated[Objects, shapes.ChatMessages] | None = None
    tools: Annotated[Objects, shapes.ChatTools] | None = None
    tool_choice: Literal["auto", "none", "required"] | dict[str, Any] | None = None
    reasoning_effort: str | float | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    add_generation_prompt: bool | None = None
    continue_final_message: bool | None = None


class DetokenizeRequest(BaseModel):
    """POST /detokenize."""

    model_config = ConfigDict(extra="allow")

    tokens: TokenIds | PromptsOfIds
    skip_special_tokens: bool | None = None


class FunctionCallBody(BaseModel):
    """POST /parse_function_call."""

    model_config = ConfigDict(extra="allow")

    text: str
    tools: Annotated[Objects, shapes.ChatTools] | None = None
    tool_call_parser: str


class ReasoningBody(BaseModel):
    """POST /separate_reasoning. The text is taken to be a whole answer."""

    model_config = ConfigDict(extra="allow")

    text: str
    reasoning_parser: str


class AbortBody(BaseModel):
    """POST /abort_request: every request whose id starts with `rid`, or all."""

    model_config = ConfigDict(extra="allow")

    rid: str | None = None
    abort_all: bool | None = None


def read(kind: type[Body], raw: bytes) -> Body:
    """Parse and check a JSON body.

    Raises:
        BadRequest: not JSON, not an object, or a field is wrong; the first such field is named.
    """
    try:
        return kind.model_validate_json(raw)
    except ValidationError as error:
        problems = error.errors(include_url=False, include_context=False, include_input=False)
        raise explain(problems) from None


def refuse_unsupported(body: BaseModel) -> None:
    """Raise Unsupported when a field of `REFUSED` asks for something."""
    for name, value in (body.model_extra or {}).items():
        if name in REFUSED and _asks(name, value):
            raise Unsupported(f"{name}: {REFUSED[name]}", field=name)


def ignored_fields(body: BaseModel) -> list[str]:
    """Names of given fields that have no effect here, also inside of objects: `a.b`."""
    extra = body.model_extra or {}
    names = [name for name, value in extra.items() if name not in REFUSED and value is not None]
    for field in type(body).model_fields:
        if isinstance(inner := getattr(body, field), BaseModel):
            names += [f"{field}.{name}" for name in ignored_fields(inner)]
    return names


def _asks(name: str, value: Any) -> bool:
    return value not in (None, False, "", [], {})


def body_of(kind: type[BaseModel] | str) -> dict[str, Any]:
    """The OpenAPI entry of a route that reads its body itself; `all_schemas` has the definition."""
    name = kind if isinstance(kind, str) else kind.__name__
    schema = {"$ref": SCHEMA_PATH.format(model=name)}
    return {"requestBody": {"required": True, "content": {"application/json": {"schema": schema}}}}


def all_schemas() -> dict[str, Any]:
    """The definitions that `body_of` refers to: `components.schemas` of the OpenAPI document."""
    kinds = (
        CompletionRequest,
        ChatRequest,
        TokenizeRequest,
        DetokenizeRequest,
        AbortBody,
        FunctionCallBody,
        ReasoningBody,
    )
    _, definitions = models_json_schema(
        [(kind, "validation") for kind in kinds], ref_template=SCHEMA_PATH
    )
    native = {NATIVE: shapes.generate_body(), ENCODE: shapes.encode_body()}
    return {**definitions["$defs"], **native}
