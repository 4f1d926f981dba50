"""`headrace bench write-model`: a Hugging Face folder of a known shape with made-up weights.

So that several engines can be measured on the very same files. The weights are those of
--load-format dummy. The tokenizer is the demo model's, its vocabulary filled up with words that no
text becomes: every id has text, so that clients see each token arrive. What the model says means
nothing.
"""

import argparse
import itertools
import json
import string
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from headrace.assets import demo_model_path
from headrace.bench.report import note
from headrace.bench.shapes import SHAPES, write_config
from headrace.core.errors import BadRequest
from headrace.core.model_info import read_model_info

_SPACE = "Ġ"  # a space, in the alphabet of byte-level vocabularies


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The flags."""
    parser.add_argument("--shape", choices=tuple(SHAPES), required=True)
    parser.add_argument("--out", type=Path, required=True, metavar="FOLDER", help="new or empty")


def run(args: argparse.Namespace) -> int:
    """Write the folder.

    Raises:
        BadRequest: it exists and holds files.
    """
    if args.out.exists() and (not args.out.is_dir() or any(args.out.iterdir())):
        raise BadRequest(f"--out {args.out} is not an empty folder", field="out")
    args.out.mkdir(parents=True, exist_ok=True)
    write_config(args.shape, args.out)
    write_tokenizer(args.out, SHAPES[args.shape])
    note("writing the weights ...")
    write_weights(args.out)
    size = sum(path.stat().st_size for path in args.out.iterdir())
    print(f"{args.out}: {args.shape}, {size / 1e9:.2f} GB")
    return 0


def write_weights(folder: Path) -> None:
    """Write model.safetensors for the config.json in `folder`."""
    from safetensors.torch import save_file

    from headrace.loader.dummy import dummy_checkpoint

    tensors = dummy_checkpoint(read_model_info(folder))
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def write_tokenizer(folder: Path, config: dict[str, Any]) -> None:
    """Write the demo model's tokenizer with as many tokens as `config` has."""
    source = demo_model_path()
    tokenizer = _read(source / "tokenizer.json")
    vocabulary: dict[str, int] = tokenizer["model"]["vocab"]
    added = [token["id"] for token in tokenizer["added_tokens"]]
    first = max(*vocabulary.values(), *added) + 1
    fresh = (word for word in _words() if word not in vocabulary)
    vocabulary |= {next(fresh): number for number in range(first, config["vocab_size"])}
    settings = _read(source / "tokenizer_config.json")
    settings["model_max_length"] = config["max_position_embeddings"]
    _write(folder / "tokenizer.json", tokenizer)
    _write(folder / "tokenizer_config.json", settings)
    _write(folder / "generation_config.json", {"eos_token_id": config["eos_token_id"]})


def _words() -> Iterator[str]:
    """Tokens of a space and four letters, in order."""
    for letters in itertools.product(string.ascii_lowercase, repeat=4):
        yield _SPACE + "".join(letters)


def _read(path: Path) -> dict[str, Any]:
    value: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return value


def _write(path: Path, value: dict[str, Any]) -> None:
    path.write_text(json.dumps(value, ensure_ascii=False, indent=1) + "\n", encoding="utf-8")
