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


def offered(
    tools: list[dict[str, Any]] | None, choice: Any
) -> tuple[list[dict[str, Any]], str | dict[str, Any]]:
    """(the tools that the model is told of, tool_choice); `allowed_tools` narrows the former.

    Raises:
        BadRequest: names the field that is wrong.
    """
    found = check_tools(tools)
    if isinstance(choice, dict) and choice.get("type") == "allowed_tools":
        found, choice = _allowed(found, choice.get("allowed_tools"))
    return found, check_choice(choice, found)


def _allowed(tools: list[dict[str, Any]], given: Any) -> tuple[list[dict[str, Any]], str]:
    place = "tool_choice.allowed_tools"
    wanted = given.get("tools") if isinstance(given, dict) else None
    if not isinstance(wanted, list) or not wanted or given.get("mode") not in ("auto", "required"):
        raise _wrong(place, "must have tools and a mode, 'auto' or 'required'", "tool_choice")
    names = {tool["function"]["name"] for tool in tools}
    chosen: set[str] = set()
    for number, tool in enumerate(wanted):
        function = tool.get("function") if isinstance(tool, dict) else None
        name = function.get("name") if isinstance(function, dict) else None
        if not isinstance(name, str) or name not in names:
            raise _wrong(f"{place}.tools[{number}]", f"there is no tool {name!r}", "tool_choice")
        chosen.add(name)
    return [tool for tool in tools if tool["function"]["name"] in chosen], given["mode"]


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
