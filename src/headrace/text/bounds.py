"""How few tokens a text can be, known from its length alone.

A text that cannot fit is refused before anybody spends seconds on tokenizing it. Tokenizers that
may drop or merge characters without bound have no such number. Knows no limits of models.
"""

import json
from typing import Any

import tokenizers

# A canonical composition (NFC) makes one character of at most four.
_SHRINKS_BY = {"NFC": 4, "Prepend": 1}
_KEEPS_ALL = {"ByteLevel", "Metaspace", "Digits"}
_BYTES = set(tokenizers.pre_tokenizers.ByteLevel.alphabet())


def longest_piece(backend: tokenizers.Tokenizer) -> int | None:
    """The most characters of a text that one token can stand for; None when there is no bound."""
    shrinks = 1
    for state in _steps(backend.normalizer, "normalizers"):
        if state["type"] == "Replace":
            keeps = len(state["content"]) >= len(state["pattern"].get("String", "x" * 99))
            factor = 1 if keeps else None
        else:
            factor = _SHRINKS_BY.get(state["type"])
        if factor is None:
            return None
        shrinks *= factor
    cuts = _steps(backend.pre_tokenizer, "pretokenizers")
    if not all(_keeps(state) for state in cuts):
        return None
    known = backend.get_vocab(with_added_tokens=True)
    bytewise = any(state["type"] == "ByteLevel" for state in cuts) and known.keys() >= _BYTES
    if not bytewise and not _names_the_unknown(backend.model):
        return None
    added = backend.get_added_tokens_decoder().values()
    if any(token.lstrip or token.rstrip for token in added):  # they swallow spaces
        return None
    return shrinks * max(map(len, known))


def _names_the_unknown(model: Any) -> bool:
    """Each unknown character gives tokens: none is dropped, or becomes one with its neighbors."""
    if not isinstance(model, tokenizers.models.BPE):
        return False
    return model.byte_fallback or (model.unk_token is not None and not model.fuse_unk)


def _keeps(state: dict[str, Any]) -> bool:
    if state["type"] == "Split":
        return state["behavior"] != "Removed"
    return state["type"] in _KEEPS_ALL


def _steps(part: Any, name: str) -> list[dict[str, Any]]:
    """The states of a part of tokenizer.json, sequences laid out flat."""
    if part is None:
        return []
    pending, found = [json.loads(part.__getstate__())], []
    while pending:
        state = pending.pop()
        if state["type"] == "Sequence":
            pending += state[name]
        else:
            found.append(state)
    return found
