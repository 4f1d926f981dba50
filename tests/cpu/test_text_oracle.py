"""Tokenizers and chat templates against transformers, for checkpoint folders of common kinds."""

import json
import os
from pathlib import Path
from typing import Any

import pytest

os.environ["HF_HUB_OFFLINE"] = "1"
from jinja2 import TemplateError
from transformers import AutoTokenizer, LlamaTokenizer, PreTrainedTokenizerFast, Qwen2Tokenizer

from headrace.core.errors import BadRequest, LoadError
from headrace.text import chat
from headrace.text.chat import TemplateManager, builtin_names
from headrace.text.tokenizer import load_tokenizer
from tests.support import chat_templates
from tests.support.tokenizers import BUILDERS, added, backend, write_checkpoint

TEXTS = [
    "",
    " ",
    "Hello world",
    "  two  spaces\n\nand lines ",
    "Grüße 🙂 你好 👩‍👩‍👧",
    "a<|im_start|>user\nx<|im_end|> </s> <think>y</think>",
    "unseen: Ω≈ç√ \x00 \u200b",
]
LLAMA_CONFIG = {
    "tokenizer_class": "PreTrainedTokenizerFast",
    "bos_token": "<s>",
    "eos_token": "</s>",
    "model_max_length": 4096,
}
BERT_CONFIG = {"cls_token": "[CLS]", "sep_token": "[SEP]", "unk_token": "[UNK]"}
# Added tokens that tokenizer.json lacks, flags that differ from it, and a named token that is new.
EXTENDED_CONFIG = {
    **LLAMA_CONFIG,
    "added_tokens_decoder": {
        "9001": added("<think>", special=False),
        "9000": added("</think>", special=False),
        "2": added("<|im_start|>", special=False),
    },
    "eos_token": "<|new_end|>",
    "pad_token": "<|pad|>",
    "extra_special_tokens": ["<|extra|>"],
    "add_bos_token": False,
    "add_eos_token": True,
}
CONFIGS = {
    "llama": LLAMA_CONFIG,
    "extended": EXTENDED_CONFIG,
    "bos_switched_off": {**LLAMA_CONFIG, "add_bos_token": False},
    "serialized_bos": {
        "bos_token": {"__type": "AddedToken", "content": "<s>"},
        "eos_token": "</s>",
    },
    "bert": BERT_CONFIG,
}
CASES = [
    (kind, name)
    for kind in BUILDERS
    for name in CONFIGS
    if (kind == "word_piece") == (name == "bert")
]


@pytest.mark.parametrize(("kind", "config"), CASES)
def test_tokenizer_equals_transformers(tmp_path: Path, kind: str, config: str) -> None:
    folder = write_checkpoint(tmp_path, kind, tokenizer_config=CONFIGS[config])
    ours, theirs = load_tokenizer(folder), AutoTokenizer.from_pretrained(folder)
    assert ours.vocab_size == len(theirs)
    assert ours.bos_token_id == theirs.bos_token_id
    assert ours.eos_token_ids == tuple(i for i in [theirs.eos_token_id] if i is not None)
    for text in TEXTS:
        for special in (True, False):
            ids = ours.encode(text, add_special_tokens=special)
            assert ids == theirs.encode(text, add_special_tokens=special), text
            for skip in (True, False):
                expected = theirs.decode(ids, skip_special_tokens=skip)
                for spaces in (True, False):
                    assert ours.decode(ids, skip, spaces) == expected
    assert ours.encode_batch(TEXTS) == [ours.encode(text) for text in TEXTS]


@pytest.mark.parametrize("kind", sorted(BUILDERS))
def test_bytes_of_tokens_join_to_the_decoded_text(tmp_path: Path, kind: str) -> None:
    tokenizer = load_tokenizer(write_checkpoint(tmp_path, kind))
    for text in TEXTS:
        ids = tokenizer.encode(text, add_special_tokens=False)
        joined = b"".join(
            tokenizer.token_bytes(i) if n else tokenizer.first_token_bytes(i)
            for n, i in enumerate(ids)
        )
        assert joined.decode("utf-8", "replace") == tokenizer.decode(ids, skip_special_tokens=False)


def test_bytes_and_text_of_single_tokens(tmp_path: Path) -> None:
    byte_level = load_tokenizer(write_checkpoint(tmp_path / "a", "byte_level"))
    ids = byte_level.encode(" world龍", add_special_tokens=False)
    assert b"".join(map(byte_level.token_bytes, ids)) == " world龍".encode()
    assert [byte_level.token_text(i) for i in ids[:1]] == [" world"]
    assert byte_level.token_text(ids[-1]) == "\ufffd"
    fallback = load_tokenizer(write_checkpoint(tmp_path / "b", "byte_fallback"))
    ids = fallback.encode(" world龍", add_special_tokens=False)
    assert b"".join(map(fallback.token_bytes, ids)).endswith(" world龍".encode())
    assert [len(fallback.token_bytes(i)) for i in ids[-3:]] == [1, 1, 1]
    assert byte_level.token_bytes(10**6) == b""
    assert 0 in byte_level
    assert 10**6 not in byte_level
    assert -1 not in byte_level


