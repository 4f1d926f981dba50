"""Which dialects a model speaks, from the marks in its chat template.

A template shows the model its own calls and reasoning of earlier turns, so their marks stand in
it. The first row whose marks are all there counts; a template with none speaks no dialect.
"""

_CALLS_BEGIN = "<\uff5ctool\u2581calls\u2581begin\uff5c>"

_TOOLS: tuple[tuple[tuple[str, ...], str], ...] = (
    (("<|channel|>", "<|message|>", "<|start|>"), "gpt-oss"),
    ((_CALLS_BEGIN, "```json"), "deepseekv3"),
    ((_CALLS_BEGIN,), "deepseekv31"),
    (("<|tool_calls_section_begin|>",), "kimi_k2"),
    (("<minimax:tool_call>",), "minimax-m2"),
    (("steptml:invoke",), "step3"),
    (("<|tool_call>", "call:"), "gemma4"),
    (("<start_function_call>", "<escape>"), "functiongemma"),
    (("[TOOL_CALLS]",), "mistral"),
    (("<arg_key>", "<arg_value>"), "glm45"),
    (("<function=", "<parameter="), "qwen3_coder"),
    (("<tool_call>",), "hermes"),
    (("<|python_start|>",), "pythonic"),
    (("[func_name1(params_name1=params_value1",), "pythonic"),
    (("<|start_header_id|>", "<|python_tag|>"), "llama3"),
    (("<|start_header_id|>", "tool_calls", '"parameters": '), "llama3"),
)
_REASONING: tuple[tuple[tuple[str, ...], str], ...] = (
    (("<|channel|>", "<|message|>", "<|start|>"), "gpt-oss"),
    (("[THINK]",), "mistral"),
    (("\u25c1think\u25b7",), "kimi"),
    (("<|channel>", "<channel|>"), "gemma4"),
    (("Here is my thought process",), "granite"),
    (("</think>", "<|im_middle|>"), "kimi_k2"),
    (("</think>", "[gMASK]"), "glm45"),
    (("</think>", "]~b]"), "minimax"),
    (("</think>", "steptml:"), "step3"),
    (("</think>", "<\uff5cAssistant\uff5c>", "thinking"), "deepseek-v3"),
    (("</think>", "<\uff5cAssistant\uff5c>"), "deepseek-r1"),
    (("</think>",), "qwen3"),
)


def detect(chat_template: str) -> tuple[str, str]:
    """Names of the reasoning and the tool dialect, "" for none."""
    return _first(_REASONING, chat_template), _first(_TOOLS, chat_template)


def _first(rows: tuple[tuple[tuple[str, ...], str], ...], template: str) -> str:
    return next((name for marks, name in rows if all(mark in template for mark in marks)), "")
