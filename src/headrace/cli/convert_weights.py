"""`headrace convert-weights FOLDER --out DIR`: .bin files as safetensors."""

import argparse
from pathlib import Path


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("folder", type=Path, help="Model folder with .bin or .pt files.")
    parser.add_argument("--out", type=Path, required=True, help="Folder to write, or the same.")


def run(namespace: argparse.Namespace) -> int:
    from headrace.engine.weights import convert_folder

    for path in convert_folder(namespace.folder, namespace.out):
        print(path)
    return 0
