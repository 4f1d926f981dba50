"""/parse_function_call and /separate_reasoning: the output parsers on text that a client has."""

import asyncio
from typing import Any

from fastapi import APIRouter, Request
from starlette.responses import Response

from headrace.core.errors import BadRequest
from headrace.server.admin import json_response
from headrace.server.context import Context
from headrace.server.generation import read_body
from headrace.server.schemas import FunctionCallBody, ReasoningBody, body_of, read
from headrace.server.tools import check_tools
from headrace.text.parsers import REASONING, TOOL_DIALECTS, make_parser
from headrace.text.parsers.events import Arguments, Content, Event, Reasoning, ToolCall


def routes(context: Context) -> APIRouter:
    """Both routes."""
    router = APIRouter()

    @router.post("/parse_function_call", openapi_extra=body_of(FunctionCallBody))
    async def parse_function_call(http: Request) -> Response:
        """The calls in a text, and what is left of it."""
        body = read(FunctionCallBody, await read_body(http, context.config.serve))
        tools = check_tools(body.tools)
        dialect = _known(body.tool_call_parser, TOOL_DIALECTS, "tool_call_parser")
        return json_response(calls_of(await _parsed(body.text, "", dialect, tools)))

    @router.post("/separate_reasoning", openapi_extra=body_of(ReasoningBody))
    async def separate_reasoning(http: Request) -> Response:
        """The reasoning in a text, and what is left of it."""
        body = read(ReasoningBody, await read_body(http, context.config.serve))
        family = _known(body.reasoning_parser, REASONING, "reasoning_parser")
        events = await _parsed(body.text, family, "", [])
        reasoning = "".join(event.text for event in events if isinstance(event, Reasoning))
        return json_response({"reasoning_text": reasoning, "text": _content(events)})

    return router


async def _parsed(
    text: str, reasoning: str, dialect: str, tools: list[dict[str, Any]]
) -> list[Event]:
    """All events of a whole text; other requests go on meanwhile."""

    def parse() -> list[Event]:
        parser = make_parser(reasoning, dialect, tools, thinking=True)
        return parser.feed(text) + parser.finish()

    return await asyncio.to_thread(parse)


def calls_of(events: list[Event]) -> dict[str, Any]:
    """The answer of /parse_function_call."""
    calls: list[dict[str, Any]] = []
    for event in events:
        if isinstance(event, ToolCall):
            calls.append({"tool_index": event.index, "name": event.name, "parameters": ""})
        elif isinstance(event, Arguments):
            calls[event.index]["parameters"] += event.text
    return {"normal_text": _content(events), "calls": calls}


def _content(events: list[Event]) -> str:
    return "".join(event.text for event in events if isinstance(event, Content))


def _known(name: str, names: dict[str, str], field: str) -> str:
    if name not in names:
        raise BadRequest(f"{field}: must be one of {', '.join(sorted(names))}", field=field)
    return names[name]
