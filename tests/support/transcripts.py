"""What models of every family write, in the format of their published chat templates, and what a
parser must make of it.

`events` are (kind, text) in order, neighbors of one kind joined; a call is
("call", "name id arguments").
"""

from typing import Any, NamedTuple

TOOLS: list[dict[str, Any]] = [
    {
        "type": "function",
        "function": {
            "name": "get_weather",
            "parameters": {
                "type": "object",
                "properties": {
                    "city": {"type": "string"},
                    "days": {"type": "integer"},
                    "exact": {"type": "boolean"},
                    "tags": {"type": "array", "items": {"type": "string"}},
                    "near": {"anyOf": [{"type": "object"}, {"type": "null"}]},
                },
                "required": ["city"],
            },
        },
    },
    {"type": "function", "function": {"name": "now"}},
]


class Transcript(NamedTuple):
    name: str
    reasoning: str
    tools: str
    text: str
    events: list[tuple[str, str]]
    opened: bool | None = None


def call(arguments: str, name: str = "get_weather", id: str = "") -> tuple[str, str]:
    return ("call", f"{name} {id} {arguments}")


PARIS = '{"city": "Paris", "days": 3}'
NOW = call("{}", "now")
_B, _E = "<\uff5ctool\u2581calls\u2581begin\uff5c>", "<\uff5ctool\u2581calls\u2581end\uff5c>"
_b, _e = "<\uff5ctool\u2581call\u2581begin\uff5c>", "<\uff5ctool\u2581call\u2581end\uff5c>"
_s = "<\uff5ctool\u2581sep\uff5c>"
_S = "<\uff5ctool_sep\uff5c>"

