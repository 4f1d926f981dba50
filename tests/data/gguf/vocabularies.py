"""Tokenizers of the models here, trained on a few lines: byte-level BPE and sentencepiece."""

import io
import json
from pathlib import Path

SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|user|>"]
SPECIAL += ["<|observation|>", "[gMASK]"]
USER = ["<tool>", "<path>"]
SIZE = 320
LINES = [
    "the cat sat on the mat and the dog ran to the tree in the garden",
    "def add(one, two):\n    return one + two  # sum\n\n\tprint(add(12, 345))",
    "It's 2024, isn't it? They'll see we've 100 things I'd do.",
    "HELLO World THE END of things, and then other things are there.",
]


def write_bpe(folder: Path, size: int = SIZE, lines: list[str] = LINES) -> None:
    """Its merges cross what would be words: how a text is cut into those shows."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=size - len(SPECIAL) - len(USER),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(lines, trainer)
    tokenizer.add_special_tokens(SPECIAL)
    tokenizer.add_tokens(USER)
    assert tokenizer.get_vocab_size() == size, tokenizer.get_vocab_size()
    made = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token=SPECIAL[0], eos_token=SPECIAL[2], pad_token=SPECIAL[0]
    )
    made.save_pretrained(folder)


def write_pieces(folder: Path, size: int = SIZE, lines: list[str] = LINES) -> None:
    import sentencepiece

    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(lines),
        model_writer=model,
        model_type="bpe",
        vocab_size=size,
        byte_fallback=True,
        character_coverage=1.0,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        user_defined_symbols=USER,
        control_symbols=SPECIAL,
        hard_vocab_limit=True,
        minloglevel=2,
    )
    (folder / "tokenizer.model").write_bytes(model.getvalue())
    config = {
        "tokenizer_class": "LlamaTokenizer",
        "bos_token": "<s>",
        "eos_token": "</s>",
        "unk_token": "<unk>",
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
