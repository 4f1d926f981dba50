"""/encode and /classify, shared by the routes and the Engine: body -> requests, deltas -> results.

    {"text" | "input_ids", ...}   --parse_encode-->  EncodeCall
    Delta                         --Encoded-->       {"embedding", "meta_info"}

Also what every route that wants vectors needs. Pure: no sockets.
"""

import math
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import msgspec
import numpy as np

from headrace.core.errors import BadRequest
from headrace.core.messages import (
    Delta,
    GenerateRequest,
    PoolSpec,
    SamplingParams,
    pack_ids,
    unpack_ids,
)
from headrace.core.model_info import ModelInfo
from headrace.frontend.native import MAX_BATCH, WEIGHT_VERSION
from headrace.frontend.requests import new_rid
from headrace.text.tokenizer import Tokenizer

# The tokenizer, for the field of a request that needs it; BadRequest without one.
TokenizerFor = Callable[[str], Tokenizer]

HONORED = frozenset(("text", "input_ids", "rid", "priority", "dimensions"))
_NOTHING = SamplingParams(max_new_tokens=0, temperature=0.0, seed=0)
_HOW = {
    "generate": "generates text; start the server with --is-embedding to make embeddings",
    "embed": "makes embeddings; ask it through /v1/embeddings or /encode",
    "classify": "gives scores to texts; ask it through /v1/classify, /v1/rerank or /classify",
}


class EncodeCall(msgspec.Struct, frozen=True):
    """What a body asks for. `as_list`: answer with a list, in the order of `requests`.

    `pairs`: of texts, whose scores a cross-encoder gives.
    """

    requests: list[GenerateRequest]
    as_list: bool
    pairs: bool = False
    dimensions: int | None = None


class _Body(msgspec.Struct, frozen=True):
    text: str | list[str | list[str]] | None = None
    input_ids: list[int | list[int]] | None = None
    rid: str | list[str] | None = None
    priority: int | None = None
    dimensions: int | None = None


def check_task(info: ModelInfo, *tasks: str) -> None:
    """Raise BadRequest, with what to do, unless the model's task is one of `tasks`."""
    if info.task not in tasks:
        raise BadRequest(f"model: this server's model {_HOW[info.task]}", field="model")


def for_model(request: GenerateRequest, info: ModelInfo) -> GenerateRequest:
    """The request with what its model's pooling allows.

    Raises:
        BadRequest: it wants text of a model that makes vectors, or the other way round.
    """
    if request.pool is None:
        check_task(info, "generate")
        return request
    check_task(info, "embed", "classify")
    assert info.pooling is not None
    pool = msgspec.structs.replace(
        request.pool, reuse=info.pooling.reuse, pieces=not info.pooling.encoder
    )
    return msgspec.structs.replace(request, pool=pool)


def shortened(
    request: GenerateRequest, most: int, special: frozenset[int], always: bool
) -> GenerateRequest:
    """A request for a vector that may be cut, or any if `always`, with at most `most` tokens.

    The special token at its end stays: its state may be the one that is taken.
    """
    if request.pool is None or not (request.pool.cut or always):
        return request
    ids = unpack_ids(request.ids)
    if len(ids) <= most:
        return request
    kept = ids[:most].copy()
    if int(ids[-1]) in special:
        kept[-1] = ids[-1]
    return msgspec.structs.replace(request, ids=pack_ids(kept))


def vector_request(
    prompt: str | Sequence[int],
    rid: str = "",
    priority: int | None = None,
    *,
    second: int = 0,
    cut: bool = False,
) -> GenerateRequest:
    """The request for the vector of a text or of token ids; `cut` if it is too long."""
    text = prompt if isinstance(prompt, str) else None
    return GenerateRequest(
        rid=rid or new_rid(),
        ids=b"" if isinstance(prompt, str) else packed(prompt),
        text=text,
        sampling=_NOTHING,
        priority=priority,
        pool=PoolSpec(second=second, cut=cut),
    )


def packed(ids: Sequence[int]) -> bytes:
    """Token ids of a request as bytes; BadRequest for what no id can be."""
    try:
        return pack_ids(list(ids))
    except OverflowError:
        raise BadRequest("input_ids: a number is no token id", field="input_ids") from None


def pair_requests(
    pairs: Sequence[tuple[str, str]],
    tokenizer: Tokenizer,
    rids: Sequence[str] = (),
    priority: int | None = None,
    *,
    cut: bool = False,
) -> list[GenerateRequest]:
    """Requests for the scores of pairs of texts (cross-encoders)."""
    found = tokenizer.encode_pairs(pairs)
    return [
        vector_request(ids, rids[index] if rids else "", priority, second=second, cut=cut)
        for index, (ids, second) in enumerate(found)
    ]


def probe(info: ModelInfo, rid: str, ids: list[int], sampling: SamplingParams) -> GenerateRequest:
    """A request that any model answers: text by `sampling`, or a vector."""
    if info.pooling is not None:
        return vector_request(ids, rid)
    return GenerateRequest(rid=rid, ids=pack_ids(ids), sampling=sampling)


