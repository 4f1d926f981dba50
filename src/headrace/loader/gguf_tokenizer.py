"""tokenizer.json and its configuration from the metadata of a GGUF file.

Two kinds: "gpt2", byte-level BPE with merges, whose way to cut text into words has a name; and
"llama", sentencepiece's BPE, whose merges follow from the scores of its pieces. Knows no weights.
"""

from typing import Any

from headrace.core.errors import LoadError
from headrace.loader.gguf import GgufFile
from headrace.loader.gguf_words import WORDS, Words

_NORMAL, _UNKNOWN, _CONTROL, _USER, _UNUSED, _BYTE = 1, 2, 3, 4, 5, 6
_SPACE = "\u2581"
_PHI3_PLAIN = ("<unk>", "<s>", "<|endoftext|>")


def tokenizer_of(file: GgufFile) -> tuple[dict[str, Any], dict[str, Any]]:
    """(tokenizer.json, tokenizer_config.json).

    Raises:
        LoadError: the file has no tokenizer, or one of an unknown kind.
    """
    kind = file.metadata.get("tokenizer.ggml.model")
    tokens = file.metadata.get("tokenizer.ggml.tokens")
    if kind not in ("gpt2", "llama") or not isinstance(tokens, list):
        raise LoadError(
            f"{file.path}: tokenizers of kind {kind!r} are not supported; known: gpt2, llama",
            field="tokenizer.ggml.model",
        )
    types = file.metadata.get("tokenizer.ggml.token_type") or [_NORMAL] * len(tokens)
    if len(types) != len(tokens) or len(set(tokens)) != len(tokens):
        raise LoadError(
            f"{file.path}: tokens and their types do not fit, or a token is there twice"
        )
    words = _words(file) if kind == "gpt2" else None
    made = _byte_level(file, tokens, words) if words else _pieces(file, tokens)
    made |= {"version": "1.0", "added_tokens": _added(file, tokens, types)}
    bos = words.bos if words else True
    made["post_processor"] = _frame(file, tokens, made["post_processor"], bos=bos)
    return made, _config(file, tokens)


def _words(file: GgufFile) -> Words:
    pre = str(file.metadata.get("tokenizer.ggml.pre", "default"))
    if pre not in WORDS:
        raise LoadError(
            f"{file.path}: words cut as {pre!r} are not supported; known: {', '.join(WORDS)}",
            field="tokenizer.ggml.pre",
        )
    return WORDS[pre]


def _byte_level(file: GgufFile, tokens: list[str], words: Words) -> dict[str, Any]:
    merges = file.metadata.get("tokenizer.ggml.merges") or []
    level = {
        "type": "ByteLevel",
        "add_prefix_space": False,
        "trim_offsets": False,
        "use_regex": False,
    }
    cuts = [
        {
            "type": "Split",
            "pattern": {"Regex": pattern},
            "behavior": "Isolated",
            "invert": False,
        }
        for pattern in words.patterns
    ]
    return {
        "normalizer": {"type": "NFC"} if words.composed else None,
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": [*cuts, level]},
        "post_processor": level,
        "decoder": level,
        "model": {
            "type": "BPE",
            "vocab": {token: index for index, token in enumerate(tokens)},
            "merges": [merge.split(" ", 1) for merge in merges],
            "ignore_merges": words.whole,
        },
    }


def _pieces(file: GgufFile, tokens: list[str]) -> dict[str, Any]:
    scores = file.metadata.get("tokenizer.ggml.scores") or []
    if len(scores) != len(tokens):
        raise LoadError(f"{file.path}: tokenizer.ggml.scores must have one number for each token")
    unknown = file.metadata.get("tokenizer.ggml.unknown_token_id", 0)
    prefix = bool(file.metadata.get("tokenizer.ggml.add_space_prefix", True))
    space = [{"type": "Prepend", "prepend": _SPACE}] if prefix else []
    replace = {"type": "Replace", "pattern": {"String": " "}, "content": _SPACE}
    strip = [{"type": "Strip", "content": " ", "start": 1, "stop": 0}] if prefix else []
    back = {"type": "Replace", "pattern": {"String": _SPACE}, "content": " "}
    return {
        "normalizer": {"type": "Sequence", "normalizers": [*space, replace]},
        "pre_tokenizer": None,
        "post_processor": None,
        "decoder": {
            "type": "Sequence",
            "decoders": [back, {"type": "ByteFallback"}, {"type": "Fuse"}, *strip],
        },
        "model": {
            "type": "BPE",
            "vocab": {token: index for index, token in enumerate(tokens)},
            "merges": _merges(tokens, scores),
            "unk_token": tokens[unknown],
            "fuse_unk": True,
            "byte_fallback": True,
        },
    }


def _merges(tokens: list[str], scores: list[float]) -> list[list[str]]:
    """Each piece that two others make, the best score first, as sentencepiece merges them."""
    ids = {token: index for index, token in enumerate(tokens)}
    found = [
        (-scores[index], ids[token[:at]], ids[token[at:]], token[:at], token[at:])
        for index, token in enumerate(tokens)
        for at in range(1, len(token))
        if token[:at] in ids and token[at:] in ids
    ]
    return [[left, right] for *_, left, right in sorted(found)]


def _added(file: GgufFile, tokens: list[str], types: list[int]) -> list[dict[str, Any]]:
    """Special ones of Phi-3 take the spaces behind them; only the model's name says so."""
    name = str(file.metadata.get("general.name", "")).lower()
    phi3 = "phi-3" in name or "phi3" in name
    return [
        {
            "id": index,
            "content": token,
            "single_word": False,
            "lstrip": False,
            "rstrip": phi3 and token not in _PHI3_PLAIN,
            "normalized": False,
            "special": kind in (_CONTROL, _UNKNOWN),
        }
        for index, (token, kind) in enumerate(zip(tokens, types, strict=True))
        if kind in (_CONTROL, _USER, _UNKNOWN)
    ]


def _frame(file: GgufFile, tokens: list[str], own: Any, *, bos: bool) -> Any:
    """Tokens around a text, after the post-processor of the kind."""
    meta, around = file.metadata, [{"Sequence": {"id": "A", "type_id": 0}}]
    special: dict[str, Any] = {}
    for name, default in (("bos", bos), ("eos", False)):
        index = meta.get(f"tokenizer.ggml.{name}_token_id")
        if not meta.get(f"tokenizer.ggml.add_{name}_token", default) or not isinstance(index, int):
            continue
        token = tokens[index]
        special[token] = {"id": token, "ids": [index], "tokens": [token]}
        entry = {"SpecialToken": {"id": token, "type_id": 0}}
        around = [entry, *around] if name == "bos" else [*around, entry]
    if not special:
        return own
    frame = {
        "type": "TemplateProcessing",
        "single": around,
        "pair": around,
        "special_tokens": special,
    }
    return {"type": "Sequence", "processors": [own, frame]} if own else frame


def _config(file: GgufFile, tokens: list[str]) -> dict[str, Any]:
    found: dict[str, Any] = {"tokenizer_class": "PreTrainedTokenizerFast"}
    for ours, theirs in (("bos", "bos"), ("eos", "eos"), ("pad", "padding"), ("unk", "unknown")):
        index = file.metadata.get(f"tokenizer.ggml.{theirs}_token_id")
        if isinstance(index, int) and 0 <= index < len(tokens):
            found[f"{ours}_token"] = tokens[index]
    template = file.metadata.get("tokenizer.chat_template")
    if isinstance(template, str):
        found["chat_template"] = template
    return found