def test_old_folder_layout(tmp_path: Path) -> None:
    """special_tokens_map.json counts only where tokenizer_config.json lists no added tokens."""
    token_map = {"eos_token": {"content": "<|im_end|>", "lstrip": False}, "bos_token": "<s>"}
    folder = write_checkpoint(
        tmp_path, "byte_level", tokenizer_config={"eos_token": "</s>"}, special_tokens_map=token_map
    )
    ours, theirs = load_tokenizer(folder), AutoTokenizer.from_pretrained(folder)
    assert ours.eos_token_ids == (theirs.eos_token_id,)
    assert ours.bos_token_id == theirs.bos_token_id


@pytest.mark.parametrize(
    ("generation", "config", "expected"),
    [
        ({"eos_token_id": [7, 8]}, {"eos_token_id": 9}, (1, 7, 8)),
        ({"eos_token_id": 1}, {}, (1,)),
        ({}, {"eos_token_id": 9}, (1, 9)),
        ({}, {"text_config": {"eos_token_id": [9]}}, (1, 9)),
        ({}, {}, (1,)),
    ],
)
def test_stop_ids_of_configs(tmp_path: Path, generation: Any, config: Any, expected: Any) -> None:
    folder = write_checkpoint(
        tmp_path,
        "byte_level",
        tokenizer_config=LLAMA_CONFIG,
        generation_config=generation,
        config=config,
    )
    assert load_tokenizer(folder).eos_token_ids == expected


def test_other_vocabulary_forms_go_through_transformers(tmp_path: Path) -> None:
    model = json.loads(backend("byte_level").to_str())["model"]
    merges = ["#version: 0.2", *(" ".join(pair) for pair in model["merges"])]
    (tmp_path / "vocab.json").write_text(json.dumps(model["vocab"]))
    (tmp_path / "merges.txt").write_text("\n".join(merges))
    config = {"tokenizer_class": "GPT2Tokenizer", "eos_token": "</s>", "bos_token": "<s>"}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    ours, theirs = load_tokenizer(tmp_path), AutoTokenizer.from_pretrained(tmp_path)
    assert ours.eos_token_ids == (theirs.eos_token_id,)
    assert [ours.encode(t) for t in TEXTS] == [theirs.encode(t) for t in TEXTS]


@pytest.mark.parametrize("saved_class", [LlamaTokenizer, Qwen2Tokenizer])
def test_folders_written_by_transformers(tmp_path: Path, saved_class: Any) -> None:
    kind = {"LlamaTokenizer": "byte_fallback", "Qwen2Tokenizer": "byte_level"}
    model = json.loads(backend(kind[saved_class.__name__]).to_str())["model"]
    merges = [tuple(pair) for pair in model["merges"]]
    special = {"bos_token": "<s>", "eos_token": "<|im_end|>", "pad_token": "</s>"}
    saved_class(vocab=model["vocab"], merges=merges, **special).save_pretrained(tmp_path)
    ours, theirs = load_tokenizer(tmp_path), AutoTokenizer.from_pretrained(tmp_path)
    assert type(theirs) is saved_class
    assert ours.eos_token_ids == (theirs.eos_token_id,)
    for text in TEXTS:
        assert ours.encode(text) == theirs.encode(text)
        assert ours.decode(ours.encode(text)) == theirs.decode(ours.encode(text), True)


def test_folders_without_a_readable_tokenizer(tmp_path: Path) -> None:
    with pytest.raises(LoadError, match=r"no tokenizer\.json"):
        load_tokenizer(tmp_path)
    (tmp_path / "tokenizer.model").write_text("not sentencepiece")
    with pytest.raises(LoadError, match=r"tokenizer\.model cannot be converted"):
        load_tokenizer(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(LoadError, match=r"tokenizer\.json cannot be read"):
        load_tokenizer(tmp_path)


def test_bad_input_is_a_bad_request(tmp_path: Path) -> None:
    tokenizer = load_tokenizer(write_checkpoint(tmp_path, "byte_level"))
    with pytest.raises(BadRequest, match="surrogate"):
        tokenizer.encode("a\ud800b")
    with pytest.raises(BadRequest, match=r"between 0 and 2\*\*32 - 1"):
        tokenizer.decode([-1])


TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "weather",
            "description": 'Tells the weather <now> & then, "quoted" déjà',
            "parameters": {"type": "object", "properties": {"city": {"type": "string"}}},
        },
    }
]
SYSTEM = {"role": "system", "content": " Be brief. "}
USER = {"role": "user", "content": "Weather in Köln? <&'\">"}
REASONING = {"role": "assistant", "content": "\n\nSure", "reasoning": "\nhm\n"}
CALL = {
    "role": "assistant",
    "content": None,
    "tool_calls": [
        {"type": "function", "function": {"name": "weather", "arguments": {"city": "Köln"}}}
    ],
}
RESULT = {"role": "tool", "content": '{"t": 21}'}
DIALOGS: dict[str, list[dict[str, Any]]] = {
    "one": [USER],
    "system": [SYSTEM, USER],
    "turns": [USER, {"role": "assistant", "content": "21 °C"}, USER],
    "tools": [SYSTEM, USER, CALL, RESULT, RESULT, REASONING],
    "two_users": [USER, USER],
    "unknown_role": [{"role": "root", "content": "x"}],
}
TEMPLATES = ["CHATML", "LLAMA3_TOOLS", "MISTRAL", "QWEN_TOOLS", "PARTS"]
OPTIONS: list[dict[str, Any]] = [
    {},
    {"add_generation_prompt": False},
    {"tools": TOOLS},
    {"enable_thinking": False, "date_string": "1 Jan 2030", "bos_token": "<other>"},
    {"continue_final_message": True, "add_generation_prompt": False},
]


