"""`headrace bench grammar`: time to compile grammars, and to compute masks, on a large vocabulary.

Follows random outputs: after each token the mask is computed anew. The vocabulary is that of a
model (`--model`), or made up: words of a made-up language, numbers, pieces of JSON and all bytes.
Runs without a model; one thread, unless told otherwise.
"""

import argparse
import json
import random
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

from headrace.bench import report
from headrace.bench.flags import positive_int
from headrace.grammar.compiler import Compiler
from headrace.grammar.engine import BACKENDS, Matcher
from headrace.grammar.vocabulary import Vocabulary, build_vocabulary, read_vocabulary
from headrace.text.tokenizer import load_tokenizer

_PERSON = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 40},
        "age": {"type": "integer", "minimum": 0, "maximum": 150},
        "id": {"type": "string", "format": "uuid"},
        "born": {"type": "string", "format": "date"},
        "address": {
            "type": "object",
            "properties": {
                "street": {"type": "string"},
                "zip": {"type": "string", "pattern": "^[0-9]{5}$"},
            },
            "required": ["street"],
            "additionalProperties": False,
        },
        "tags": {"type": "array", "items": {"enum": ["new", "old", "blue"]}, "maxItems": 5},
    },
    "required": ["name", "age", "address", "tags"],
    "additionalProperties": False,
}
_ARITHMETIC = 'root ::= term ([-+*/] term)*\nterm ::= [0-9]+ | "(" root ")"'
GRAMMARS: dict[str, tuple[str, str]] = {
    "nested object": ("json_schema", json.dumps(_PERSON)),
    "any JSON object": ("json_schema", '{"type": "object"}'),
    "enum of 5,000": ("json_schema", json.dumps({"enum": [f"v-{i * 7919}" for i in range(5000)]})),
    "regex, words": ("regex", "[a-z]+( [a-z]+){2,20}"),
    "EBNF, recursive": ("ebnf", _ARITHMETIC),
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", help="folder whose tokenizer to take; default: a made-up one")
    parser.add_argument(
        "--backend", choices=("llguidance", "xgrammar"), default="llguidance", help="the engine"
    )
    parser.add_argument("--vocabulary", type=positive_int, default=150_000, help="made-up tokens")
    parser.add_argument("--tokens", type=positive_int, default=150, help="tokens of an output")
    parser.add_argument("--outputs", type=positive_int, default=4, help="outputs of each grammar")
    parser.add_argument("--batch", type=positive_int, default=64, help="masks at once")
    parser.add_argument("--threads", type=positive_int, default=2, help="threads for them")
    report.add_arguments(parser)


def run(args: argparse.Namespace) -> int:
    """Measure and report."""
    began = time.perf_counter()
    if args.model:
        tokenizer = load_tokenizer(Path(args.model))
        vocabulary = read_vocabulary(tokenizer, tokenizer.vocab_size, tokenizer.eos_token_ids)
    else:
        vocabulary = made_up_vocabulary(args.vocabulary)
    read = time.perf_counter()
    compiler = Compiler(lambda: vocabulary, {}, BACKENDS[args.backend])
    # The engine is made with the first grammar.
    compiler.compile("regex", "a").result()
    result: dict[str, Any] = {
        "backend": args.backend,
        "vocabulary": vocabulary.size,
        "vocabulary_seconds": read - began,
        "engine_seconds": time.perf_counter() - read,
        "grammars": [],
    }
    try:
        for name in GRAMMARS:
            report.note(f"{name} ...")
            result["grammars"].append(measure(args, compiler, vocabulary, name))
    finally:
        compiler.close()
    report.emit(args, result, table(result))
    return 0


def made_up_vocabulary(size: int) -> Vocabulary:
    """Tokens of the kinds that a large vocabulary has; the same ones each time."""
    dice = random.Random(1)
    parts = [a + b for a in "bcdfghklmnprstvwz" for b in "aeiou"]
    found = {bytes([byte]): None for byte in range(256)}
    found |= {str(number).encode(): None for number in range(1000)}
    marks = '{}[]",:_-./\\ \n'
    for first in marks:
        for second in marks:
            found |= {f"{first}{second}{third}".encode(): None for third in ["", *marks]}
    while len(found) < size - 1:
        word = "".join(dice.choices(parts, k=dice.randint(1, 5)))
        word = dice.choice([word, " " + word, " " + word.title(), word.title(), '"' + word])
        text = word if dice.random() < 0.9 else word.translate({97: "é", 111: "中", 101: "ж"})
        found[text.encode()] = None
    tokens = [*list(found)[: size - 1], b""]
    return build_vocabulary(tokens, {size - 1: b"<eos>"}, [size - 1])


def measure(
    args: argparse.Namespace, compiler: Compiler, vocabulary: Vocabulary, name: str
) -> dict[str, Any]:
    """One grammar: compilation, masks one by one, masks of a batch."""
    field, text = GRAMMARS[name]
    began = time.perf_counter()
    compiled = compiler.compile(field, text).result()
    seconds = time.perf_counter() - began
    masks: list[float] = []
    accepts: list[float] = []
    states = [compiled.copy()]
    for seed in range(args.outputs):
        follow(compiled.copy(), vocabulary, args.tokens, seed, masks, accepts, states)
    return {
        "name": name,
        "compile_ms": seconds * 1e3,
        "masks": len(masks),
        "mask_us": {
            "mean": float(np.mean(masks) * 1e6),
            "p50": float(np.percentile(masks, 50) * 1e6),
            "p99": float(np.percentile(masks, 99) * 1e6),
            "max": float(np.max(masks) * 1e6),
        },
        "accept_us": float(np.mean(accepts) * 1e6),
        "batch_ms": batch_seconds(states, args.batch, args.threads) * 1e3,
    }


def follow(
    matcher: Matcher,
    vocabulary: Vocabulary,
    most: int,
    seed: int,
    masks: list[float],
    accepts: list[float],
    states: list[Matcher],
) -> None:
    """A random output; a sample of its states is kept."""
    dice = random.Random(seed)
    for number in range(most):
        began = time.perf_counter()
        mask = matcher.mask()
        masks.append(time.perf_counter() - began)
        bits = np.unpackbits(np.frombuffer(mask, np.uint8), bitorder="little")[: vocabulary.size]
        bits[list(vocabulary.eos)] = 0
        ids = np.flatnonzero(bits)
        if not len(ids):
            return
        if number % 8 == 0:
            states.append(matcher.copy())
        token = int(ids[dice.randrange(len(ids))])
        began = time.perf_counter()
        matcher.accept(token)
        accepts.append(time.perf_counter() - began)


def batch_seconds(states: Sequence[Matcher], count: int, threads: int) -> float:
    """The masks of `count` outputs in different states, from the first to the last."""
    matchers = [states[index % len(states)].copy() for index in range(count)]
    with ThreadPoolExecutor(threads) as pool:
        list(pool.map(str, range(threads)))
        began = time.perf_counter()
        for future in [pool.submit(matcher.mask) for matcher in matchers]:
            future.result()
        return time.perf_counter() - began


def table(result: dict[str, Any]) -> str:
    """For people."""
    rows = [
        [
            one["name"],
            f"{one['compile_ms']:.1f}",
            str(one["masks"]),
            *(f"{one['mask_us'][name]:.0f}" for name in ("mean", "p50", "p99", "max")),
            f"{one['accept_us']:.1f}",
            f"{one['batch_ms']:.1f}",
        ]
        for one in result["grammars"]
    ]
    header = [
        "grammar",
        "compile ms",
        "masks",
        "mask us",
        "p50",
        "p99",
        "max",
        "accept us",
        "batch",
    ]
    return "\n".join(
        [
            f"{result['backend']}, {result['vocabulary']} tokens, read in "
            f"{result['vocabulary_seconds']:.1f} s, engine made in "
            f"{result['engine_seconds']:.1f} s; batch: ms for all masks",
            "",
            *report.align(header, rows),
        ]
    )
