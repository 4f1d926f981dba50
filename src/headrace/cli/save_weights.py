"""`headrace save-weights --out DIR|URL`: packed weights of each rank, to start from later."""

import argparse

from headrace.cli.options import add_server_options, config_from


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.usage = "%(prog)s --out DIR|URL [options]"
    parser.add_argument(
        "--out",
        required=True,
        help="Folder for --load-format sharded_state, or a redis://, s3:// or file:// URL for "
        "remote.",
    )
    parser.add_argument(
        "--ranks", type=int, default=1, metavar="INT", help="Save for so many ranks. [default: 1]"
    )
    add_server_options(parser)


def run(namespace: argparse.Namespace) -> int:
    from headrace.engine.weights import save_ranks

    for name in save_ranks(config_from(namespace), namespace.out, max(1, namespace.ranks)):
        print(name)
    return 0
