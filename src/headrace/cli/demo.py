"""`headrace demo`: the whole path in one command: server, HTTP, a streamed answer, the speed."""

import argparse
import sys
import time

from headrace.cli.chat_client import Answer, stream_chat

QUESTION = "Tell me a story about a fox."


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--prompt", default=QUESTION, help="What to ask the demo model.")
    parser.add_argument("--port", type=int, default=0, metavar="INT", help="0 takes a free port.")


def run(namespace: argparse.Namespace) -> int:
    from headrace.engine.runtime import Runtime

    started = time.perf_counter()
    print("Starting headrace with its demo model ...", flush=True)
    with Runtime(port=namespace.port, log_level="warning") as runtime:
        print(f"Ready after {time.perf_counter() - started:.1f} s at {runtime.url}\n")
        print(f"user: {namespace.prompt}")
        answer = _ask(runtime.url, namespace.prompt)
        _report(runtime.url, answer)
    return 0 if answer.output_tokens else 1


def _ask(url: str, prompt: str) -> Answer:
    """Stream the answer; on a terminal a line below it counts tokens."""
    print("assistant: ", end="", flush=True)
    messages = [{"role": "user", "content": prompt}]
    progress = _Progress(live=sys.stderr.isatty())
    answer = stream_chat(url, messages, progress.show, temperature=0.0, max_tokens=200)
    progress.close()
    return answer


class _Progress:
    """Prints pieces of text as they come and keeps the speed in the terminal's title."""

    def __init__(self, *, live: bool) -> None:
        self._live = live
        self._pieces = 0
        self._started = time.perf_counter()

    def show(self, piece: str) -> None:
        print(piece, end="", flush=True)
        self._pieces += bool(piece)
        if self._live:
            speed = self._pieces / (time.perf_counter() - self._started)
            title = f"headrace demo: {self._pieces} pieces, {speed:.0f}/s"
            print(f"\033]0;{title}\007", end="", file=sys.stderr, flush=True)

    def close(self) -> None:
        print()


def _report(url: str, answer: Answer) -> None:
    rows = [
        ("prompt tokens", f"{answer.prompt_tokens}"),
        ("output tokens", f"{answer.output_tokens}"),
        ("time to first token", f"{answer.first_token * 1000:.1f} ms"),
        ("decode speed", f"{answer.tokens_per_second:.0f} tokens/s"),
    ]
    print()
    for name, value in rows:
        print(f"  {name:<22}{value:>16}")
    print(
        "\nNow start a server that stays:   headrace serve\n"
        "  web page and API documents:    http://127.0.0.1:30000/ and /docs\n"
        "  OpenAI clients:                base_url=http://127.0.0.1:30000/v1, any api_key\n"
        "  in the terminal:               headrace chat"
    )
