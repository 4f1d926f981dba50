"""Prompt sources: lengths, sharing, determinism, and errors that name the row."""

import argparse
import json
from pathlib import Path

import pytest

from headrace.bench import datasets
from headrace.bench.datasets import Form, Prompt, random_prompts, shared_prefix_prompts
from headrace.core.errors import BadRequest


def load(form: Form, *flags: str) -> list[Prompt]:
    parser = argparse.ArgumentParser()
    datasets.add_arguments(parser)
    return datasets.load(parser.parse_args(flags), form)


def ids_of(prompt: Prompt) -> list[int]:
    assert prompt.token_ids is not None
    return prompt.token_ids


def test_random_ids_have_exact_lengths() -> None:
    prompts = load("ids", "--num-prompts", "20", "--random-input-len", "33")
    assert len(prompts) == 20
    assert all(len(ids_of(prompt)) == prompt.input_len == 33 for prompt in prompts)
    assert all(prompt.output_len == 64 and prompt.text is None for prompt in prompts)
    assert all(100 <= token < 1000 for prompt in prompts for token in ids_of(prompt))


def test_random_range_ratio_bounds_lengths() -> None:
    prompts = random_prompts(500, 40, 10, 0.5, 1, "ids")
    assert {prompt.input_len for prompt in prompts} == set(range(20, 41))
    assert {prompt.output_len for prompt in prompts} == set(range(5, 11))
    assert min(p.input_len for p in random_prompts(500, 3, 3, 0.0, 1, "ids")) == 1


@pytest.mark.parametrize("form", ["text", "chat"])
def test_random_words(form: Form) -> None:
    prompts = random_prompts(5, 12, 4, 1.0, 1, form)
    assert all(prompt.text and len(prompt.text.split()) == 12 for prompt in prompts)
    assert all(prompt.token_ids is None for prompt in prompts)


@pytest.mark.parametrize("name", ["random", "shared-prefix"])
def test_seed_decides(name: str) -> None:
    flags = ["--dataset-name", name, "--num-prompts", "8", "--random-range-ratio", "0"]
    assert load("ids", *flags) == load("ids", *flags)
    assert load("ids", *flags) != load("ids", *flags, "--seed", "2")


def test_groups_share_exactly_their_prefix() -> None:
    prompts = shared_prefix_prompts((3, 4), 50, 10, 5, 1, "ids")
    assert [prompt.input_len for prompt in prompts] == [60] * 12
    groups: dict[int, list[list[int]]] = {}
    for prompt in prompts:
        groups.setdefault(prompt.group, []).append(ids_of(prompt))
    assert {group: len(members) for group, members in groups.items()} == {0: 4, 1: 4, 2: 4}
    prefixes = {group: {tuple(ids[:50]) for ids in members} for group, members in groups.items()}
    assert all(len(prefix) == 1 for prefix in prefixes.values())
    assert len(set.union(*prefixes.values())) == 3
    assert len({tuple(ids_of(prompt)[50:]) for prompt in prompts}) == 12
    assert [prompt.group for prompt in prompts] != sorted(prompt.group for prompt in prompts)


def test_shared_prefix_flags_and_sglang_names() -> None:
    prompts = load(
        "text",
        *("--dataset-name", "generated-shared-prefix", "--gsp-num-groups", "2"),
        *("--gsp-prompts-per-group", "3", "--gsp-system-prompt-len", "7"),
        *("--gsp-question-len", "2", "--gsp-output-len", "9", "--num-prompts", "5"),
    )
    assert len(prompts) == 5
    assert {(prompt.input_len, prompt.output_len) for prompt in prompts} == {(9, 9)}


def write(path: Path, *rows: object) -> str:
    path.write_text("\n".join(json.dumps(row) for row in rows) + "\n")
    return str(path)


def test_file_rows(tmp_path: Path) -> None:
    chat = [{"role": "user", "content": "how are you"}]
    turns = [{"from": "human", "value": "hi there"}, {"from": "gpt", "value": "hello"}]
    path = write(
        tmp_path / "d.jsonl",
        {"prompt": "a b c", "output_len": 5},
        {"messages": chat, "max_tokens": 6},
        {"conversations": turns},
    )
    prompts = load("chat", "--dataset-name", "file", "--dataset-path", path)
    assert prompts == [
        Prompt(text="a b c", input_len=3, output_len=5),
        Prompt(messages=chat, input_len=3, output_len=6),
        Prompt(text="hi there", input_len=2, output_len=128),
    ]
    flags = ("--dataset-name", "sharegpt", "--dataset-path", path, "--num-prompts", "2")
    short = load("chat", *flags, "--sharegpt-output-len", "3")
    assert [prompt.output_len for prompt in short] == [3, 3]


def test_file_of_token_ids_and_json_array(tmp_path: Path) -> None:
    path = tmp_path / "d.json"
    path.write_text(json.dumps([{"prompt": [5, 6, 7]}, {"prompt": "x"}], indent=1))
    prompts = load("ids", "--dataset-name", "file", "--dataset-path", str(path))
    assert prompts[0].token_ids == [5, 6, 7] and prompts[0].input_len == 3
    assert prompts[1].text == "x"


GOOD = '{"prompt": "x"}'


@pytest.mark.parametrize(
    ("form", "line", "problem"),
    [
        ("ids", "{oops", "line 3: not JSON"),
        ("ids", "3", "line 3: must be a JSON object"),
        ("ids", '{"text": "x"}', "line 3: needs 'prompt'"),
        ("ids", '{"prompt": ""}', "line 3: needs 'prompt'"),
        ("ids", '{"prompt": [1, true]}', "line 3: needs 'prompt'"),
        ("ids", '{"messages": [{"role": "user", "content": "x"}]}', "needs --backend chat"),
        ("chat", '{"messages": []}', "line 3: 'messages' must be"),
        ("chat", '{"prompt": [1, 2]}', "token ids need --backend"),
        ("ids", '{"prompt": "x", "output_len": 0}', "output length must be"),
        ("ids", '{"prompt": "x", "max_tokens": "many"}', "output length must be"),
        ("ids", '{"conversations": [{"from": "gpt", "value": "x"}]}', "no turn of a person"),
        ("ids", '{"conversations": 5}', "no turn of a person"),
    ],
)
def test_bad_rows_are_named(tmp_path: Path, form: Form, line: str, problem: str) -> None:
    path = tmp_path / "d.jsonl"
    path.write_text(f"{GOOD}\n\n{line}\n")
    with pytest.raises(BadRequest, match="line 3") as caught:
        load(form, "--dataset-name", "file", "--dataset-path", str(path))
    assert problem in caught.value.message


def test_missing_and_empty_files(tmp_path: Path) -> None:
    with pytest.raises(BadRequest, match="needs --dataset-path"):
        load("ids", "--dataset-name", "file")
    with pytest.raises(BadRequest, match=r"cannot read .*none\.jsonl: No such file"):
        load("ids", "--dataset-name", "file", "--dataset-path", str(tmp_path / "none.jsonl"))
    (tmp_path / "empty.jsonl").write_text("\n")
    with pytest.raises(BadRequest, match="no prompts"):
        load("ids", "--dataset-name", "file", "--dataset-path", str(tmp_path / "empty.jsonl"))


@pytest.mark.parametrize(
    "flags", [["--num-prompts", "0"], ["--random-range-ratio", "1.5"], ["--gsp-num-groups", "x"]]
)
def test_bad_flags_are_named(flags: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        load("ids", *flags)
    assert f"argument {flags[0]}" in capsys.readouterr().err
