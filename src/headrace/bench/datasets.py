"""Prompts to measure with: random, groups that share a prefix, or a file.

The same arguments and seed give the same prompts. Knows no tokenizer and no server: `input_len` is
what was asked for (exact for token ids, about one token a word for text); what a server counted is
in its answer.
"""

import argparse
import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import msgspec
import numpy as np

from headrace.bench.flags import natural_int, positive_int, ratio
from headrace.core.errors import BadRequest

Form = Literal["ids", "text", "chat"]
"""What a backend takes: token ids, plain text, or text and chat messages."""

DATASETS = {
    "random": "random",
    "random-ids": "random",
    "shared-prefix": "shared-prefix",
    "generated-shared-prefix": "shared-prefix",
    "file": "file",
    "sharegpt": "file",
    "custom": "file",
}
"""Accepted names (with those of sglang.bench_serving) -> ours."""

DEFAULT_COUNT = 100
DEFAULT_OUTPUT_LEN = 128

# Ids below 100 are often control tokens, and every real vocabulary has more than a thousand.
TOKEN_IDS = (100, 1000)

# Common words, each one token with its leading space in the usual vocabularies.
_COMMON = (
    "the of and to in is that for it was on are as with they be at one have this from or had by "
    "hot but some what there we can out other were all your when up use word how said an each she "
    "which do their time if will way about many then them would write like so these her long make "
    "thing see him two has look more day could go come did my sound no most number who over know "
    "water than call first people may down side been now find any new work part take get place"
)
WORDS = tuple(_COMMON.split())


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Prompt:
    """One request to send; exactly one of `text`, `token_ids`, `messages` is set."""

    input_len: int
    output_len: int
    text: str | None = None
    token_ids: list[int] | None = None
    messages: list[dict[str, Any]] | None = None
    group: int = 0


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The flags of `load`."""
    group = parser.add_argument_group("dataset")
    group.add_argument("--dataset-name", choices=list(DATASETS), default="random")
    group.add_argument("--dataset-path", type=Path, help="JSONL (or ShareGPT JSON) of `file`")
    group.add_argument(
        "--num-prompts",
        type=positive_int,
        help=f"prompts to send (default: {DEFAULT_COUNT} random ones, else the whole dataset)",
    )
    group.add_argument("--seed", type=natural_int, default=1)
    group.add_argument(
        "--random-input-len", type=positive_int, default=128, help="most tokens (default: 128)"
    )
    group.add_argument(
        "--random-output-len", type=positive_int, default=64, help="most tokens (default: 64)"
    )
    group.add_argument(
        "--random-range-ratio",
        type=ratio,
        default=1.0,
        help="lengths are uniform from RATIO * length to length (default: 1, all equal)",
    )
    for flag, default, what in (
        ("num-groups", 8, "groups, each with its own prefix"),
        ("prompts-per-group", 8, "prompts of a group"),
        ("system-prompt-len", 256, "tokens of the shared prefix"),
        ("question-len", 32, "tokens of a prompt's own part"),
        ("output-len", 32, "tokens to generate"),
    ):
        group.add_argument(
            f"--gsp-{flag}",
            type=positive_int,
            default=default,
            help=f"shared-prefix: {what} (default: {default})",
        )
    group.add_argument(
        "--file-output-len",
        "--sharegpt-output-len",
        type=positive_int,
        help=f"file: tokens to generate (default: the row's own, else {DEFAULT_OUTPUT_LEN})",
    )


def load(args: argparse.Namespace, form: Form) -> list[Prompt]:
    """The prompts that the flags of `add_arguments` describe, in sending order.

    Raises:
        BadRequest: the file is missing, empty or has a bad row (named by its number).
    """
    kind = DATASETS[args.dataset_name]
    if kind == "file":
        if args.dataset_path is None:
            raise BadRequest("--dataset-name file needs --dataset-path", field="dataset_path")
        return file_prompts(args.dataset_path, args.num_prompts, args.file_output_len, form)
    if kind == "random":
        return random_prompts(
            args.num_prompts or DEFAULT_COUNT,
            args.random_input_len,
            args.random_output_len,
            args.random_range_ratio,
            args.seed,
            form,
        )
    prompts = shared_prefix_prompts(
        (args.gsp_num_groups, args.gsp_prompts_per_group),
        args.gsp_system_prompt_len,
        args.gsp_question_len,
        args.gsp_output_len,
        args.seed,
        form,
    )
    return prompts[: args.num_prompts]


def random_prompts(
    count: int, input_len: int, output_len: int, range_ratio: float, seed: int, form: Form
) -> list[Prompt]:
    """`count` unrelated prompts with lengths uniform in [range_ratio * length, length]."""
    rng = np.random.default_rng(seed)
    inputs = _lengths(rng, count, input_len, range_ratio)
    outputs = _lengths(rng, count, output_len, range_ratio)
    return [
        _prompt(_draw(rng, length, form), output, form)
        for length, output in zip(inputs, outputs, strict=True)
    ]


def shared_prefix_prompts(
    groups: tuple[int, int], prefix_len: int, own_len: int, output_len: int, seed: int, form: Form
) -> list[Prompt]:
    """(groups, prompts per group) prompts in shuffled order; those of a group share a prefix."""
    rng = np.random.default_rng(seed)
    prompts = []
    for group in range(groups[0]):
        prefix = _draw(rng, prefix_len, form)
        for _ in range(groups[1]):
            units = prefix + _draw(rng, own_len, form)
            prompts.append(_prompt(units, output_len, form, group))
    return [prompts[index] for index in rng.permutation(len(prompts))]


def file_prompts(path: Path, count: int | None, output_len: int | None, form: Form) -> list[Prompt]:
    """The first `count` rows of a JSONL or ShareGPT file (all when None)."""
    prompts: list[Prompt] = []
    for where, row in _rows(path):
        if len(prompts) == count:
            break
        prompts.append(_row_prompt(where, row, output_len, form))
    if not prompts:
        raise BadRequest(f"{path}: no prompts in the file", field="dataset_path")
    return prompts


def _lengths(rng: np.random.Generator, count: int, most: int, range_ratio: float) -> list[int]:
    lengths: list[int] = rng.integers(max(1, int(most * range_ratio)), most + 1, count).tolist()
    return lengths


def _draw(rng: np.random.Generator, count: int, form: Form) -> list[Any]:
    """`count` random units: token ids, or words."""
    if form == "ids":
        return rng.integers(*TOKEN_IDS, count).tolist()
    return [WORDS[index] for index in rng.integers(0, len(WORDS), count)]


def _prompt(units: list[Any], output_len: int, form: Form, group: int = 0) -> Prompt:
    text, ids = (None, units) if form == "ids" else (" ".join(units), None)
    return Prompt(
        input_len=len(units), output_len=output_len, text=text, token_ids=ids, group=group
    )


def _rows(path: Path) -> Iterator[tuple[str, Any]]:
    """(place, decoded row) of a JSONL file or of a file that is one JSON array."""
    try:
        with path.open("rb") as file:
            if file.read(64).lstrip().startswith(b"["):
                file.seek(0)
                rows = _decode(str(path), file.read())
                yield from ((f"{path}, entry {n}", row) for n, row in enumerate(rows, 1))
                return
            file.seek(0)
            for number, line in enumerate(file, 1):
                if line.strip():
                    where = f"{path}, line {number}"
                    yield where, _decode(where, line)
    except OSError as error:
        raise BadRequest(f"cannot read {path}: {error.strerror}", field="dataset_path") from None


def _decode(where: str, data: bytes) -> Any:
    try:
        return msgspec.json.decode(data)
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise BadRequest(f"{where}: not JSON: {error}", field="dataset_path") from None


def _row_prompt(where: str, row: Any, output_len: int | None, form: Form) -> Prompt:
    def bad(problem: str) -> BadRequest:
        return BadRequest(f"{where}: {problem}", field="dataset_path")

    if not isinstance(row, dict):
        raise bad(f"must be a JSON object, not {type(row).__name__}")
    wanted = output_len or _row_output_len(row)
    if not isinstance(wanted, int) or isinstance(wanted, bool) or wanted < 1:
        raise bad(f"the output length must be an integer of at least 1, not {wanted!r}")
    if "conversations" in row:
        text = _first_question(row["conversations"])
        if text is None:
            raise bad("'conversations' has no turn of a person")
        return Prompt(text=text, input_len=len(text.split()), output_len=wanted)
    if "messages" in row:
        messages = row["messages"]
        if form != "chat":
            raise bad("'messages' needs --backend chat")
        if not _is_message_list(messages):
            raise bad("'messages' must be a non-empty list of objects with a 'role'")
        words = sum(len(str(message.get("content", "")).split()) for message in messages)
        return Prompt(messages=messages, input_len=words, output_len=wanted)
    prompt = row.get("prompt")
    if isinstance(prompt, str) and prompt:
        return Prompt(text=prompt, input_len=len(prompt.split()), output_len=wanted)
    if isinstance(prompt, list) and prompt and all(type(item) is int for item in prompt):
        if form == "chat":
            raise bad("token ids need --backend native or completions")
        return Prompt(token_ids=prompt, input_len=len(prompt), output_len=wanted)
    raise bad("needs 'prompt' (text or token ids), 'messages' or 'conversations'")


def _row_output_len(row: dict[str, Any]) -> Any:
    """The row's own output length (checked by the caller), else the default."""
    for key in ("output_len", "max_completion_tokens", "max_tokens"):
        if row.get(key) is not None:
            return row[key]
    return DEFAULT_OUTPUT_LEN


def _first_question(turns: Any) -> str | None:
    """First thing a person says in a ShareGPT conversation."""
    for turn in turns if isinstance(turns, list) else ():
        if isinstance(turn, dict) and turn.get("from", turn.get("role")) in ("human", "user"):
            text = turn.get("value", turn.get("content"))
            return text if isinstance(text, str) and text else None
    return None


def _is_message_list(messages: Any) -> bool:
    return (
        isinstance(messages, list)
        and bool(messages)
        and all(isinstance(message, dict) and "role" in message for message in messages)
    )
