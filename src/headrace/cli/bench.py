"""`headrace bench NAME`: the measurements of `headrace.bench`, one sub-command each."""

import argparse
import importlib
import sys

from headrace.bench import BENCHMARKS


def add_arguments(parser: argparse.ArgumentParser) -> None:
    names = parser.add_subparsers(metavar="name", required=True)
    chosen = next((word for word in sys.argv[2:] if not word.startswith("-")), "")
    for name, (module, text) in BENCHMARKS.items():
        bench = names.add_parser(name, help=text, description=text, allow_abbrev=False)
        if name == chosen:
            loaded = importlib.import_module(module)
            loaded.add_arguments(bench)
            bench.set_defaults(run=loaded.run)


def run(namespace: argparse.Namespace) -> int:
    raise AssertionError("each bench sets its own run")
