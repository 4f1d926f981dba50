"""Bodies and heads that nobody should send, from the reports of users of all engines.

Every one must be answered below 500, or the connection closed, and cost nobody else anything.
"""

import json
import random
from typing import Any, NamedTuple


class Attack(NamedTuple):
    """One request. `head`: more header lines."""

    path: str
    body: bytes
    head: str = ""


def attacks(seed: int, vocab_size: int) -> "list[Attack]":
    """All kinds once, in random order."""
    found = [Attack("/generate", _json(body)) for body in _native(vocab_size)]
    found += [Attack("/v1/chat/completions", _json(body)) for body in _chats()]
    found += [Attack("/v1/completions", _json(body)) for body in _completions()]
    found += _raw()
    random.Random(seed).shuffle(found)
    return found


def _json(body: dict[str, Any]) -> bytes:
    return json.dumps(body).encode("utf-8", "surrogatepass")


def _native(vocab: int) -> list[dict[str, Any]]:
    short = {"max_new_tokens": 2}
    sampling: list[dict[str, Any]] = [
        {"n": 10**9},
        {"n": -1},
        {"max_new_tokens": 10**18},
        {"temperature": float("nan")},
        {"temperature": -1.0},
        {"top_p": float("inf")},
        {"top_k": 2**63},
        {"logit_bias": {"5": float("nan")}},
        {"logit_bias": {str(i): 1.0 for i in range(100_000)}},
        {"stop": ["x"] * 100_000},
        {"stop": ["y" * 1_000_000]},
        {"stop_token_ids": [-1]},
        {"stop_regex": "(a+)+$"},
        {"stop_regex": "(" * 5000},
        {"regex": "(a{1,1000}){1,1000}"},
        {"regex": "(x+x+)+y"},
        {"regex": "["},
        {"ebnf": "root ::= root root"},
        {"ebnf": "root ::= missing"},
        {"json_schema": '{"$ref": "#/$defs/none"}'},
        {"json_schema": '{"$ref": "http://169.254.169.254/latest/meta-data"}'},
        {"json_schema": '{"type": "string", "pattern": "(a|a)*b{1,99999}"}'},
        {"json_schema": '{"items":' * 3000 + "{}" + "}" * 3000},
        {"json_schema": "{" * 10_000},
        {"repetition_penalty": 1e308},
        {"seed": 2**64},
    ]
    bodies: list[dict[str, Any]] = [{"text": "a", "sampling_params": short | s} for s in sampling]
    bodies += [
        {"text": ""},
        {"text": "\ud800 half a pair", "sampling_params": short},
        {"text": "\0" * 1000, "sampling_params": short},
        {"text": "word " * 200_000, "sampling_params": short},
        {"input_ids": [-1], "sampling_params": short},
        {"input_ids": [vocab], "sampling_params": short},
        {"input_ids": [2**70], "sampling_params": short},
        {"input_ids": [[1], []], "sampling_params": short},
        {"input_ids": [], "sampling_params": short},
        {"text": ["a"] * 100_000, "sampling_params": short},
        {"text": "a", "return_logprob": True, "top_logprobs_num": 10**6, "sampling_params": short},
        {"text": "a", "return_logprob": True, "logprob_start_len": -(10**12)},
        {"text": "a", "custom_logit_processor": "gASVCgAAAA==", "sampling_params": short},
        {"text": "a", "custom_logit_processor": ["a"] * 9, "sampling_params": short},
        {"text": "a", "sampling_params": short | {"custom_params": _nested(900)}},
        {"text": "a", "sampling_params": short | {"custom_params": {"a": [2**70]}}},
        {"text": "a", "rid": "x" * 100_000},
        {"text": "a", "rid": {"$ne": 1}},
        {"text": "a", "extra_key": "k" * 1_000_000},
        {"text": "a", "image_data": "file:///etc/passwd"},
        {"text": "a", "image_data": "http://169.254.169.254/"},
        {"text": "a", "session_params": {"id": "../../etc", "rid": "x"}},
        {"text": "a", "lora_path": "../../../root"},
    ]
    return bodies


def _nested(depth: int) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for _ in range(depth):
        found = {"a": found}
    return found


def _chats() -> list[dict[str, Any]]:
    ask = {"messages": [{"role": "user", "content": "hi"}], "max_tokens": 2}
    deep: Any = "x"
    for _ in range(500):
        deep = [deep]
    tool = {"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}
    return [
        {"messages": []},
        {"messages": [{"role": "user"}] * 50_000, "max_tokens": 2},
        {"messages": [{"role": "\0", "content": deep}], "max_tokens": 2},
        {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}]},
        ask | {"chat_template": "{% for i in range(10**9) %}x{% endfor %}"},
        ask | {"chat_template_kwargs": {"x": deep}},
        ask | {"chat_template_kwargs": {"messages": "x" * 1_000_000}},
        ask | {"top_logprobs": 10**6, "logprobs": True},
        ask | {"n": 10**9},
        ask | {"tools": [tool] * 5000},
        ask | {"tools": [{"type": "function", "function": {"name": "f" * 100_000}}]},
        ask | {"tools": [tool], "tool_choice": {"type": "function", "function": {"name": "g"}}},
        ask | {"response_format": {"type": "json_schema", "json_schema": {"name": "x"}}},
        ask | {"response_format": {"type": "json_schema", "json_schema": {"schema": deep}}},
        ask | {"stop": deep},
        ask | {"logit_bias": {"-1": 1, "99999999": 5}},
        ask | {"max_tokens": -5},
        ask | {"user": deep, "metadata": {"k" * 10_000: "v"}},
        ask | {"seed": 1e300},
    ]


def _completions() -> list[dict[str, Any]]:
    return [
        {"prompt": ""},
        {"prompt": []},
        {"prompt": [[]]},
        {"prompt": ["a"] * 100_000, "max_tokens": 1},
        {"prompt": "a", "suffix": "b" * 1_000_000},
        {"prompt": "a", "best_of": 10**9},
        {"prompt": "a", "echo": "yes please"},
        {"prompt": "a", "logprobs": 10**9},
        {"prompt": {"a": 1}},
    ]


def _raw() -> list[Attack]:
    chat, good = "/v1/chat/completions", b'{"text": "a"}'
    return [
        Attack(chat, b"[" * 100_000),
        Attack(chat, b'{"a":' * 50_000 + b"1" + b"}" * 50_000),
        Attack(chat, b"\xff\xfe\x00"),
        Attack(chat, b""),
        Attack(chat, b"null"),
        Attack(chat, b"1e999999"),
        Attack(chat, b"9" * 1_000_000),
        Attack("/generate", good, "x-large: " + "a" * 200_000),
        Attack("/generate", good, "\r\n".join(f"x-{i}: 1" for i in range(20_000))),
        Attack("/generate", good, "content-type: text/plain"),
        Attack("/generate", good, "x-ttft-timeout: -1"),
        Attack("/generate", good, "authorization: Bearer " + "k" * 10_000),
        Attack("/" + "a" * 5000, good),
        Attack("/v1/files/..%2f..%2fetc%2fpasswd", b""),
        Attack("/v1/responses/%00", b"{}"),
        Attack("/tokenize", b'{"prompt": "\\ud800"}'),
        Attack("/detokenize", b'{"tokens": [99999999999]}'),
        Attack("/v1/embeddings", b'{"input": [[-1]]}'),
        Attack("/v1/rerank", b'{"query": 1, "documents": {}}'),
        Attack("/abort_request", b'{"rid": ""}'),
        Attack("/parse_function_call", b'{"text": "a", "tools": 5, "tool_call_parser": "x"}'),
    ]
