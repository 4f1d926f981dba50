"""Chat templates: sources, message forms, errors and limits. (Rendering: tests/cpu, oracle.)"""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from headrace.core.errors import BadRequest, LoadError
from headrace.text import template as template_module
from headrace.text.chat import TemplateManager, builtin_names
from tests.support import chat_templates

TOKENS = {"bos_token": "<s>", "eos_token": "</s>"}
DIALOG = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "Hi"},
    {"role": "assistant", "content": "Hello"},
    {"role": "user", "content": "2+2?"},
]


def manager(source: str) -> TemplateManager:
    return TemplateManager({"default": source}, TOKENS)


def write(folder: Path, files: dict[str, Any]) -> Path:
    for name, content in files.items():
        path = folder / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(content if isinstance(content, str) else json.dumps(content))
    return folder


USER = [{"role": "user", "content": "x"}]
CONFIG = "tokenizer_config.json"


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        ({CONFIG: {"chat_template": "config"}}, "config"),
        ({CONFIG: {"chat_template": [{"name": "default", "template": "named"}]}}, "named"),
        ({CONFIG: {"chat_template": {"default": "mapped"}}}, "mapped"),
        ({CONFIG: {"chat_template": "config"}, "chat_template.jinja": "file"}, "file"),
        ({"chat_template.json": {"chat_template": "legacy"}}, "legacy"),
        (
            {"chat_template.jinja": "file", "additional_chat_templates/rag.jinja": "rag"},
            "file",
        ),
        ({CONFIG: {"bos_token": {"content": "<b>"}, "chat_template": "{{ bos_token }}"}}, "<b>"),
        (
            {
                "special_tokens_map.json": {"bos_token": "<m>"},
                "chat_template.jinja": "{{ bos_token }}",
            },
            "<m>",
        ),
    ],
)
def test_sources_of_a_model_folder(tmp_path: Path, files: dict[str, Any], expected: str) -> None:
    assert TemplateManager.load(write(tmp_path, files)).render(USER) == expected


def test_named_templates(tmp_path: Path) -> None:
    pairs = [("default", "plain"), ("tool_use", "{{ tools | length }} tools"), ("rag", "rag")]
    named = [{"name": name, "template": source} for name, source in pairs]
    write(tmp_path, {CONFIG: {"chat_template": named}})
    loaded = TemplateManager.load(tmp_path)
    assert loaded.supports_tools
    assert loaded.render(USER) == "plain"
    assert loaded.render(USER, tools=[{"type": "function"}]) == "1 tools"
    assert TemplateManager.load(tmp_path, name="rag").render(USER, tools=[{}]) == "rag"
    with pytest.raises(LoadError, match=r"'nope'.*'default', 'rag', 'tool_use'"):
        TemplateManager.load(tmp_path, name="nope")


def test_override_by_file_or_builtin_name(tmp_path: Path) -> None:
    write(tmp_path, {"model/tokenizer_config.json": {"chat_template": "own"}, "my.jinja": "mine"})
    write(tmp_path, {"my.json": {"chat_template": "json"}})
    model = tmp_path / "model"
    assert TemplateManager.load(model, str(tmp_path / "my.jinja")).render(USER) == "mine"
    assert TemplateManager.load(model, str(tmp_path / "my.json")).render(USER) == "json"
    assert "<|im_start|>user\nx" in TemplateManager.load(model, "chatml").render(USER)
    with pytest.raises(LoadError, match="neither a file nor one of chatml, gemma"):
        TemplateManager.load(model, "missing")


def test_no_template(tmp_path: Path) -> None:
    empty = TemplateManager.load(tmp_path)
    assert not empty.has_template
    assert not empty.supports_tools
    assert empty.content_format == "string"
    with pytest.raises(BadRequest, match="--chat-template"):
        empty.render(USER)


