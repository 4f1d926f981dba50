"""Small tokenizers of every common kind, trained in milliseconds, and checkpoint folders of them.

Each builder returns a `tokenizers.Tokenizer` with the pipeline that public models of its kind ship.
"""

import json
from functools import cache
from pathlib import Path
from typing import Any

import tokenizers
from tokenizers import Regex, decoders, models, normalizers, pre_tokenizers, processors
from tokenizers.trainers import (
    BpeTrainer,
    UnigramTrainer,
    WordLevelTrainer,
    WordPieceTrainer,
)

CORPUS = [
    "Hello world, this is a small text about water wheels and mills.",
    "The headrace leads water to the wheel; the wheel turns the stone.",
    "def add(a, b):\n    return a + b  # 12 + 30 = 42\n",
    "Grüße aus München, déjà vu, naïve façade.",
    "你好世界,水车在转动。",
    "Emoji 🙂 and 👩‍👩‍👧 and flags 🇫🇷.",
    '<tool_call>{"name": "get", "arguments": {"x": 1}}</tool_call>',
] * 3
SPECIALS = ["<unk>", "<s>", "</s>", "<|im_start|>", "<|im_end|>"]
_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def byte_level_bpe() -> tokenizers.Tokenizer:
    """As GPT-4, Llama 3 and Qwen: split by a pattern, then bytes; no token starts a text."""
    tokenizer = tokenizers.Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(_SPLIT), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = BpeTrainer(
        vocab_size=500,
        special_tokens=SPECIALS[1:],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", tokenizer.token_to_id("<s>"))]
    )
    return tokenizer


def byte_fallback_bpe(strip: bool = True) -> tokenizers.Tokenizer:
    """As Llama 2 (`strip`) and Gemma: one word separator, bytes only for unknown characters."""
    tokenizer = tokenizers.Tokenizer(
        models.BPE(byte_fallback=True, unk_token="<unk>", fuse_unk=True)
    )
    tokenizer.normalizer = (
        normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
        if strip
        else normalizers.Replace(" ", "▁")
    )
    trainer = BpeTrainer(
        vocab_size=600,
        special_tokens=[*SPECIALS, *(f"<0x{byte:02X}>" for byte in range(256))],
        limit_alphabet=60,
        show_progress=False,
    )
    tokenizer.pre_tokenizer = pre_tokenizers.Split("▁", "merged_with_next")
    tokenizer.train_from_iterator(CORPUS, trainer)
    tokenizer.pre_tokenizer = None
    steps: list[Any] = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    tokenizer.decoder = decoders.Sequence(steps + [decoders.Strip(" ", 1, 0)] * strip)
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", tokenizer.token_to_id("<s>"))]
    )
    return _without_special_bytes(tokenizer)


def _without_special_bytes(tokenizer: tokenizers.Tokenizer) -> tokenizers.Tokenizer:
    """Byte tokens were made special so that the trainer keeps them; in real files they are not."""
    data = json.loads(tokenizer.to_str())
    data["added_tokens"] = [t for t in data["added_tokens"] if not t["content"].startswith("<0x")]
    return tokenizers.Tokenizer.from_str(json.dumps(data))


def metaspace_unigram() -> tokenizers.Tokenizer:
    """As T5 and XLM-R."""
    tokenizer = tokenizers.Tokenizer(models.Unigram())
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    trainer = UnigramTrainer(
        vocab_size=200, special_tokens=SPECIALS, unk_token="<unk>", show_progress=False
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single="$A </s>", special_tokens=[("</s>", tokenizer.token_to_id("</s>"))]
    )
    return tokenizer


def word_piece() -> tokenizers.Tokenizer:
    """As BERT."""
    tokenizer = tokenizers.Tokenizer(models.WordPiece(unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=True)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece()
    trainer = WordPieceTrainer(
        vocab_size=300, special_tokens=["[UNK]", "[CLS]", "[SEP]"], show_progress=False
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    ids = {name: tokenizer.token_to_id(name) for name in ("[CLS]", "[SEP]")}
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=list(ids.items())
    )
    return tokenizer


def word_level() -> tokenizers.Tokenizer:
    """Words, no decoder: tokens are joined by spaces."""
    tokenizer = tokenizers.Tokenizer(models.WordLevel(unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    trainer = WordLevelTrainer(special_tokens=SPECIALS, show_progress=False)
    tokenizer.train_from_iterator(CORPUS, trainer)
    return tokenizer


BUILDERS = {
    "byte_level": byte_level_bpe,
    "byte_fallback": byte_fallback_bpe,
    "byte_fallback_gemma": lambda: byte_fallback_bpe(strip=False),
    "metaspace": metaspace_unigram,
    "word_piece": word_piece,
    "word_level": word_level,
}


@cache
def serialized(kind: str) -> str:
    """tokenizer.json of one kind, trained once per test run."""
    return BUILDERS[kind]().to_str()


def backend(kind: str) -> tokenizers.Tokenizer:
    return tokenizers.Tokenizer.from_str(serialized(kind))


def write_checkpoint(folder: Path, kind: str, **files: dict[str, Any]) -> Path:
    """A folder with tokenizer.json and the given JSON files (`tokenizer_config={...}`)."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "tokenizer.json").write_text(serialized(kind), encoding="utf-8")
    for name, content in files.items():
        (folder / f"{name}.json").write_text(json.dumps(content), encoding="utf-8")
    return folder


def added(content: str, special: bool = True) -> dict[str, Any]:
    """A token as tokenizer_config.json writes it in `added_tokens_decoder`."""
    flags = {"lstrip": False, "rstrip": False, "normalized": False, "single_word": False}
    return {"content": content, "special": special, **flags}
