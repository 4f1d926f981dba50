"""`headrace chat`: a conversation in the terminal, with a server of its own or a running one."""

import argparse
import contextlib
import sys
from collections.abc import Iterator
from typing import Any

from headrace.cli.chat_client import stream_chat
from headrace.cli.options import add_server_options, config_from

_HELP = "/new starts over, /quit (or Ctrl-D) ends."


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--base-url", default="", metavar="URL", help="Use this running server.")
    parser.add_argument("--system", default="", metavar="TEXT", help="System message.")
    parser.add_argument("--temperature", type=float, default=0.0, metavar="FLOAT")
    parser.add_argument("--max-tokens", type=int, default=256, metavar="INT")
    add_server_options(parser)


def run(namespace: argparse.Namespace) -> int:
    with _server(namespace) as (url, api_key):
        if sys.stdin.isatty():
            print(f"Talking to {url}. {_HELP}")
        _talk(url, api_key, namespace)
    return 0


@contextlib.contextmanager
def _server(namespace: argparse.Namespace) -> Iterator[tuple[str, str]]:
    """The url and key of the given server, or of one that lives as long as the chat."""
    if namespace.base_url:
        yield namespace.base_url, namespace.api_key or ""
        return
    config = config_from(namespace, {"log_level": namespace.log_level or "warning"})
    from headrace.engine.runtime import Runtime

    with Runtime(**config.flat()) as runtime:
        yield runtime.url, config.serve.api_key.reveal()


def _talk(url: str, api_key: str, namespace: argparse.Namespace) -> None:
    start: list[dict[str, Any]] = (
        [{"role": "system", "content": namespace.system}] if namespace.system else []
    )
    messages = list(start)
    for line in _lines():
        if line == "/quit":
            return
        if line == "/new":
            messages = list(start)
            continue
        messages.append({"role": "user", "content": line})
        answer = stream_chat(
            url,
            messages,
            lambda piece: print(piece, end="", flush=True),
            api_key=api_key,
            temperature=namespace.temperature,
            max_tokens=namespace.max_tokens,
        )
        print()
        messages.append({"role": "assistant", "content": answer.text})


def _lines() -> Iterator[str]:
    """What the user types, without blank lines, until the end of input."""
    while True:
        try:
            line = input("> " if sys.stdin.isatty() else "").strip()
        except EOFError:
            return
        if line:
            yield line