@pytest.fixture(scope="module")
def both(tmp_path_factory: pytest.TempPathFactory):
    """Our manager and transformers' tokenizer for a template source."""
    made: dict[str, tuple[TemplateManager, PreTrainedTokenizerFast]] = {}

    def make(source: str) -> tuple[TemplateManager, PreTrainedTokenizerFast]:
        if source not in made:
            config = {**LLAMA_CONFIG, "image_token": "<img>", "chat_template": source}
            folder = write_checkpoint(
                tmp_path_factory.mktemp("chat"), "byte_level", tokenizer_config=config
            )
            theirs = PreTrainedTokenizerFast.from_pretrained(folder)
            made[source] = TemplateManager.load(folder), theirs
        return made[source]

    return make


@pytest.mark.parametrize("options", OPTIONS, ids=lambda options: "+".join(options) or "plain")
@pytest.mark.parametrize("dialog", sorted(DIALOGS))
@pytest.mark.parametrize("template", TEMPLATES)
def test_prompt_equals_transformers(both, template: str, dialog: str, options: Any) -> None:
    ours, theirs = both(getattr(chat_templates, template))
    options = {"add_generation_prompt": True, **options}
    try:
        expected = theirs.apply_chat_template(DIALOGS[dialog], tokenize=False, **options)
    except (TemplateError, TypeError, ValueError):  # whatever transformers refuses, we refuse
        with pytest.raises(BadRequest):
            ours.render(DIALOGS[dialog], **options)
    else:
        assert ours.render(DIALOGS[dialog], **options) == expected


def test_filters_and_globals_equal_transformers(both) -> None:
    ours, theirs = both(chat_templates.ODDITIES)
    for dialog in DIALOGS.values():
        expected = theirs.apply_chat_template(dialog, tokenize=False)
        assert ours.render(dialog, add_generation_prompt=False) == expected


@pytest.mark.parametrize("name", builtin_names())
def test_builtins_render_alike_in_transformers(both, tmp_path: Path, name: str) -> None:
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(LLAMA_CONFIG))
    ours = TemplateManager.load(tmp_path, name)
    source = (Path(chat.__file__).parent / "templates" / f"{name}.jinja").read_text()
    expected = both(source)[1].apply_chat_template(
        DIALOGS["turns"], tokenize=False, add_generation_prompt=True
    )
    assert ours.render(DIALOGS["turns"]) == expected


DEMO = Path(chat.__file__).parent.parent / "assets" / "demo"


def test_demo_model_equals_transformers() -> None:
    tokenizer, theirs = load_tokenizer(DEMO), AutoTokenizer.from_pretrained(DEMO)
    assert tokenizer.vocab_size == len(theirs)
    assert tokenizer.eos_token_ids[0] == theirs.eos_token_id
    for text in TEXTS:
        assert tokenizer.encode(text) == theirs.encode(text)
    templates = TemplateManager.load(DEMO)
    assert templates.supports_tools
    for name in ("one", "system", "turns", "tools"):
        for tools in (None, TOOLS):
            expected = theirs.apply_chat_template(
                DIALOGS[name], tools=tools, tokenize=False, add_generation_prompt=True
            )
            assert templates.render(DIALOGS[name], tools=tools) == expected


def test_template_files_take_precedence_alike(tmp_path: Path) -> None:
    folder = write_checkpoint(
        tmp_path, "byte_level", tokenizer_config={**LLAMA_CONFIG, "chat_template": "config"}
    )
    (folder / "chat_template.jinja").write_text("file {{ eos_token }}\n")
    (folder / "additional_chat_templates").mkdir()
    (folder / "additional_chat_templates" / "tool_use.jinja").write_text("tools")
    ours, theirs = TemplateManager.load(folder), PreTrainedTokenizerFast.from_pretrained(folder)
    for tools in (None, TOOLS):
        expected = theirs.apply_chat_template([USER], tools=tools, tokenize=False)
        assert ours.render([USER], tools=tools, add_generation_prompt=False) == expected
