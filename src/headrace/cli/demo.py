"""`headrace demo`: the whole path in one command: server, HTTP, a streamed answer, the speed."""

import argparse
import shutil
import sys
import time

from headrace.cli.chat_client import Answer, stream_chat

QUESTION = "Tell me a story about a fox."
_MOST_TOKENS = 200


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
    """Stream the answer; on a terminal the last line shows how far it is."""
    messages = [{"role": "user", "content": prompt}]
    with StatusLine(total=_MOST_TOKENS) as status:
        print("assistant: ", end="", flush=True)
        answer = stream_chat(url, messages, status.show, temperature=0.0, max_tokens=_MOST_TOKENS)
        print()
    return answer


class StatusLine:
    """Prints pieces of text as they come, and below them, on a terminal, a progress bar.

    The terminal scrolls in all lines but the last one (DECSTBM), which belongs to the bar.
    """

    def __init__(self, total: int) -> None:
        self._total = total
        self._pieces = 0
        self._started = time.perf_counter()
        self._rows = shutil.get_terminal_size().lines if sys.stdout.isatty() else 0

    def show(self, piece: str) -> None:
        print(piece, end="", flush=True)
        self._pieces += bool(piece)
        self._draw()

    def _draw(self) -> None:
        if not self._rows:
            return
        speed = self._pieces / (time.perf_counter() - self._started)
        full = min(30, 30 * self._pieces // self._total)
        bar = f"[{'#' * full}{'.' * (30 - full)}] {self._pieces} tokens, {speed:.0f}/s"
        print(f"\0337\033[{self._rows};1H\033[2K{bar}\0338", end="", flush=True)

    def __enter__(self) -> "StatusLine":
        if self._rows:
            # A new line first, so that the cursor is inside the region.
            print(f"\n\033[1A\0337\033[1;{self._rows - 1}r\0338", end="", flush=True)
        return self

    def __exit__(self, *exception: object) -> None:
        if self._rows:
            print(f"\0337\033[r\033[{self._rows};1H\033[2K\0338", end="", flush=True)


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
        "  web page and API documents:    http://127.0.0.1:30000/ui and /docs\n"
        "  OpenAI clients:                base_url=http://127.0.0.1:30000/v1, any api_key\n"
        "  in the terminal:               headrace chat"
    )