BUILTIN_PROMPTS = {
    "chatml": (
        "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n"
        "<|im_start|>assistant\nHello<|im_end|>\n<|im_start|>user\n2+2?<|im_end|>\n"
        "<|im_start|>assistant\n"
    ),
    "gemma": (
        "<s><start_of_turn>user\nBe brief.\n\nHi<end_of_turn>\n<start_of_turn>model\n"
        "Hello<end_of_turn>\n<start_of_turn>user\n2+2?<end_of_turn>\n<start_of_turn>model\n"
    ),
    "llama-2": (
        "<s>[INST] <<SYS>>\nBe brief.\n<</SYS>>\n\nHi [/INST] Hello </s><s>[INST] 2+2? [/INST]"
    ),
    "llama-3": (
        "<s><|start_header_id|>system<|end_header_id|>\n\nBe brief.<|eot_id|>"
        "<|start_header_id|>user<|end_header_id|>\n\nHi<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\nHello<|eot_id|>"
        "<|start_header_id|>user<|end_header_id|>\n\n2+2?<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\n"
    ),
    "mistral": "<s>[INST] Be brief.\n\nHi [/INST] Hello</s>[INST] 2+2? [/INST]",
    "phi-3": (
        "<|system|>\nBe brief.<|end|>\n<|user|>\nHi<|end|>\n<|assistant|>\nHello<|end|>\n"
        "<|user|>\n2+2?<|end|>\n<|assistant|>\n"
    ),
    "vicuna": "<s>Be brief. USER: Hi ASSISTANT: Hello</s> USER: 2+2? ASSISTANT:",
    "zephyr": (
        "<|system|>\nBe brief.</s>\n<|user|>\nHi</s>\n<|assistant|>\nHello</s>\n"
        "<|user|>\n2+2?</s>\n<|assistant|>\n"
    ),
}


def test_every_builtin_has_a_known_prompt() -> None:
    assert builtin_names() == sorted(BUILTIN_PROMPTS)


@pytest.mark.parametrize("name", sorted(BUILTIN_PROMPTS))
def test_builtin_prompts(tmp_path: Path, name: str) -> None:
    write(tmp_path, {CONFIG: TOKENS})
    assert TemplateManager.load(tmp_path, name).render(DIALOG) == BUILTIN_PROMPTS[name]


@pytest.mark.parametrize("name", ["llama-2", "mistral", "gemma"])
def test_builtins_refuse_roles_out_of_order(tmp_path: Path, name: str) -> None:
    write(tmp_path, {CONFIG: TOKENS})
    with pytest.raises(BadRequest, match="must alternate") as caught:
        TemplateManager.load(tmp_path, name).render(USER * 2)
    assert caught.value.field == "messages"


@pytest.mark.parametrize(
    ("source", "content_format", "takes_string", "tools", "string_arguments"),
    [
        ("CHATML", "string", True, False, False),
        ("LLAMA3_TOOLS", "string", True, True, False),
        ("MISTRAL", "string", True, False, False),
        ("QWEN_TOOLS", "string", True, True, False),
        ("PARTS", "openai", True, False, False),
        ("PARTS_ONLY", "openai", False, False, False),
        ("TEXT_ARGUMENTS", "string", True, False, True),
    ],
)
def test_what_a_template_reads(
    source: str, content_format: str, takes_string: bool, tools: bool, string_arguments: bool
) -> None:
    template = template_module.ChatTemplate(getattr(chat_templates, source))
    assert template.content_format == content_format
    assert template.takes_string_content == takes_string
    assert template.supports_tools == tools
    assert template.string_arguments == string_arguments


@pytest.mark.parametrize(
    ("loop", "content_format"),
    [
        ("{% for p in m['content'] %}{% endfor %}", "openai"),
        ("{% for p in m.content | selectattr('type') %}{% endfor %}", "openai"),
        ("{% set c = m.content %}{% for p in c[1:] %}{% endfor %}", "openai"),
        ("{% for line in m.content.split('\n') %}{% endfor %}", "string"),
        ("{% set content = m.content.split('x') %}{% for c in content %}{% endfor %}", "string"),
        ("{% for call in m.tool_calls %}{% endfor %}", "string"),
    ],
)
def test_content_format_is_read_from_loops(loop: str, content_format: str) -> None:
    source = "{% for m in messages %}" + loop + "{% endfor %}"
    assert manager(source).content_format == content_format


PARTS = [{"type": "text", "text": "one"}, {"type": "text", "text": "two"}]


@pytest.mark.parametrize(
    ("source", "content", "expected"),
    [
        ("{{ messages[0].content }}", PARTS, "one two"),
        (chat_templates.PARTS_ONLY, PARTS, "user:one|two|"),
        (chat_templates.PARTS_ONLY, "one", "user:one|"),
        ("{{ 'content' in messages[0] }}", None, "False"),
    ],
)
def test_content_takes_the_form_the_template_reads(
    source: str, content: Any, expected: str
) -> None:
    assert manager(source).render([{"role": "user", "content": content}]) == expected


@pytest.mark.parametrize("arguments", ['{"x": "é"}', {"x": "é"}])
def test_tool_call_arguments_take_the_form_the_template_prints(arguments: Any) -> None:
    call = {"id": "1", "type": "function", "function": {"name": "f", "arguments": arguments}}
    messages = [{"role": "assistant", "content": "", "tool_calls": [call]}]
    text = manager(chat_templates.TEXT_ARGUMENTS).render(messages)
    json_text = manager("{{ messages[0].tool_calls[0].function.arguments | tojson }}")
    assert text == 'f\n```json\n{"x": "é"}\n```'
    assert json_text.render(messages) == '{"x": "é"}'
    assert call["function"]["arguments"] == arguments  # the caller's messages are not changed


