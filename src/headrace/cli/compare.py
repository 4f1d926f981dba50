"""`headrace test-model DIR`: is our implementation of a checkpoint that of transformers?

Prints the largest difference after each layer and names the first layer that differs, as a table
or as JSON; exit code 1 if one does. Both models are held in memory, one after the other.
"""

import argparse
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec

from headrace.core.errors import BadRequest

if TYPE_CHECKING:
    from headrace.engine.compare import Comparison


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("folder", metavar="DIR", help="A checkpoint that transformers can load.")
    parser.add_argument(
        "--dtype",
        choices=("float32", "bfloat16", "float16"),
        default="float32",
        help="What both compute in; narrower ones need a larger tolerance.",
    )
    parser.add_argument(
        "--tokens", type=int, default=48, metavar="INT", help="Length of the random prompt."
    )
    parser.add_argument(
        "--tolerance",
        type=float,
        default=1e-3,
        metavar="FLOAT",
        help="Largest difference allowed, as a part of the largest element.",
    )
    parser.add_argument("--seed", type=int, default=0, metavar="INT", help="Of the random prompt.")
    parser.add_argument("--json", action="store_true", help="Print JSON.")


def run(namespace: argparse.Namespace) -> int:
    if namespace.tokens < 1:
        raise BadRequest(f"--tokens must be at least 1, not {namespace.tokens}", field="tokens")
    from headrace.engine.compare import compare

    found = compare(
        Path(namespace.folder),
        namespace.dtype,
        namespace.tokens,
        namespace.tolerance,
        namespace.seed,
    )
    print(msgspec.json.encode(_json(found)).decode() if namespace.json else _table(found))
    return 0 if found.first_difference is None else 1


def _json(found: "Comparison") -> dict[str, Any]:
    verdict = {"first_difference": found.first_difference, "in_attention": found.in_attention}
    return asdict(found) | verdict


def _table(found: "Comparison") -> str:
    rows = [f"{'':<12}{'largest':>10}{'error':>10}{'attention':>11}"]
    for point in found.points:
        alone = found.attention.get(point.name)
        shown = "" if alone is None else f"{alone:11.1e}"
        rows.append(f"{point.name:<12}{point.largest:10.1e}{point.error:10.1e}{shown}")
    rows.append(f"same best token at {found.same_tokens} of {found.tokens} positions")
    return "\n".join([*rows, _verdict(found)])


def _verdict(found: "Comparison") -> str:
    name = found.first_difference
    if name is None:
        return f"no difference above {found.tolerance:g}: as transformers"
    where = {None: "", True: ": its attention", False: ": not its attention, but what follows"}
    return f"the first difference above {found.tolerance:g} is in {name}{where[found.in_attention]}"
