"""Runs the JSON Schema Test Suite through the grammars and tells what they accept.

`python tools/json_schema_table.py` rewrites the tables in docs/structured-output.md, one for each
backend that is installed. For every
schema: refused with a place, or compiled; then every instance, written in several ways, goes
through a matcher byte by byte. Used by tests of both backends.
"""

import itertools
import json
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from headrace.grammar.compiler import Compiler
from headrace.grammar.engine import LLGUIDANCE, XGRAMMAR, Backend
from headrace.grammar.refusal import Refused
from headrace.grammar.vocabulary import Vocabulary, build_vocabulary

ROOT = Path(__file__).parents[1]
DATA = ROOT / "tests" / "data" / "json_schema_suite"
DOCS = ROOT / "docs" / "structured-output.md"
DRAFTS = {
    "draft2020-12": "https://json-schema.org/draft/2020-12/schema",
    "draft7": "http://json-schema.org/draft-07/schema#",
}
_MOST_ORDERS = 24


class Outcome(NamedTuple):
    """One schema of the suite. `refused` is the message, or "" when it was compiled."""

    draft: str
    file: str
    group: str
    refused: str
    place: str
    wrong: list[str]
    missed: list[str]
    accepted: int
    rejected: int


def byte_vocabulary() -> Vocabulary:
    """A vocabulary of single bytes, and an end (256)."""
    return build_vocabulary([*(bytes([i]) for i in range(256)), b""], {256: b"<eos>"}, [256])


def run_suite(draft: str, backend: Backend = LLGUIDANCE) -> Iterator[Outcome]:
    """The outcome of every schema of a draft."""
    compiler = Compiler(byte_vocabulary, {}, backend)
    try:
        for line in (DATA / f"{draft}.jsonl").read_text(encoding="utf-8").splitlines():
            file, group, schema, tests = json.loads(line)
            if isinstance(schema, dict):
                schema = {"$schema": DRAFTS[draft], **schema}
            yield _outcome(compiler, draft, file, group, schema, tests)
    finally:
        compiler.close()


def _outcome(
    compiler: Compiler, draft: str, file: str, group: str, schema: Any, tests: list[Any]
) -> Outcome:
    found = Outcome(draft, file, group, "", "", [], [], 0, 0)
    try:
        matcher = compiler.compile("json_schema", json.dumps(schema)).result()
    except Refused as error:
        return found._replace(refused=error.message, place=error.place)
    accepted = rejected = 0
    for description, data, valid in tests:
        passes = any(_matches(matcher, text) for text in writings(data))
        if passes and not valid:
            found.wrong.append(description)
        elif valid and not passes:
            found.missed.append(description)
        accepted += passes and valid
        rejected += not passes and not valid
    return found._replace(accepted=accepted, rejected=rejected)


def _matches(matcher: Any, text: str) -> bool:
    own = matcher.copy()
    return all(own.fits(byte) for byte in text.encode()) and own.complete


def writings(value: Any) -> Iterator[str]:
    """JSON texts of a value: members in other orders, whole numbers without a fraction; compact."""
    for variant in itertools.islice(_orders(_whole(value)), _MOST_ORDERS):
        for separators in ((", ", ": "), (",", ":"))[: 1 + isinstance(value, list | dict)]:
            text = json.dumps(variant, ensure_ascii=False, separators=separators)
            try:
                text.encode()
            except UnicodeEncodeError:
                text = json.dumps(variant, separators=separators)
            yield text


def _whole(value: Any) -> Any:
    if isinstance(value, float) and value.is_integer() and abs(value) < 2**63:
        return int(value)
    if isinstance(value, list):
        return [_whole(item) for item in value]
    if isinstance(value, dict):
        return {key: _whole(item) for key, item in value.items()}
    return value


def _orders(value: Any) -> Iterator[Any]:
    if isinstance(value, dict):
        for keys in itertools.permutations(value):
            for items in itertools.product(*(list(_few(value[key])) for key in keys)):
                yield dict(zip(keys, items, strict=True))
    elif isinstance(value, list):
        for items in itertools.product(*(list(_few(item)) for item in value)):
            yield list(items)
    else:
        yield value


def _few(value: Any) -> Iterator[Any]:
    return itertools.islice(_orders(value), _MOST_ORDERS)


def table(outcomes: list[Outcome]) -> str:
    """Markdown: one line per file of the suite."""
    lines = [
        "| file | schemas | refused | valid, accepted | valid, not written | invalid, rejected "
        "| invalid, accepted |",
        "|---|---|---|---|---|---|---|",
    ]
    files: dict[tuple[str, str], Counter[str]] = {}
    for one in outcomes:
        for key in ((one.draft, one.file), (one.draft, "**total**")):
            row = files.setdefault(key, Counter())
            row["schemas"] += 1
            row["refused"] += bool(one.refused)
            row["accepted"] += one.accepted
            row["missed"] += len(one.missed)
            row["rejected"] += one.rejected
            row["wrong"] += len(one.wrong)
    for (draft, file), row in sorted(files.items()):
        numbers = ("schemas", "refused", "accepted", "missed", "rejected", "wrong")
        cells = " | ".join(str(row[name]) for name in numbers)
        lines.append(f"| {draft} {file} | {cells} |")
    return "\n".join(lines)


def written(text: str, new: str, backend: Backend = LLGUIDANCE) -> str:
    """A document with the part between the marks of a backend replaced."""
    begin, end = (f"<!-- {backend.name} suite: {edge} -->" for edge in ("begin", "end"))
    before, rest = text.split(begin)
    return f"{before}{begin}\n{new}\n{end}{rest.split(end)[1]}"


def main() -> None:
    for backend in (LLGUIDANCE, XGRAMMAR):
        if backend.installed:
            outcomes = [one for draft in DRAFTS for one in run_suite(draft, backend)]
            text = DOCS.read_text(encoding="utf-8")
            DOCS.write_text(written(text, table(outcomes), backend), encoding="utf-8")
            tell(outcomes)


def tell(outcomes: list[Outcome]) -> None:
    """Print what deserves a look."""
    for one in outcomes:
        for kind, names in (("WRONG", one.wrong), ("missed", one.missed)):
            for name in names:
                print(kind, one.draft, one.file, "|", one.group, "|", name)
        if one.refused and not one.place:
            print("no place", one)


if __name__ == "__main__":
    main()