@pytest.mark.parametrize(
    ("arguments", "shown"),
    [
        ('{"city": "Ro', '{"partial_json": "{\\"city\\": \\"Ro"}'),
        ("[1]", '{"partial_json": "[1]"}'),
        ("", "{}"),
        ("null", "{}"),
        ("[" * 100_000, '{"partial_json": "' + "[" * 100_000 + '"}'),
    ],
)
def test_broken_arguments_of_a_past_call_stay_readable(arguments: str, shown: str) -> None:
    messages = call_with(arguments)
    template = "{{ messages[0].tool_calls[0].function.arguments | tojson }}"
    assert manager(template).render(messages) == shown
    walked = (
        "{% for k, v in messages[0].tool_calls[0].function.arguments.items() %}{{ v }}{% endfor %}"
    )
    assert manager(walked).render(messages) == ("" if shown == "{}" else arguments)
    assert (
        manager(chat_templates.TEXT_ARGUMENTS)
        .render([{"role": "assistant", "content": "", "tool_calls": messages[0]["tool_calls"]}])
        .startswith("f\n```json\n" + arguments)
    )


def call_with(arguments: Any) -> list[dict[str, Any]]:
    return [
        {"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": arguments}}]}
    ]


@pytest.mark.parametrize(
    ("messages", "field", "sentence"),
    [
        ([], "messages", "at least one"),
        (["hi"], "messages[0]", "must be an object"),
        ([{"content": "x"}], "messages[0].role", "must be a string"),
        ([{"role": "user", "content": 3}], "messages[0].content", "string or a list of parts"),
        (
            [{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}],
            "messages[0].content[0].type",
            "'image_url'; this model reads only text",
        ),
        ([{"role": "user", "content": ["x"]}], "messages[0].content[0]", "object with a type"),
        (
            [{"role": "user", "content": [{"type": "text"}]}],
            "messages[0].content[0].text",
            "string",
        ),
        ([{"role": "user", "x": object()}], "messages[0]", "object, which is not JSON"),
        (
            [{"role": "assistant", "tool_calls": [3]}],
            "messages[0].tool_calls[0].function",
            "object",
        ),
    ],
)
def test_bad_messages_name_the_place(messages: Any, field: str, sentence: str) -> None:
    with pytest.raises(BadRequest, match=sentence) as caught:
        manager(chat_templates.CHATML).render(messages)
    assert caught.value.field == field


def test_nesting_is_limited() -> None:
    deep: Any = "x"
    for _ in range(100):
        deep = [deep]
    with pytest.raises(BadRequest, match="deeper than 64"):
        manager("").render([{"role": "user", "x": deep}])


@pytest.mark.parametrize(
    ("source", "sentence"),
    [
        ("{{ raise_exception('only users') }}", "refused the messages: only users"),
        ("{{ messages[0].missing.field }}", "do not have: .*missing"),
        ("{{ 1 + messages[0].content }}", "cannot use these messages: TypeError"),
        ("{{ 1 / 0 }}", "ZeroDivisionError"),
        ("{{ messages[0].missing | tojson }}", "not JSON serializable"),
        ("{{ 'a'.ljust(99999999) }}", "sandbox"),
        ("{{ 'a'|center(99999999) }}", "sandbox"),
        ("{{ ('a' * 9999)|replace('a', 'b' * 9999) }}", "sandbox"),
        ("{{ ('a' * 9999).replace('a', 'b' * 9999) }}", "sandbox"),
        ("{{ ['a' * 9999999, 'b' * 9999999]|join }}", "sandbox"),
        ("{{ [1, 2, 3]|map('string')|map('center', 8888888)|join }}", "sandbox"),
        ("{{ '%99999999d' % 1 }}", "sandbox"),
        ("{{ '%*d' % (99999999, 1) }}", "sandbox"),
        ("{{ '{:99999999}'.format(1) }}", "sandbox"),
        ("{{ '{:{w}}'.format(1, w=99999999) }}", "sandbox"),
        ("{{ '%99999999d'|format(1) }}", "sandbox"),
        ("{{ 'a'|indent(99999999, true) }}", "sandbox"),
        ("{{ ('\\t' * 99999).expandtabs(99999) }}", "sandbox"),
        ("{{ messages.append(1) }}", "sandbox"),
        ("{{ messages.__class__.__mro__ }}", "sandbox"),
        ("{{ dict.mro() }}", "do not have|sandbox"),
        ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "RecursionError"),
        ("{% for i in range(10**9) %}{% endfor %}", "Range too big"),
    ],
)
def test_template_errors_are_bad_requests(source: str, sentence: str) -> None:
    with pytest.raises(BadRequest, match=sentence) as caught:
        manager(source).render(USER)
    assert caught.value.field == "messages"


