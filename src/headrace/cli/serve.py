"""`headrace serve`: start the HTTP server."""

import argparse

from headrace.cli.options import add_server_options, config_from


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.usage = "%(prog)s [MODEL] [options]"
    parser.add_argument(
        "model",
        nargs="?",
        metavar="MODEL",
        help="Model folder or hub id (same as --model-path); the demo model when left out.",
    )
    add_server_options(parser)


def run(namespace: argparse.Namespace) -> int:
    overrides = {"model_path": namespace.model} if namespace.model else {}
    config = config_from(namespace, overrides)
    from headrace.engine.server import launch_server

    return launch_server(config)
