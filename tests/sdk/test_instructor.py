"""instructor without a single retry: the grammar makes every answer valid the first time."""

from typing import Literal

import instructor
import openai
import pytest
from pydantic import BaseModel, Field

from tests.sdk.conftest import API_KEY, MODEL


class Part(BaseModel, extra="forbid"):
    label: str = Field(max_length=10)
    count: int = Field(ge=0, le=99)
    level: Literal["low", "high"]


class Wheel(BaseModel, extra="forbid"):
    """A water wheel."""

    name: str = Field(max_length=12)
    kind: Literal["overshot", "undershot"]
    parts: list[Part] = Field(min_length=1, max_length=2)
    width: float | None = Field(ge=0, le=10, multiple_of=0.5)


# JSON and MD_JSON only ask for JSON in words: nothing there for a server to enforce.
MODES = (
    instructor.Mode.TOOLS,
    instructor.Mode.TOOLS_STRICT,
    instructor.Mode.JSON_SCHEMA,
)


@pytest.fixture(params=MODES, ids=str)
def client(request, base_url):
    with openai.OpenAI(base_url=base_url, api_key=API_KEY, max_retries=0, timeout=120) as found:
        yield instructor.from_openai(found, mode=request.param)


def ask(client, kind, seed, **fields):
    return client.chat.completions.create(
        model=MODEL,
        messages=[{"role": "user", "content": "Tell me about the water wheel."}],
        response_model=kind,
        max_retries=0,
        temperature=1.2,
        seed=seed,
        max_tokens=400,
        **fields,
    )


@pytest.mark.parametrize("seed", range(3))
def test_every_answer_is_valid(client, seed):
    assert isinstance(ask(client, Wheel, seed), Wheel)


def test_partial(client):
    """The parts of a streamed object grow to a valid one."""
    seen = list(ask(client, instructor.Partial[Wheel], 5, stream=True))
    assert len(seen) > 2
    assert Wheel.model_validate(seen[-1].model_dump())