def parse_encode(body: Mapping[str, Any], tokenizer: TokenizerFor) -> EncodeCall:
    """The requests that a native body describes. A list of pairs of texts is for cross-encoders.

    Raises:
        BadRequest: a wrong type, no prompt or two.
    """
    try:
        fields = msgspec.convert(dict(body), _Body)
    except msgspec.ValidationError as error:
        what, _, path = str(error).partition(" - at `$.")
        name = path.rstrip("`").partition("[")[0]
        raise BadRequest(f"{name}: {what}" if name else what, field=name or None) from None
    prompts, as_list = _prompts(fields)
    rids = _rids(fields.rid, len(prompts), as_list)
    pairs = [prompt for prompt in prompts if isinstance(prompt, tuple)]
    if pairs and len(pairs) < len(prompts):
        raise BadRequest("text mixes texts and pairs of texts", field="text")
    if pairs:
        found = pair_requests(pairs, tokenizer("text"), rids, fields.priority)
        return EncodeCall(found, as_list, pairs=True, dimensions=fields.dimensions)
    singles = [prompt for prompt in prompts if not isinstance(prompt, tuple)]
    requests = [
        vector_request(prompt, rid, fields.priority)
        for prompt, rid in zip(singles, rids, strict=True)
    ]
    return EncodeCall(requests, as_list, dimensions=fields.dimensions)


def _prompts(fields: _Body) -> tuple[list[str | tuple[str, str] | list[int]], bool]:
    """(prompts, whether they came as a list)."""
    if (fields.text is None) == (fields.input_ids is None):
        raise BadRequest("give exactly one of text and input_ids", field="text")
    name = "input_ids" if fields.text is None else "text"
    given: Any = fields.input_ids if fields.text is None else fields.text
    if not given and not isinstance(given, str):
        raise BadRequest(f"{name} is empty", field=name)
    if isinstance(given, str) or (name == "input_ids" and isinstance(given[0], int)):
        given, as_list = [given], False
    else:
        as_list = True
    if len(given) > MAX_BATCH:
        raise BadRequest(f"{name} has {len(given)} items; the limit is {MAX_BATCH}", field=name)
    return [_prompt(name, item) for item in given], as_list


def _prompt(name: str, item: Any) -> str | tuple[str, str] | list[int]:
    if isinstance(item, str):
        return item
    if name == "text":
        if len(item) != 2:
            raise BadRequest(f"text: a pair has 2 texts, not {len(item)}", field="text")
        return item[0], item[1]
    if not isinstance(item, list) or not item or not all(type(token) is int for token in item):
        raise BadRequest(
            "input_ids must be a list of token ids, or of such lists", field="input_ids"
        )
    return item


def _rids(rid: str | list[str] | None, count: int, as_list: bool) -> list[str]:
    if isinstance(rid, list):
        if len(rid) != count:
            raise BadRequest(f"rid has {len(rid)} items for {count} prompts", field="rid")
        return rid
    if rid is None:
        return [new_rid() for _ in range(count)]
    return [f"{rid}_{i}" for i in range(count)] if as_list else [rid]


def check_dimensions(dimensions: int | None, info: ModelInfo) -> None:
    """Raise BadRequest for a size that the model's embeddings cannot be cut to."""
    if dimensions is None:
        return
    check_task(info, "embed")
    assert info.pooling is not None
    sizes = info.pooling.sizes
    if sizes and dimensions not in sizes:
        raise BadRequest(
            f"dimensions must be one of {', '.join(map(str, sizes))}, not {dimensions}",
            field="dimensions",
        )
    if not 1 <= dimensions <= info.embedding_size:
        raise BadRequest(
            f"dimensions must be 1 to {info.embedding_size}, not {dimensions}", field="dimensions"
        )


def vector_of(delta: Delta, dimensions: int | None = None) -> np.ndarray:
    """The vector of a finished request, fp32 [n]; cut to `dimensions` it has length 1 again.

    Matryoshka embeddings: arXiv 2205.13147.
    """
    vector = np.frombuffer(delta.pooled, "<f4")
    if dimensions is None or dimensions == len(vector):
        return vector
    wide = vector[:dimensions].astype(np.float64)
    return (wide / max(float(np.linalg.norm(wide)), 1e-12)).astype(np.float32)


def relevance_of(delta: Delta, info: ModelInfo) -> list[float]:
    """The scores of a pair of texts, as sentence-transformers' CrossEncoder gives them."""
    values: list[float] = vector_of(delta).tolist()
    assert info.pooling is not None
    return list(map(sigmoid, values)) if info.pooling.sigmoid else values


def sigmoid(x: float) -> float:
    """1 / (1 + exp(-x)), for x of any size."""
    return 1 / (1 + math.exp(-x)) if x >= 0 else math.exp(x) / (1 + math.exp(x))


class Encoded:
    """The results of a call, as they come."""

    def __init__(self, call: EncodeCall, info: ModelInfo) -> None:
        self._call = call
        self._info = info
        self._results: list[dict[str, Any]] = [{} for _ in call.requests]
        self._started = time.monotonic()

    def add(self, index: int, delta: Delta) -> None:
        """Take in the delta of a request, which has only one."""
        if self._call.pairs:
            vector = relevance_of(delta, self._info)
        else:
            vector = vector_of(delta, self._call.dimensions).tolist()
        self._results[index] = {
            "embedding": vector,
            "meta_info": {
                "id": delta.rid,
                "finish_reason": delta.finish.to_wire() if delta.finish else None,
                "prompt_tokens": delta.prompt_tokens,
                "cached_tokens": delta.cached_tokens,
                "weight_version": WEIGHT_VERSION,
                "e2e_latency": time.monotonic() - self._started,
                "queue_time": delta.queue_time,
            },
        }

    def result(self) -> Any:
        """{"embedding", "meta_info"}, or a list of them."""
        return self._results if self._call.as_list else self._results[0]
