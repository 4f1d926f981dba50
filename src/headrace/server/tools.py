"""The tools of an OpenAI chat request, checked.

A wrong definition is refused with the place that is wrong; nothing of a definition is changed.
"""

import re
from typing import Any

from headrace.core.errors import BadRequest
from headrace.text.messages import plain_json

MAX_TOOLS = 1024
_NAME = re.compile(r"[\w.:/-]{1,256}")
_FIELDS: tuple[tuple[str, type, str], ...] = (
    ("description", str, "a string"),
    ("parameters", dict, "an object"),
    ("strict", bool, "true or false"),
)


def check_tools(tools: list[dict[str, Any]] | None) -> list[dict[str, Any]]:
    """The tools as they are.

    Raises:
        BadRequest: names the field that is wrong.
    """
    if tools and len(tools) > MAX_TOOLS:
        raise BadRequest(f"tools: {len(tools)} are more than {MAX_TOOLS}", field="tools")
    plain_json(tools, "tools")
    for number, tool in enumerate(tools or []):
        place = f"tools[{number}]"
        if tool.get("type", "function") != "function":
            raise _wrong(f"{place}.type", "must be 'function'")
        function = tool.get("function")
        if not isinstance(function, dict):
            raise _wrong(f"{place}.function", "must be an object")
        name = function.get("name")
        if not isinstance(name, str) or not _NAME.fullmatch(name):
            raise _wrong(
                f"{place}.function.name", "must be 1 to 256 letters, digits or any of _ - . : /"
            )
        for key, kind, wanted in _FIELDS:
            if not isinstance(function.get(key), kind | None):
                raise _wrong(f"{place}.function.{key}", f"must be {wanted}")
    return tools or []


def check_choice(choice: Any, tools: list[dict[str, Any]]) -> str | dict[str, Any]:
    """tool_choice, "auto" if there is none; a named function must be one of `tools`.

    Raises:
        BadRequest: it is wrong, or forces a call without tools.
    """
    if choice in (None, "auto", "none"):
        return choice or "auto"
    if not tools:
        raise _wrong("tool_choice", "needs tools", field="tool_choice")
    if choice == "required":
        return "required"
    function = choice.get("function") if isinstance(choice, dict) else None
    name = function.get("name") if isinstance(function, dict) else None
    if not isinstance(choice, dict) or choice.get("type") != "function" or name is None:
        raise _wrong(
            "tool_choice",
            "must be 'auto', 'none', 'required' or {'type': 'function', 'function': {'name': ...}}",
            field="tool_choice",
        )
    names = [tool["function"]["name"] for tool in tools]
    if name not in names:
        raise _wrong("tool_choice", f"there is no tool {name!r}", field="tool_choice")
    return choice


def _wrong(place: str, reason: str, field: str | None = None) -> BadRequest:
    return BadRequest(f"{place}: {reason}", field=field or place)