TRANSCRIPTS = [
    Transcript(
        "hermes",
        "",
        "hermes",
        'Let me look.\n<tool_call>\n{"name": "get_weather", "arguments": ' + PARIS + "}\n"
        '</tool_call>\n<tool_call>\n{"name": "now", "arguments": {}}\n</tool_call>',
        [("content", "Let me look."), call(PARIS), NOW],
    ),
    Transcript(
        "hermes-text-around",
        "",
        "qwen25",
        '{"a": 1} < <tool <tool_call>{"arguments": {}, "name": "now"}</tool_call>\n\nDone.\n',
        [("content", '{"a": 1} < <tool'), NOW, ("content", "\n\nDone.\n")],
    ),
    Transcript(
        "hermes-strings",
        "",
        "hermes",
        '<tool_call>{"name": "get_weather", "arguments": '
        '{"city": "a\\"}</tool_call>\\u00e9\nb", "x": [-1.5e+3, null, {"y": true}]}}</tool_call>',
        [call('{"city": "a\\"}</tool_call>\\u00e9\\nb", "x": [-1.5e+3, null, {"y": true}]}')],
    ),
    Transcript(
        "hermes-arguments-as-text",
        "",
        "hermes",
        '<tool_call>{"name": "now", "arguments": "{\\"a\\": 1}", "id": 3}</tool_call>'
        '<tool_call>{"name": "now", "arguments": null}</tool_call>'
        '<tool_call>{"name": "now"}</tool_call>',
        [call('{"a": 1}', "now"), NOW, NOW],
    ),
    Transcript(
        "hermes-unclosed",
        "",
        "hermes",
        '<tool_call>{"name": "now", "arguments": {}</tool_call><tool_call>'
        '{"name": "other.tool", "arguments": {}}',
        [NOW, call("{}", "other.tool")],
    ),
    Transcript(
        "hermes-no-calls",
        "",
        "hermes",
        "<tool_call>oops</tool_call> <tool_call>[1]</tool_call>\n<tool_call>\n"
        '{"name": 5, "arguments": {}}</tool_call>',
        [
            (
                "content",
                "<tool_call>oops</tool_call> <tool_call>[1]</tool_call>\n<tool_call>\n"
                '{"name": 5, "arguments": {}}</tool_call>',
            )
        ],
    ),
    Transcript(
        "hermes-wrong-arguments",
        "",
        "hermes",
        '<tool_call>{"name": "now", "arguments": {"a": tru, 01}}</tool_call>',
        [call('{"a": tru', "now"), ("content", ", 01}}</tool_call>")],
    ),
    Transcript(
        "hermes-cut-off",
        "",
        "hermes",
        '<tool_call>{"name": "get_weather", "arguments": {"city": "Pa',
        [call('{"city": "Pa')],
    ),
    Transcript(
        "llama3",
        "",
        "llama3",
        '{"name": "get_weather", "parameters": ' + PARIS + "}; "
        '{"type": "function", "name": "now", "parameters": {}}',
        [call(PARIS), NOW],
    ),
    Transcript(
        "llama3-tag",
        "",
        "llama3",
        'Sure.\n<|python_tag|>{"name": "now", "parameters": {}} bye',
        [("content", "Sure."), NOW, ("content", " bye")],
    ),
    Transcript(
        "llama3-plain-json",
        "",
        "llama3",
        ' {"name": "Bob", "parameters": {}} {"name": "now", "parameters": {}}',
        [("content", ' {"name": "Bob", "parameters": {}} {"name": "now", "parameters": {}}')],
    ),
    Transcript(
        "json-list",
        "",
        "json",
        '[{"name": "get_weather", "parameters": ' + PARIS + "},\n"
        ' {"name": "now", "parameters": {}}]\n',
        [call(PARIS), NOW],
    ),
    Transcript(
        "mistral-v3",
        "",
        "mistral",
        '[TOOL_CALLS] [{"name": "get_weather", "arguments": ' + PARIS + "}, "
        '{"name": "now", "arguments": {}}]',
        [call(PARIS), NOW],
    ),
    Transcript(
        "mistral-v11",
        "mistral",
        "mistral",
        "[THINK]Which city?[/THINK]Yes.[TOOL_CALLS]get_weather[CALL_ID]a1B2c3D4e[ARGS]"
        + PARIS
        + "[TOOL_CALLS]now[ARGS]{}",
        [
            ("reasoning", "Which city?"),
            ("content", "Yes."),
            call(PARIS, id="a1B2c3D4e"),
            NOW,
        ],
    ),
    Transcript("mistral-bare", "", "mistral", "[TOOL_CALLS]now{}", [NOW]),
    Transcript(
        "deepseekv3",
        "deepseek-r1",
        "deepseekv3",
        f"Hm.\n</think>\n\n{_B}{_b}function{_s}get_weather\n```json\n{PARIS}\n```{_e}\n"
        f"{_b}function{_s}now\n```json\n{{}}\n```{_e}{_E}",
        [("reasoning", "Hm."), call(PARIS), NOW],
    ),
    Transcript(
        "deepseekv31",
        "deepseek-v3",
        "deepseekv31",
        f"I look.{_B}{_b}get_weather{_s}{PARIS}{_e}{_b}now{_s}{{}}{_e}{_E}",
        [("content", "I look."), call(PARIS), NOW],
    ),
    Transcript(
        "deepseek-calls-while-thinking",
        "deepseek-r1",
        "deepseekv31",
        f"<think>\nI call\n{_B}{_b}now{_s}{{}}{_e}{_E}",
        [("reasoning", "I call"), NOW],
    ),
    Transcript(
        "kimi_k2",
        "kimi_k2",
        "kimi_k2",
        "<think>Two</think><|tool_calls_section_begin|><|tool_call_begin|>functions.get_weather:0"
        f"<|tool_call_argument_begin|>{PARIS}<|tool_call_end|><|tool_call_begin|>functions.now:1 "
        "<|tool_call_argument_begin|>{}<|tool_call_end|><|tool_calls_section_end|>",
        [
            ("reasoning", "Two"),
            call(PARIS, id="functions.get_weather:0"),
            call("{}", "now", "functions.now:1"),
        ],
    ),
    Transcript(
        "kimi",
        "kimi",
        "",
        "\u25c1think\u25b7a\nb\u25c1/think\u25b7Done",
        [("reasoning", "a\nb"), ("content", "Done")],
    ),
    Transcript(
        "qwen3_coder",
        "",
        "qwen3_coder",
        "Now:\n\n<tool_call>\n<function=get_weather>\n<parameter=city>\n\n"
        'Pa"r</p\n<is>\n\n</parameter>\n<parameter=days>\n3\n</parameter>\n<parameter=tags>\n'
        '["a", 1]\n</parameter>\n<parameter=exact>\nTrue\n</parameter>\n<parameter=near>\n'
        "null\n</parameter>\n<parameter=more>\nany text\n</parameter>\n</function>\n</tool_call>\n"
        "<tool_call>\n<function=now>\n</function>\n</tool_call>",
        [
            ("content", "Now:"),
            call(
                '{"city": "\\nPa\\"r</p\\n<is>\\n", "days": 3, "tags": ["a", 1], "exact": true, '
                '"near": null, "more": "any text"}'
            ),
            NOW,
        ],
    ),
    Transcript(
        "qwen3_coder-without-opening",
        "",
        "qwen3_coder",
        "<function=now>\n</function>\n</tool_call>\n",
        [NOW],
    ),
    Transcript(
        "qwen3_coder-cut-off",
        "",
        "qwen3_coder",
        "<tool_call>\n<function=get_weather>\n<parameter=days>\n3\n</parameter>\n"
        "<parameter=tags>\n[1",
        [call('{"days": 3'), ("content", "\n<parameter=tags>\n[1")],
    ),
    Transcript(
        "glm45",
        "glm45",
        "glm45",
        "\n<think>Weather.</think>\nLook:\n<tool_call>get_weather\n<arg_key>city</arg_key>\n"
        "<arg_value>Paris</arg_value>\n<arg_key>days</arg_key>\n<arg_value>3</arg_value>\n"
        "</tool_call>\n<tool_call>now\n</tool_call>",
        [("reasoning", "Weather."), ("content", "Look:"), call(PARIS), NOW],
    ),
    Transcript(
        "glm47",
        "",
        "glm47",
        "<tool_call>get_weather<arg_key>near</arg_key><arg_value>{}</arg_value></tool_call>",
        [call('{"near": {}}')],
    ),
    Transcript(
        "minimax-m2",
        "minimax",
        "minimax-m2",
        'So.\n</think>\n\n<minimax:tool_call>\n<invoke name="get_weather">\n'
        '<parameter name="city">Paris</parameter>\n<parameter name="days">3</parameter>\n'
        '</invoke>\n<invoke name="now">\n</invoke>\n</minimax:tool_call>',
        [("reasoning", "So."), call(PARIS), NOW],
    ),
    Transcript(
        "step3",
        "step3",
        "step3",
        f"x</think><\uff5ctool_calls_begin\uff5c>\n<\uff5ctool_call_begin\uff5c>function{_S}"
        '<steptml:invoke name="get_weather">\n<steptml:parameter name="city">Paris'
        '</steptml:parameter>\n<steptml:parameter name="days">3</steptml:parameter>\n'
        "</steptml:invoke><\uff5ctool_call_end\uff5c>\n<\uff5ctool_calls_end\uff5c>",
        [("reasoning", "x"), call(PARIS)],
    ),
    Transcript(
        "gemma4",
        "gemma4",
        "gemma",
        "<|channel>thought\nHm, <channel|><|tool_call>call:get_weather{city:"
        '<|"|>Pa{"r,is<|"|>,days:3,tags:[<|"|>a<|"|>,b],near:{x:-1.5,y:null},more:[],z:{}}'
        "<tool_call|><|tool_call>call:now{}<tool_call|>",
        [
            ("reasoning", "Hm, "),
            call(
                '{"city": "Pa{\\"r,is", "days": 3, "tags": ["a", "b"], '
                '"near": {"x": -1.5, "y": null}, "more": [], "z": {}}'
            ),
            NOW,
        ],
    ),
    Transcript(
        "functiongemma",
        "",
        "functiongemma",
        "<start_function_call>call:get_weather{city:<escape>Paris<escape>,days:3}"
        "<end_function_call>",
        [call(PARIS)],
    ),
    Transcript(
        "pythonic",
        "",
        "pythonic",
        '[get_weather(city="Pa)r\'is", days=-3, tags=["a", \'b\'], near={"x": (1, None)}, '
        "exact=True), now()]",
        [
            call(
                '{"city": "Pa)r\'is", "days": -3, "tags": ["a", "b"], "near": {"x": [1, null]}, '
                '"exact": true}'
            ),
            NOW,
        ],
    ),
    Transcript(
        "llama4",
        "",
        "llama4",
        "<|python_start|>[now()]<|python_end|>",
        [NOW],
    ),
    Transcript(
        "pythonic-no-calls",
        "",
        "pythonic",
        "[1, now()] is [a list](http://x)",
        [("content", "[1, now()] is [a list](http://x)")],
    ),
    Transcript(
        "pythonic-code",
        "",
        "pythonic",
        '[get_weather(city="a", days=f(2))] end',
        [call('{"city": "a"'), ("content", ", days=f(2))] end")],
    ),
    Transcript(
        "gpt-oss",
        "gpt-oss",
        "gpt-oss",
        "<|channel|>analysis<|message|>Need < it.<|end|><|start|>assistant<|channel|>commentary"
        "<|message|>I look.<|end|><|start|>assistant<|channel|>commentary "
        f"to=functions.get_weather <|constrain|>json<|message|>{PARIS}<|call|>",
        [("reasoning", "Need < it."), ("content", "I look."), call(PARIS)],
    ),
    Transcript(
        "gpt-oss-recipient-first",
        "gpt-oss",
        "gpt-oss",
        "<|start|>assistant to=functions.now<|channel|>commentary json<|message|>{}<|call|>"
        "<|start|>assistant<|channel|>final<|message|>Done.<|return|>",
        [NOW, ("content", "Done.")],
    ),
    Transcript(
        "gpt-oss-without-marks",
        "gpt-oss",
        "gpt-oss",
        "Hello <| there",
        [("content", "Hello <| there")],
    ),
    Transcript(
        "qwen3",
        "qwen3",
        "hermes",
        "<think>\nA <tool_call> or </thin?\n\n</think>\n\n  Hello\n",
        [("reasoning", "A <tool_call> or </thin?"), ("content", "  Hello\n")],
    ),
    Transcript("qwen3-silent", "qwen3", "", "Hi <think>x", [("content", "Hi <think>x")]),
    Transcript("qwen3-empty", "qwen3", "", "<think>\n\n</think>\n\nHi", [("content", "Hi")]),
    Transcript(
        "qwen3-opened", "qwen3", "", "a</think>b", [("reasoning", "a"), ("content", "b")], True
    ),
    Transcript("r1-cut-off", "deepseek-r1", "", "never ends\n", [("reasoning", "never ends\n")]),
    Transcript(
        "granite",
        "granite",
        "",
        "Here is my thought process: simple.\n\nHere is my response: 42 is it.",
        [("reasoning", "simple."), ("content", "42 is it.")],
    ),
]