def test_broken_template_names_its_line() -> None:
    with pytest.raises(LoadError, match="line 2"):
        manager("ok\n{% if %}")


def test_sizes_are_limited(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(LoadError, match="limit is 1048576"):
        manager("x" * (1 << 20) + "x")
    monkeypatch.setattr(template_module, "MAX_PROMPT_CHARS", 1000)
    with pytest.raises(BadRequest, match="more than 1000 characters"):
        manager("{% for i in range(99999) %}{{ messages[0].content }}{% endfor %}").render(USER)


@pytest.mark.parametrize(
    "source",
    [
        "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}",
        "{% for i in range(99999) %}{% for m in messages %}{% set a = m.role %}{% endfor %}"
        "{% endfor %}",
        "{% macro f() %}{% for i in range(9999) %}{{ i }}{% endfor %}{% endmacro %}"
        "{% for i in range(99999) %}{% set x = f() %}{% endfor %}",
        "{% set r = range(9999) %}{% for i in r %}{% for j in r %}{% endfor %}{% endfor %}",
        "{% set r = range(9999) %}{% for i in r %}{% for j in r if false %}{% endfor %}"
        "{% endfor %}",
        "{% set r = range(9999) %}{% for i in r %}{% for j in r %}{% if j < 0 %}{% break %}"
        "{% endif %}{% continue %}{% endfor %}{% else %}{% endfor %}",
        "{% set r = range(9999) %}{% for i in r recursive %}{% if loop.depth < 9 %}{{ loop(r) }}"
        "{% endif %}{% endfor %}",
    ],
)
def test_time_is_limited(source, monkeypatch):
    monkeypatch.setattr(template_module, "MAX_RENDER_SECONDS", 0.05)
    with pytest.raises(BadRequest, match="took more than"):
        manager(source).render(USER)
    monkeypatch.undo()
    with template_module.patience(0.05), pytest.raises(template_module.TakesLong):
        manager(source).render(USER)
    assert manager("{{ messages[0].content }}").render(USER) == "x", "patience is back"


DOUBLE = "{{% set n = namespace(s='aaaa') %}}{{% for i in range(99) %}}{}{{% endfor %}}"


@pytest.mark.parametrize(
    "source",
    [
        "{{ 'a' * 10 ** 9 }}",
        "{{ 2 ** 10000000 }}",
        DOUBLE.format("{% set n.s = n.s ~ n.s %}"),
        DOUBLE.format("{% set n.s = n.s + n.s %}"),
    ],
)
def test_operators_are_limited(source):
    with pytest.raises(BadRequest, match="sandbox"):
        manager(source).render(USER)
    plain = "{{ '=' * 3 }}{{ 2 ** 3 }}{{ 2 * 1.5 }}{{ 1 + 2 }}{{ 'a' + 'b' }}{{ 1 ~ none ~ x }}|"
    assert manager(plain).render(USER) == "===83.03ab1None|"


def test_text_loads_neither_torch_nor_transformers() -> None:
    code = (
        "import sys, headrace.text.chat, headrace.text.stop, headrace.text.tokenizer;"
        "print(sorted({'torch', 'transformers', 'numpy'} & set(sys.modules)))"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout == "[]\n"


def test_a_mark_that_the_template_prints_twice_leaves_no_trace() -> None:
    twice = manager("{{ messages[-1].content }}|{{ messages[-1].content | trim }}|")
    messages = [{"role": "assistant", "content": "a "}]
    assert twice.render(messages, continue_final_message=True) == "a |a"


def test_continue_final_message() -> None:
    messages = [{"role": "user", "content": "Count"}, {"role": "assistant", "content": "1, 2,  "}]
    chatml = manager(chat_templates.CHATML)
    assert chatml.render(messages, continue_final_message=True).endswith("assistant\n1, 2,  ")
    parts = [messages[0], {"role": "assistant", "content": PARTS}]
    assert manager(chat_templates.PARTS).render(parts, continue_final_message=True).endswith("two")
    for bad, source in ((messages[:0], ""), (messages, "x"), ([{"role": "user"}], "")):
        with pytest.raises(BadRequest):
            manager(source).render(bad, continue_final_message=True)
    with pytest.raises(BadRequest, match="exclude each other"):
        chatml.render(messages, continue_final_message=True, add_generation_prompt=True)
