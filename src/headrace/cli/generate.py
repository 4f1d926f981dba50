"""`headrace generate "prompt"`: answer one prompt in process, streaming to the terminal."""

import argparse
import json
from typing import TYPE_CHECKING, Any

from headrace.cli.options import add_server_options, config_from

if TYPE_CHECKING:
    from headrace.engine.engine import Engine


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.usage = "%(prog)s PROMPT [options]"
    parser.add_argument("prompt", help="What to answer.")
    parser.add_argument(
        "--raw", action="store_true", help="Continue the text itself: use no chat template."
    )
    parser.add_argument("--max-new-tokens", type=int, default=64, metavar="INT")
    parser.add_argument("--temperature", type=float, default=0.0, metavar="FLOAT")
    parser.add_argument("--top-p", type=float, default=1.0, metavar="FLOAT")
    parser.add_argument("--seed", type=int, default=None, metavar="INT")
    parser.add_argument("--json", action="store_true", help="Print the result as one JSON object.")
    add_server_options(parser)


def run(namespace: argparse.Namespace) -> int:
    overrides = {"log_level": namespace.log_level or "warning"}
    config = config_from(namespace, overrides)
    from headrace.engine.engine import Engine

    sampling = {
        "max_new_tokens": namespace.max_new_tokens,
        "temperature": namespace.temperature,
        "top_p": namespace.top_p,
    }
    if namespace.seed is not None:
        sampling["seed"] = namespace.seed
    with Engine(**config.flat()) as engine:
        prompt = _prompt(engine, namespace.prompt, namespace.raw)
        if namespace.json:
            result = engine.generate(**prompt, sampling_params=sampling)
            print(json.dumps(result, ensure_ascii=False))
            return 0
        shown = 0
        for chunk in engine.generate(**prompt, sampling_params=sampling, stream=True):
            print(chunk["text"][shown:], end="", flush=True)
            shown = len(chunk["text"])
        print()
    return 0


def _prompt(engine: "Engine", text: str, raw: bool) -> dict[str, Any]:
    """What to generate from: a question to a chat model, or the text itself."""
    asked = None if raw else engine.chat_prompt([{"role": "user", "content": text}])
    if asked is None:
        return {"prompt": text}
    return {"input_ids": engine.tokenize(asked, add_special_tokens=False)}
