"""Vectors and scores for the Engine: a call in Python becomes requests, their answers its result.

Knows the tokenizer manager and the shapes of results; no threads and no processes.
"""

from collections.abc import Callable
from contextlib import aclosing
from typing import Any

from headrace.core.errors import BadRequest
from headrace.core.messages import Delta, GenerateRequest
from headrace.frontend.encode import Encoded, check_dimensions, check_task, parse_encode
from headrace.frontend.scoring import LabelScores, Question
from headrace.frontend.tokenizer_manager import TokenizerManager
from headrace.frontend.validate import error_of
from headrace.text.tokenizer import Tokenizer


async def encode(manager: TokenizerManager, body: dict[str, Any]) -> Any:
    """The answer of /encode to `body`.

    Raises:
        HeadraceError: the request is wrong, or the model generates text.
    """
    call = parse_encode(body, lambda field: _tokenizer(manager, field))
    check_dimensions(call.dimensions, manager.info)
    encoded = Encoded(call, manager.info)
    await _gather(manager, call.requests, encoded.add)
    return encoded.result()


def question(
    query: str | list[int],
    items: str | list[str] | list[list[int]],
    label_token_ids: list[int] | None,
    apply_softmax: bool,
    item_first: bool,
) -> Question:
    """The arguments of Engine.score as one value."""
    listed = [items] if isinstance(items, str) else items
    labels = tuple(label_token_ids or ())
    return Question(query, listed, labels, apply_softmax=apply_softmax, item_first=item_first)


async def score(manager: TokenizerManager, question: Question) -> list[list[float]]:
    """The `scores` of /v1/score.

    Raises:
        HeadraceError: the question is wrong, or the model cannot answer it.
    """
    check_task(manager.info, "generate", "classify")
    scores = LabelScores(question, manager.info, lambda field: _tokenizer(manager, field))
    await _gather(manager, scores.requests, scores.add)
    return scores.scores()


async def _gather(
    manager: TokenizerManager,
    requests: list[GenerateRequest],
    add: Callable[[int, Delta], None],
) -> None:
    """Give `add` the delta of each request."""
    async with aclosing(manager.generate_many(requests)) as news:
        async for index, delta in news:
            if delta.finish is not None and (error := error_of(delta.finish)) is not None:
                raise error
            add(index, delta)


def _tokenizer(manager: TokenizerManager, field: str) -> Tokenizer:
    if manager.tokenizer is None:
        raise BadRequest(f"{field}: this engine has no tokenizer; use input_ids", field=field)
    return manager.tokenizer
