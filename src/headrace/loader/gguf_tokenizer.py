"""tokenizer.json and its configuration from the metadata of a GGUF file.

Two kinds: "gpt2", byte-level BPE with merges, whose way to cut text into words has a name; and
"llama", sentencepiece's BPE, whose merges follow from the scores of its pieces. Knows no weights.
"""

from typing import Any

from headrace.core.errors import LoadError
from headrace.loader.gguf import GgufFile

_NORMAL, _UNKNOWN, _CONTROL, _USER, _UNUSED, _BYTE = 1, 2, 3, 4, 5, 6
_SPACE = "\u2581"

# How words are cut, by tokenizer.ggml.pre, as the tokenizer.json of the models has it.
_GPT2 = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
_LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_WORDS = {
    "default": _GPT2,
    "gpt-2": _GPT2,
    "llama-bpe": _LLAMA3,
    "llama3": _LLAMA3,
    "smaug-bpe": _LLAMA3,
    "qwen2": _LLAMA3.replace(r"\p{N}{1,3}", r"\p{N}"),
}


def tokenizer_of(file: GgufFile) -> tuple[dict[str, Any], dict[str, Any]]:
    """(tokenizer.json, tokenizer_config.json).

    Raises:
        LoadError: the file has no tokenizer, or one of an unknown kind.
    """
    kind = file.metadata.get("tokenizer.ggml.model")
    tokens = file.metadata.get("tokenizer.ggml.tokens")
    if kind not in ("gpt2", "llama") or not isinstance(tokens, list):
        raise LoadError(f"{file.path}: tokenizers of kind {kind!r} are not supported: gpt2, llama")
    types = file.metadata.get("tokenizer.ggml.token_type") or [_NORMAL] * len(tokens)
    if len(types) != len(tokens) or len(set(tokens)) != len(tokens):
        raise LoadError(
            f"{file.path}: tokens and their types do not fit, or a token is there twice"
        )
    made = _byte_level(file, tokens) if kind == "gpt2" else _pieces(file, tokens)
    made |= {"version": "1.0", "added_tokens": _added(tokens, types)}
    made["post_processor"] = _frame(file, tokens, made["post_processor"], bos=kind == "llama")
    return made, _config(file, tokens)


def _byte_level(file: GgufFile, tokens: list[str]) -> dict[str, Any]:
    pre = str(file.metadata.get("tokenizer.ggml.pre", "default"))
    if pre not in _WORDS:
        raise LoadError(
            f"{file.path}: words cut as {pre!r} are not supported; known: {', '.join(_WORDS)}",
            field="tokenizer.ggml.pre",
        )
    merges = file.metadata.get("tokenizer.ggml.merges") or []
    level = {
        "type": "ByteLevel",
        "add_prefix_space": False,
        "trim_offsets": False,
        "use_regex": False,
    }
    cut = {
        "type": "Split",
        "pattern": {"Regex": _WORDS[pre]},
        "behavior": "Isolated",
        "invert": False,
    }
    return {
        "normalizer": {"type": "NFC"} if pre == "qwen2" else None,
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": [cut, level]},
        "post_processor": level,
        "decoder": level,
        "model": {
            "type": "BPE",
            "vocab": {token: index for index, token in enumerate(tokens)},
            "merges": [merge.split(" ", 1) for merge in merges],
            "ignore_merges": pre.startswith("llama"),
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


def _added(tokens: list[str], types: list[int]) -> list[dict[str, Any]]:
    return [
        {
            "id": index,
            "content": token,
            "single_word": False,
            "lstrip": False,
            "rstrip": False,
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
