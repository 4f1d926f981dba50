"""Structured output over HTTP with the demo model: always valid, the same alone or in a crowd."""

import contextlib
import json
import re
import time
from concurrent.futures import ThreadPoolExecutor
from typing import Literal

import openai
import pydantic
import pytest

from tests.e2e.conftest import API_KEY

pytestmark = pytest.mark.slow

MODEL = "headrace-demo"
HELLO = [{"role": "user", "content": "Tell me about the water wheel."}]
HOT = {"model": MODEL, "messages": HELLO, "temperature": 1.5, "max_tokens": 400}


class Part(pydantic.BaseModel, extra="forbid"):
    label: str = pydantic.Field(max_length=10)
    count: int = pydantic.Field(ge=0, le=99)


class Wheel(pydantic.BaseModel, extra="forbid"):
    name: str = pydantic.Field(max_length=12)
    kind: Literal["overshot", "undershot"]
    parts: list[Part] = pydantic.Field(max_length=2)
    width: float | None = pydantic.Field(ge=0, le=10, multiple_of=0.5)


@pytest.fixture(scope="module")
def client(demo_server):
    with openai.OpenAI(
        base_url=f"{demo_server.url}/v1", api_key=API_KEY, max_retries=0, timeout=120
    ) as found:
        yield found


@pytest.mark.parametrize("seed", range(4))
def test_parse(client, seed):
    answer = client.chat.completions.parse(**HOT, seed=seed, response_format=Wheel, n=2)
    for choice in answer.choices:
        assert choice.finish_reason == "stop"
        assert isinstance(choice.message.parsed, Wheel)


def test_parse_streamed(client):
    with client.chat.completions.stream(**HOT, seed=9, response_format=Wheel) as stream:
        final = stream.get_final_completion()
    assert isinstance(final.choices[0].message.parsed, Wheel)


def ask(client, **fields) -> str:
    answer = client.chat.completions.create(**HOT | fields)
    assert answer.choices[0].finish_reason == "stop"
    return answer.choices[0].message.content


@pytest.mark.parametrize("seed", range(3))
def test_regex_ebnf_and_choice(client, seed):
    text = ask(client, seed=seed, extra_body={"regex": r"(mill|wheel)-[0-9]{2,4}"})
    assert re.fullmatch(r"(mill|wheel)-[0-9]{2,4}", text)
    grammar = 'root ::= sum\nsum ::= item (" + " item){1,3}\nitem ::= [0-9] | "(" sum ")"'
    text = ask(client, seed=seed, extra_body={"ebnf": grammar}, max_tokens=900)
    assert re.fullmatch(r"[0-9() +]+", text)
    assert text.count("(") == text.count(")")
    choice = {"json_schema": {"name": "choice", "schema": {"enum": ["yes", "no", "perhaps"]}}}
    text = ask(client, seed=seed, response_format={"type": "json_schema", **choice})
    assert json.loads(text) in ("yes", "no", "perhaps")


def test_json_object(client):
    for seed in range(2):
        answer = client.chat.completions.create(
            **HOT | {"max_tokens": 40}, seed=seed, response_format={"type": "json_object"}
        )
        text = answer.choices[0].message.content
        assert re.match(r'\{\s*("|\})', text)
        if answer.choices[0].finish_reason == "stop":
            assert isinstance(json.loads(text), dict)


def test_structural_tag(client):
    tag = {
        "type": "structural_tag",
        "structures": [{"begin": "<n>", "schema": {"enum": [1, 2, 3]}, "end": "</n>"}],
        "triggers": ["<n>"],
    }
    forced = {
        "type": "structural_tag",
        "format": {"type": "triggered_tags", "triggers": ["<n>"], "at_least_one": True,
                   "stop_after_first": True, "tags": [{"type": "tag", "begin": "<n>",
                   "content": {"type": "json_schema", "json_schema": {"enum": [1, 2]}},
                   "end": "</n>"}]},
    }  # fmt: skip
    text = ask(client, seed=1, response_format=tag, temperature=0.5)
    assert re.fullmatch(r"([^<]|<(?!n>)|<n>[123]</n>)*", text)
    assert ask(client, seed=1, response_format=forced) in ("<n>1</n>", "<n>2</n>")


