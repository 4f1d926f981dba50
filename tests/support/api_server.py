"""The whole HTTP side on 127.0.0.1 with a scripted model behind it, for official client packages.

The model "writes" parser events: each delta's text is one event as a line of JSON, which
`LinesParser` reads back. So adapters are tested with every kind of event, streamed and whole,
whatever dialects the real parsers know.
"""

import asyncio
import json
import threading
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager

import msgspec
import uvicorn

from headrace.core.config import Config, Limits
from headrace.core.messages import Delta, FinishReason, GenerateRequest, unpack_ids
from headrace.core.pooling import Pooling
from headrace.server.app import build_app
from headrace.text.chat import TemplateManager
from headrace.text.parsers.events import Arguments, Content, Event, Reasoning, ToolCall
from tests.support.scripted_manager import ScriptedManager
from tests.support.servers import wait_for

KINDS = {"content": Content, "reasoning": Reasoning, "call": ToolCall, "arguments": Arguments}
NAMES = {kind: name for name, kind in KINDS.items()}
TEMPLATE = (
    "{% if tools %}{{ tools | tojson }}\n{% endif %}"
    "{% for m in messages %}<{{ m.role }}>"
    "{% if m.reasoning_content %}({{ m.reasoning_content }}){% endif %}{{ m.content }}"
    "{% for c in m.tool_calls or [] %}[{{ c.function.name }} {{ c.function.arguments | tojson }}]"
    "{% endfor %}{{ '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
    "{% if enable_thinking is defined %}{{ enable_thinking }}{% endif %}"
)
CONTEXT = 1024


class LinesParser:
    """Reads events from lines of JSON; pieces of lines wait for their rest."""

    def __init__(self) -> None:
        self._rest = ""

    def feed(self, text: str) -> list[Event]:
        *lines, self._rest = (self._rest + text).split("\n")
        return [KINDS[kind](*values) for kind, *values in map(json.loads, lines)]

    def finish(self) -> list[Event]:
        assert not self._rest
        return []


def line(event: Event) -> str:
    """An event as LinesParser reads it."""
    values = [getattr(event, name) for name in event.__struct_fields__]
    return json.dumps([NAMES[type(event)], *values]) + "\n"


class Model:
    """Answers each request with the next turn of `turns`, the last one for ever."""

    manager: ScriptedManager

    def __init__(self) -> None:
        self.reset()

    def reset(self) -> "Model":
        """As new, but still behind the same server."""
        self.turns: list[list[Event]] = [[Content("Hello"), Content(" wheel"), Content("!")]]
        self.finish: FinishReason = FinishReason("stop", matched=3)
        self.prompts: list[str] = []
        self.requests: list[GenerateRequest] = []
        self.cached = 0
        self.endless = False
        return self

    def script(self, request: GenerateRequest) -> list[Delta]:
        self.requests.append(request)
        prompt = unpack_ids(request.ids).tolist()
        self.prompts.append(self.manager.tokenizer.decode(prompt, skip_special_tokens=False))
        events = self.turns.pop(0) if len(self.turns) > 1 else self.turns[0]
        deltas = [
            Delta(
                request.rid,
                ids=[5],
                text=line(event),
                prompt_tokens=len(prompt),
                completion_tokens=done,
                cached_tokens=self.cached,
            )
            for done, event in enumerate(events, 1)
        ]
        if self.endless:
            return deltas
        last = Delta(
            request.rid,
            ids=[3],
            finish=self.finish,
            prompt_tokens=len(prompt),
            completion_tokens=len(events) + 1,
            cached_tokens=self.cached,
            queue_time=1e-6,
            first_token_time=3e-6,
        )
        return [*deltas, last]


class Server(uvicorn.Server):
    """Also runs what an app wants to run beside its routes."""

    work: Callable[[], Awaitable[None]]

    async def serve(self, sockets=None) -> None:
        work = asyncio.ensure_future(self.work())
        try:
            await super().serve(sockets)
        finally:
            work.cancel()
            await asyncio.gather(work, return_exceptions=True)


@contextmanager
def serve(model: Model, pooling: Pooling | None = None, **options: object) -> Iterator[str]:
    """The URL of a running server that answers with `model`; with `pooling` it makes vectors."""
    config = Config.from_flat({"served_model_name": "tiny"} | options)
    manager = model.manager = ScriptedManager(config, model.script)
    manager.info = msgspec.structs.replace(manager.info, pooling=pooling)
    manager.templates = TemplateManager({"default": TEMPLATE})
    manager.open(
        Limits(max_total_tokens=4096, max_running_requests=8, context_length=CONTEXT, page_size=16)
    )
    app = build_app(manager, config, manager.info)
    settings = uvicorn.Config(
        app,
        port=0,
        log_level="warning",
        lifespan="off",
        log_config=None,
    )
    server = Server(settings)
    server.work = app.state.work
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    try:
        wait_for(lambda: server.started)
        port = server.servers[0].sockets[0].getsockname()[1]
        yield f"http://127.0.0.1:{port}"
    finally:
        server.should_exit = True
        thread.join(30)
