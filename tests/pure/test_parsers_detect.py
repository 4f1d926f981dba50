"""Which dialects a chat template speaks, and that the flags take all names."""

import json

import pytest

from headrace.assets import demo_model_path
from headrace.core.config import Config
from headrace.core.errors import BadRequest
from headrace.core.parser_names import REASONING_PARSERS, TOOL_CALL_PARSERS
from headrace.text.parsers import REASONING, TOOL_DIALECTS, detect
from tests.support import chat_templates


def test_demo_model_speaks_hermes():
    config = json.loads((demo_model_path() / "tokenizer_config.json").read_text())
    assert detect(config["chat_template"]) == ("", "hermes")


@pytest.mark.parametrize(
    ("template", "found"),
    [
        (chat_templates.CHATML, ("", "")),
        (chat_templates.QWEN_TOOLS, ("qwen3", "hermes")),
        (chat_templates.LLAMA3_TOOLS, ("", "llama3")),
        (chat_templates.MISTRAL, ("", "")),
        ("{{ '[TOOL_CALLS]' + name + '[ARGS]' }}{{ '[THINK]' }}", ("mistral", "mistral")),
        (
            "<\uff5cAssistant\uff5c> </think> <\uff5ctool\u2581calls\u2581begin\uff5c> ```json",
            ("deepseek-r1", "deepseekv3"),
        ),
        (
            "{% if thinking %}<\uff5cAssistant\uff5c><think>{% else %}</think>{% endif %}"
            "<\uff5ctool\u2581calls\u2581begin\uff5c>",
            ("deepseek-v3", "deepseekv31"),
        ),
        ("[gMASK]<sop> </think> <tool_call> <arg_key> <arg_value>", ("glm45", "glm45")),
        ("<|im_middle|> <|tool_calls_section_begin|>", ("", "kimi_k2")),
        ("<|im_middle|> </think> <|tool_calls_section_begin|>", ("kimi_k2", "kimi_k2")),
        ("\u25c1think\u25b7", ("kimi", "")),
        (
            "<|start|>assistant<|channel|>analysis<|message|> <|constrain|> to=functions.",
            ("gpt-oss", "gpt-oss"),
        ),
        ("<tool_call>\n<function=example>\n<parameter=p>", ("", "qwen3_coder")),
        ("]~b]ai <think> </think> <minimax:tool_call>", ("minimax", "minimax-m2")),
        ("</think> <\uff5ctool_calls_begin\uff5c> <steptml:invoke name=", ("step3", "step3")),
        ("<|channel>thought <channel|> <|tool_call>call:", ("gemma4", "gemma4")),
        ("<start_function_call>call: <escape>", ("", "functiongemma")),
        ("<|header_start|> <|python_start|>", ("", "pythonic")),
        ("Here is my thought process: ... Here is my response:", ("granite", "")),
    ],
)
def test_templates(template, found):
    assert detect(template) == found


def test_flags_take_the_names_of_the_parsers():
    assert set(TOOL_CALL_PARSERS) == {"auto", "none", *TOOL_DIALECTS}
    assert set(REASONING_PARSERS) == {"auto", "none", *REASONING}
    with pytest.raises(BadRequest, match="--tool-call-parser must be one of auto, none"):
        Config.from_flat({"tool_call_parser": "klingon"})