def test_stop_strings_and_max_tokens_still_end(client):
    cut = client.chat.completions.create(
        **HOT | {"max_tokens": 2}, seed=1, extra_body={"regex": "a{50}"}
    )
    assert cut.choices[0].finish_reason == "length"
    stopped = client.chat.completions.create(
        **HOT, seed=1, stop="b", extra_body={"regex": "(ab){50}"}
    )
    assert stopped.choices[0].finish_reason == "stop"
    assert stopped.choices[0].message.content == "a"


def test_alone_or_in_a_crowd(client):
    """Bitwise the same text, next to others with and without grammars."""

    def one(seed: int) -> str:
        schema = Wheel.model_json_schema()
        if seed % 3 == 0:
            return ask(client, seed=seed, extra_body={"json_schema": schema})
        fields = {"extra_body": {"regex": "[a-z ]{20,60}"}} if seed % 3 == 1 else {"max_tokens": 30}
        return client.chat.completions.create(**HOT | fields, seed=seed).choices[0].message.content

    alone = [one(seed) for seed in range(9)]
    with ThreadPoolExecutor(9) as pool:
        assert list(pool.map(one, range(9))) == alone


@pytest.mark.parametrize(
    ("fields", "part"),
    [
        ({"json_schema": {"properties": {"a": {"not": {}}}}}, "#/properties/a/not"),
        ({"regex": "("}, "regex"),
        ({"regex": "a", "ebnf": 'root ::= "a"'}, "at most one"),
        ({"ebnf": "root ::= other"}, "other"),
        ({"structural_tag": {"type": "structural_tag", "format": {"type": "x"}}}, "#/format/type"),
        ({"response_format": {"type": "xml"}}, "response_format.type"),
        ({"response_format": {"type": "json_schema"}}, "response_format.json_schema.schema"),
        ({"json_schema": {"allOf": [{"const": 1}, {"const": 2}]}}, "json_schema"),
    ],
)
def test_errors_are_400_and_name_the_place(client, fields, part):
    for stream in (False, True):
        with pytest.raises(openai.BadRequestError) as caught:
            client.chat.completions.create(**HOT, stream=stream, extra_body=fields)
        assert part in caught.value.message


def nested(depth: int) -> dict:
    schema: dict = {"type": "integer"}
    for _ in range(depth):
        schema = {"type": "object", "properties": {"a": schema}, "required": ["a"]}
    return schema


HOSTILE = [
    {"json_schema": nested(300)},
    {"json_schema": {"properties": {f"p{i}": {"type": "string"} for i in range(5000)}}},
    {"json_schema": {"allOf": [{"anyOf": [{"pattern": f"a{i}"}, {"pattern": f"b{i}"}]}
                               for i in range(20)], "type": "string"}},
    {"json_schema": {"$ref": "#"}},
    {"json_schema": {"enum": [f"value-{i * 7919}" for i in range(20_000)]}},
    {"regex": "((a{1,1000}){1,1000}){1,1000}b"},
    {"regex": "(.*a.{2000}){200}"},
    {"regex": "|".join(f"(x{i}.*y{i}.*z{i})" for i in range(300))},
    {"ebnf": "root ::= root root | root root root | \"a\" | \"\""},
    {"ebnf": "root ::= " + "(" * 5000},
    {"ebnf": "\n".join([f"r{i} ::= r{i + 1} r{i + 1}" for i in range(60)])
             + '\nr60 ::= "a"\nroot ::= r0'},
]  # fmt: skip


def test_hostile_grammars_harm_nobody_else(client):
    """Each is answered, by a text or a 400, while another request streams as before."""

    def attack(fields: dict) -> float:
        began = time.monotonic()
        with contextlib.suppress(openai.BadRequestError):
            client.chat.completions.create(**HOT | {"max_tokens": 8}, seed=1, extra_body=fields)
        return time.monotonic() - began

    def other() -> str:
        return ask(client, seed=3, extra_body={"regex": "[a-c]{40}"})

    want = other()
    with ThreadPoolExecutor(len(HOSTILE)) as pool:
        attacks = [pool.submit(attack, fields) for fields in HOSTILE]
        slowest = 0.0
        while not all(job.done() for job in attacks):
            began = time.monotonic()
            assert other() == want
            slowest = max(slowest, time.monotonic() - began)
        took = [job.result() for job in attacks]
    assert max(took) < 100, took
    assert slowest < 30
    assert other() == want
