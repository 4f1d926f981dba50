"""tokenizer.json from tekken.json, Mistral's vocabulary of byte strings in the order of merging.

Ids are special tokens first, then ranks. Pairs of bytes are merged by the rank of what they become,
so the merges of a byte-level BPE follow from the ranks. Knows no weights.
"""

import base64
import binascii
from pathlib import Path
from typing import Any

from headrace.core.errors import LoadError

# Of files that do not list their own.
_CONTROL = [
    *("<unk>", "<s>", "</s>", "[INST]", "[/INST]", "[AVAILABLE_TOOLS]", "[/AVAILABLE_TOOLS]"),
    *("[TOOL_RESULTS]", "[/TOOL_RESULTS]", "[TOOL_CALLS]", "[IMG]", "<pad>", "[IMG_BREAK]"),
    *("[IMG_END]", "[PREFIX]", "[MIDDLE]", "[SUFFIX]", "[SYSTEM_PROMPT]", "[/SYSTEM_PROMPT]"),
    "[TOOL_CONTENT]",
]
_LEVEL = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": False, "use_regex": False}
_BOS, _EOS, _UNK, _PAD = "<s>", "</s>", "<unk>", "<pad>"


def tokenizer_of(tekken: dict[str, Any], path: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """(tokenizer.json, tokenizer_config.json).

    Raises:
        LoadError: the file is not what it should be.
    """
    try:
        config = tekken["config"]
        pattern, specials = config["pattern"], int(config["default_num_special_tokens"])
        kept = int(config["default_vocab_size"]) - specials
        names = _special_names(tekken.get("special_tokens"), specials)
        ranked = sorted(tekken["vocab"], key=lambda token: int(token["rank"]))[:kept]
        words = [base64.b64decode(token["token_bytes"], validate=True) for token in ranked]
    except (LookupError, TypeError, ValueError, AttributeError, binascii.Error) as error:
        raise LoadError(f"{path} is no vocabulary of Mistral's: {error!r}") from error
    if len(set(words)) != len(words) or not isinstance(pattern, str) or _BOS not in names:
        raise LoadError(f"{path}: a token is there twice, or the pattern or {_BOS} is missing")
    missing = set(range(256)) - {word[0] for word in words if len(word) == 1}
    if missing:
        raise LoadError(f"{path}: byte {min(missing)} is no token")
    return _tokenizer(pattern, names, words), {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": _BOS,
        "eos_token": _EOS,
        "unk_token": _UNK,
        **({"pad_token": _PAD} if _PAD in names else {}),
    }


def _special_names(listed: Any, count: int) -> list[str]:
    names = [f"<SPECIAL_{index}>" for index in range(count)]
    if listed is None:
        names[: len(_CONTROL)] = _CONTROL[:count]
    for token in listed or ():
        names[int(token["rank"])] = str(token["token_str"])
    return names


def _tokenizer(pattern: str, names: list[str], words: list[bytes]) -> dict[str, Any]:
    letters = _letters()
    texts = ["".join(letters[byte] for byte in word) for word in words]
    cut = {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}
    bos = names.index(_BOS)
    frame = [{"SpecialToken": {"id": _BOS, "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}]
    return {
        "version": "1.0",
        "added_tokens": [
            {
                "id": index,
                "content": name,
                "single_word": False,
                "lstrip": False,
                "rstrip": False,
                "normalized": False,
                "special": True,
            }
            for index, name in enumerate(names)
        ],
        "normalizer": None,
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": [cut, _LEVEL]},
        "post_processor": {
            "type": "TemplateProcessing",
            "single": frame,
            "pair": [*frame, {"Sequence": {"id": "B", "type_id": 0}}],
            "special_tokens": {_BOS: {"id": _BOS, "ids": [bos], "tokens": [_BOS]}},
        },
        "decoder": _LEVEL,
        "model": {
            "type": "BPE",
            "vocab": {text: index for index, text in enumerate([*names, *texts])},
            "merges": _merges(texts),
            "ignore_merges": True,
        },
    }


def _merges(texts: list[str]) -> list[list[str]]:
    """Each pair of tokens that is one, in the order of what it becomes."""
    ranks = {text: rank for rank, text in enumerate(texts)}
    return [
        [text[:at], text[at:]]
        for text in texts
        for at in sorted(
            (at for at in range(1, len(text)) if text[:at] in ranks and text[at:] in ranks),
            key=lambda at, text=text: (ranks[text[:at]], ranks[text[at:]]),  # type: ignore[misc]
        )
    ]


def _letters() -> dict[int, str]:
    """How byte-level BPE writes bytes as characters: those that print as themselves."""
    shown = [*range(33, 127), *range(161, 173), *range(174, 256)]
    hidden = [byte for byte in range(256) if byte not in set(shown)]
    return {byte: chr(byte) for byte in shown} | {
        byte: chr(256 + index) for index, byte in enumerate(hidden)
    }
