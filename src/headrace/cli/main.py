"""Entry point: picks the sub-command and turns errors meant for people into one line.

Imports nothing heavy: `headrace --help` and `headrace serve --help` answer at once.
"""

import argparse
import importlib
import sys
from collections.abc import Sequence

from headrace import __version__
from headrace.core.errors import HeadraceError

# name -> (module with add_arguments and run, one line of help)
COMMANDS: dict[str, tuple[str, str]] = {
    "serve": ("headrace.cli.serve", "start the HTTP server"),
    "generate": ("headrace.cli.generate", "complete one prompt and exit"),
    "chat": ("headrace.cli.chat", "talk to a model in the terminal"),
    "demo": ("headrace.cli.demo", "start the demo model, ask it something, show the speed"),
    "bench": ("headrace.cli.bench", "measure a server, the engine, the start or the control plane"),
    "replay": ("headrace.cli.replay", "run a recorded scheduler again, compare its decisions"),
    "test-model": ("headrace.cli.compare", "compare a checkpoint layer by layer with transformers"),
    "convert-weights": ("headrace.cli.convert_weights", "turn .bin weights into safetensors"),
    "save-weights": ("headrace.cli.save_weights", "save packed weights, to start from later"),
    "check-env": ("headrace.cli.check_env", "show what this machine offers and what is missing"),
    "doctor": ("headrace.cli.check_env", "the same as check-env"),
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    parser = build_parser(arguments[0] if arguments else "")
    namespace = parser.parse_args(arguments)
    try:
        code: int = namespace.run(namespace)
    except HeadraceError as error:
        print(f"headrace: {error.message}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130
    return code


def build_parser(chosen: str) -> argparse.ArgumentParser:
    """The parser of all commands; only the chosen one is imported and gets its options."""
    parser = argparse.ArgumentParser(
        prog="headrace",
        description="An LLM serving runtime. Without a model, every command uses the demo model.",
    )
    parser.add_argument("--version", action="version", version=f"headrace {__version__}")
    commands = parser.add_subparsers(metavar="command", required=True)
    for name, (module, text) in COMMANDS.items():
        command = commands.add_parser(
            name, help=text, description=text[0].upper() + text[1:] + ".", allow_abbrev=False
        )
        if name == chosen:
            loaded = importlib.import_module(module)
            loaded.add_arguments(command)
            command.set_defaults(run=loaded.run)
    return parser
