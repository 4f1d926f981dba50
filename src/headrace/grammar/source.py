"""From what a request asks for to the engine's own language, or a refusal.

The main process calls `translate` to refuse before anything is sent, the scheduler's compile
threads to compile: one function, so both read a grammar alike. Needs no engine. Pure.
"""

import json
from collections.abc import Mapping

from headrace.grammar import ebnf, schema, tags
from headrace.grammar.refusal import Refused
from headrace.text.tokenizer import Tokenizer

MAX_BYTES = {
    "json_schema": 1 << 20,
    "regex": 64 << 10,
    "ebnf": 256 << 10,
    "structural_tag": 1 << 20,
}


def translate(field: str, text: str, specials: Mapping[str, int]) -> str:
    """A grammar for the engine: its JSON form, or Lark. `specials`: special tokens by their text.

    Raises:
        Refused: names the field and the place in it.
    """
    size = len(text.encode("utf-8", "surrogatepass"))
    if size > MAX_BYTES[field]:
        raise Refused(field, f"has {size} bytes; the limit is {MAX_BYTES[field]}")
    if not text:
        raise Refused(field, "is empty")
    if field == "json_schema":
        return _whole(json_schema=schema.prepare(text))
    if field == "structural_tag":
        return _whole(lark_grammar=tags.to_lark(text, specials))
    if field == "ebnf":
        start, rules = ebnf.to_lark(text)
        return _whole(lark_grammar="\n".join([f"start: {start}", *rules]))
    return _whole(lark_grammar=f"start: {tags.regex_literal(text)}")


def special_tokens(tokenizer: Tokenizer | None) -> dict[str, int]:
    """Special tokens by their text."""
    if tokenizer is None:
        return {}
    named = {tokenizer.backend.id_to_token(token): token for token in tokenizer.special_ids}
    return {text: token for text, token in named.items() if text}


def _whole(**grammar: object) -> str:
    return json.dumps({"grammars": [grammar]})
